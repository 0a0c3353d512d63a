"""The decoded copy of a data set: one uint8 file per split, made once per node.

All ranks and later runs share it through the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from disttrain.data.epoch_plan import Ids
from disttrain.errors import DataError, StorageError
from disttrain.files import appearing, file_lock, sha256, stamp
from disttrain.parallel import usable_cores
from disttrain.shards.colors import RULES
from disttrain.shards.images import expect_images
from disttrain.shards.index import Index, remedy
from disttrain.shards.whole_shard import decoded
from disttrain.units import mib
from disttrain.userdirs import decoded_folder

_FILES = ("images.npy", "labels.npy")
_SEAL = "seal.json"  # hashes, sizes and modification times of the files


@dataclass(frozen=True)
class DecodedSplit:
    """The decoded images of one split, in the order of the index, memory-mapped from the cache.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def open_split(index: Index, split: str, skipped: Ids, say: Callable[[str], None]) -> DecodedSplit:
    """Returns the decoded images of a split, and decodes the shards if that was not done before.

    Any number of processes may call this at once: one decodes, the others wait.

    Args:
        index: the data set.
        split: train or val.
        skipped: ids of bad samples; their pixels are undefined.
        say: called when decoding begins, or when another process decodes.

    Raises:
        DataError: a shard is damaged or does not match the index.
        StorageError: the decoded copy does not fit on the disk.
    """
    folder = decoded_folder()
    identity = hashlib.sha256(f"{index.digest} {RULES}".encode()).hexdigest()
    name = f"{index.name}-{identity[:16]}-{split}"
    if len(skipped):
        name += f"-without-{hashlib.sha256(skipped.tobytes()).hexdigest()[:16]}"
    target = folder / name
    found = _map(target, index, split)
    if found is not None:
        return found
    try:
        with file_lock(target, lambda: say(f"waiting for another process to decode {index.name}/{split}")):
            found = _map(target, index, split)
            if found is None:
                _decode(index, split, skipped, target, say)
                found = _map(target, index, split)
    except OSError as error:
        raise StorageError(
            f"cannot write the decoded copy of {index.name} to {folder}: {error.strerror or error}; "
            "free some space or set DISTTRAIN_CACHE to another folder"
        ) from None
    assert found is not None
    return found


def _map(target: Path, index: Index, split: str) -> DecodedSplit | None:
    shape = (index.splits[split].samples, index.height, index.width, index.channels)
    try:  # copy-on-write, because torch warns about read-only arrays
        if not _is_sealed(target):
            return None
        images = np.load(target / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(target / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    expected = (shape, np.uint8, shape[:1], np.int64)
    found = (images.shape, images.dtype, labels.shape, labels.dtype)
    return DecodedSplit(images, labels) if found == expected else None


def _is_sealed(target: Path) -> bool:
    """Returns whether the files are unchanged; hashes them only if size or times differ."""
    seal = json.loads((target / _SEAL).read_text())
    for name in _FILES:
        if seal[name]["stamp"] != stamp(target / name) and seal[name]["sha256"] != sha256(target / name):
            return False
    return True


def _decode(index: Index, split: str, skipped: Ids, target: Path, say: Callable[[str], None]) -> None:
    shape = (index.splits[split].samples, index.height, index.width, index.channels)
    needed = int(np.prod(shape)) + 9 * shape[0]
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise StorageError(
            f"{target.parent}: the decoded copy of {index.name} needs {mib(needed)}, but only {mib(free)} "
            "are free; free some space, set DISTTRAIN_CACHE to another folder, or read the shards in every "
            "epoch with data.cache=none"
        )
    expect_images(shape[0])
    say(f"decoding {index.name}/{split} once: {shape[0]:,} images, {mib(needed, 1)}")
    with appearing(target) as partial:
        partial.mkdir()
        images = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        with (partial / "images.npy").open("r+b") as mapped:  # a full disk fails here, not with SIGBUS later
            os.posix_fallocate(mapped.fileno(), 0, os.fstat(mapped.fileno()).st_size)
        labels = np.full(shape[0], -1, dtype=np.int64)
        left_out = set(skipped.tolist())
        first_ids = index.first_ids(split)
        for number, shard in enumerate(index.splits[split].shards):
            if left_out.issuperset(range(first_ids[number], first_ids[number + 1])):
                continue
            for chunk in decoded(index, split, number, threads=usable_cores()):
                for sample, (key, problem) in chunk.problems.items():
                    if sample not in left_out:
                        raise DataError(
                            f"{index.place(shard)}: sample {key}: {problem}; {remedy(index)}, or skip such "
                            "samples with data.on_error=skip"
                        )
                end = chunk.first + len(chunk.labels)
                images[chunk.first : end], labels[chunk.first : end] = chunk.images, chunk.labels
        images.flush()
        np.save(partial / "labels.npy", labels)
        for name in _FILES:
            with (partial / name).open("rb") as unsynced:
                os.fsync(unsynced.fileno())
        seal = {n: {"sha256": sha256(partial / n), "stamp": stamp(partial / n)} for n in _FILES}
        (partial / _SEAL).write_text(json.dumps(seal))
