"""The decoded copy of a split, made once per node: all images, one size, or reduced ones of several sizes.

All ranks and later runs share it through the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from disttrain.data.epoch_plan import Ids
from disttrain.errors import StorageError
from disttrain.files import appearing, file_lock, sha256, stamp
from disttrain.parallel import usable_cores
from disttrain.shards.colors import RULES
from disttrain.shards.crops import Crops
from disttrain.shards.images import Pixels
from disttrain.shards.index import Index
from disttrain.shards.label_format import Labels
from disttrain.shards.photos import cut_out, resized
from disttrain.shards.reader import sample_error
from disttrain.shards.whole_shard import Chunk, Reduced, decoded, reduced
from disttrain.units import mib
from disttrain.userdirs import decoded_folder

_SEAL = "seal.json"  # hashes, sizes and modification times of the files

_T = TypeVar("_T")
_Decoded = TypeVar("_Decoded", Chunk, Reduced)


@dataclass(frozen=True)
class DecodedSplit:
    """The decoded images of one split, in the order of the index, memory-mapped from the cache.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: see `Labels`.
    """

    images: npt.NDArray[np.uint8]
    labels: Labels


@dataclass(frozen=True)
class ReducedSplit:
    """The train split, decoded and reduced to `data.decoded_side`, memory-mapped from the cache.

    Attributes:
        pixels: of all images, in the order of the index: uint8.
        sizes: height and width of each image, int64 [N, 2]; 0 for bad samples.
        starts: of each image in `pixels`, int64 [N].
        labels: see `Labels`.
        channels: of an image.
    """

    pixels: npt.NDArray[np.uint8]
    sizes: Ids
    starts: Ids
    labels: Labels
    channels: int

    def decode(self, ids: Ids, images: Pixels, labels: Labels, positions: Ids, crops: Crops) -> None:
        """Cuts the crops of samples out of the decoded images; see `Reader.decode`, which gives the same."""
        sizes, side = self.sizes[ids], images.shape[1]
        boxes = crops(positions, sizes).tolist()
        starts = self.starts[ids].tolist()
        for at, (start, (height, width), box) in enumerate(zip(starts, sizes.tolist(), boxes, strict=True)):
            end = start + height * width * self.channels
            image = self.pixels[start:end].reshape(height, width, self.channels)
            images[at] = resized(cut_out(image, box), side, side)
        labels[:] = self.labels[ids]


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
    shape = (index.splits[split].samples, index.height, index.width, index.channels)

    def load(target: Path) -> DecodedSplit | None:
        # copy-on-write, because torch warns about read-only arrays
        images = np.load(target / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(target / "labels.npy", mmap_mode="c", allow_pickle=False)
        fits = (images.shape, images.dtype) == (shape, np.uint8) and _labels_fit(index, labels, shape[0])
        return DecodedSplit(images, labels) if fits else None

    def write(partial: Path) -> None:
        labels = index.empty_labels(shape[0])
        needed = int(np.prod(shape)) + labels.nbytes
        _expect_space(index, partial.parent, needed)
        say(f"decoding {index.name}/{split} once: {shape[0]:,} images, {mib(needed, 1)}")
        images = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        with (partial / "images.npy").open("r+b") as mapped:  # a full disk fails here, not with SIGBUS later
            os.posix_fallocate(mapped.fileno(), 0, os.fstat(mapped.fileno()).st_size)
        for chunk in _usable(index, split, skipped, decoded):
            end = chunk.first + len(chunk.labels)
            images[chunk.first : end], labels[chunk.first : end] = chunk.images, chunk.labels
        images.flush()
        np.save(partial / "labels.npy", labels)

    return _open(index, split, skipped, f"{RULES}", load, write, say)


def open_reduced(index: Index, skipped: Ids, say: Callable[[str], None]) -> ReducedSplit:
    """Returns the images of the train split, reduced to `decoded_side`; see `open_split`."""
    samples, side = index.splits["train"].samples, index.decoded_side

    def load(target: Path) -> ReducedSplit | None:
        pixels = np.memmap(target / "pixels.bin", np.uint8, "c")  # torch warns about read-only arrays
        sizes = np.load(target / "sizes.npy", allow_pickle=False)
        labels = np.load(target / "labels.npy", mmap_mode="c", allow_pickle=False)
        starts = np.concatenate([[0], np.cumsum(sizes.prod(1) * index.channels)])
        fits = len(sizes) == samples and starts[-1] == len(pixels) and _labels_fit(index, labels, samples)
        return ReducedSplit(pixels, sizes, starts[:-1], labels, index.channels) if fits else None

    def write(partial: Path) -> None:
        _expect_space(index, partial.parent, index.decoded_bytes // 2)  # how large it gets is not known yet
        size = f"a shorter side of at most {side} pixels, about {mib(index.decoded_bytes, 1)}"
        say(f"decoding {index.name}/train once: {samples:,} images, {size}")
        sizes = np.zeros((samples, 2), np.int64)
        labels = index.empty_labels(samples)
        with (partial / "pixels.bin").open("wb") as file:
            for chunk in _usable(index, "train", skipped, reduced):
                for place, image in enumerate(chunk.images, start=chunk.first):
                    if image is not None:
                        sizes[place] = image.shape[:2]
                        file.write(image.tobytes())
                labels[chunk.first : chunk.first + len(chunk.labels)] = chunk.labels
        np.save(partial / "sizes.npy", sizes)
        np.save(partial / "labels.npy", labels)

    return _open(index, "train", skipped, f"{RULES} {side}", load, write, say)


def _labels_fit(index: Index, labels: Labels, samples: int) -> bool:
    """Returns whether these are labels of so many samples of a data set."""
    expected = index.empty_labels(0)
    return labels.dtype == expected.dtype and labels.shape == (samples, *expected.shape[1:])


def _open(
    index: Index,
    split: str,
    skipped: Ids,
    rules: str,
    load: Callable[[Path], _T | None],
    write: Callable[[Path], None],
    say: Callable[[str], None],
) -> _T:
    """Returns what `load` returns for the copy; `write` makes it if it is missing or damaged.

    Args:
        index: the data set.
        split: train or val.
        skipped: ids of bad samples.
        rules: what the pixels depend on beside the data set.
        load: called with the folder of a sealed copy; returns None if it is not what it should be.
        write: called with a new folder.
        say: called when another process decodes.
    """
    folder = decoded_folder()
    identity = hashlib.sha256(f"{index.digest} {rules}".encode()).hexdigest()
    name = f"{index.name}-{identity[:16]}-{split}"
    if len(skipped):
        name += f"-without-{hashlib.sha256(skipped.tobytes()).hexdigest()[:16]}"
    target = folder / name

    def found() -> _T | None:
        try:
            return load(target) if _is_sealed(target) else None
        except (OSError, ValueError, EOFError):
            return None

    if (copy := found()) is not None:
        return copy
    try:
        with file_lock(target, lambda: say(f"waiting for another process to decode {index.name}/{split}")):
            if (copy := found()) is None:
                with appearing(target) as partial:
                    partial.mkdir()
                    write(partial)
                    _seal(partial)
                copy = found()
    except OSError as error:
        raise StorageError(
            f"cannot write the decoded copy of {index.name} to {folder}: {error.strerror or error}; "
            "free some space or set DISTTRAIN_CACHE to another folder"
        ) from None
    assert copy is not None
    return copy


def _seal(folder: Path) -> None:
    """Writes the seal of the files in a folder, after they are on the disk."""
    seal = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as unsynced:
            os.fsync(unsynced.fileno())
        seal[path.name] = {"sha256": sha256(path), "stamp": stamp(path)}
    (folder / _SEAL).write_text(json.dumps(seal))


def _is_sealed(target: Path) -> bool:
    """Returns whether the files are unchanged; hashes them only if size or times differ."""
    seal = json.loads((target / _SEAL).read_text())
    return all(
        entry["stamp"] == stamp(target / name) or entry["sha256"] == sha256(target / name)
        for name, entry in seal.items()
    )


def _expect_space(index: Index, folder: Path, needed: int) -> None:
    """Raises StorageError if there are fewer bytes than `needed`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: the decoded copy of {index.name} needs {mib(needed)}, but only {mib(free)} "
            "are free; free some space, set DISTTRAIN_CACHE to another folder, or read the shards in every "
            "epoch with data.cache=none"
        )


def _usable(
    index: Index, split: str, skipped: Ids, decode: Callable[..., Iterator[_Decoded]]
) -> Iterator[_Decoded]:
    """Yields the decoded chunks of a split's shards, without the shards in which nothing can be used.

    Raises:
        DataError: a sample that is not in `skipped` is bad.
    """
    left_out = set(skipped.tolist())
    first_ids = index.first_ids(split)
    for number, shard in enumerate(index.splits[split].shards):
        if left_out.issuperset(range(first_ids[number], first_ids[number + 1])):
            continue
        for chunk in decode(index, split, number, threads=usable_cores()):
            for sample, (key, problem) in chunk.problems.items():
                if sample not in left_out:
                    raise sample_error(index, index.place(shard), key, ValueError(problem))
            yield chunk
