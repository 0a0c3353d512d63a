"""Reads samples from shards, after checking a shard's size, hash and structure.

The first process that needs a shard reads all of it once, and stores the offsets of the samples in the user's
cache. The key is the shard's hash with size and times of the file. So later runs and other ranks do not check
it again.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from disttrain.errors import DataError, DisttrainError, UnsafeError, reason
from disttrain.files import stamp
from disttrain.shards.crops import CenterCrops, Crops
from disttrain.shards.images import Encoded, ImageError, Pixels, decode_exactly, decode_image, decode_into
from disttrain.shards.index import Index, remedy, size_problem
from disttrain.shards.index_file import Shard
from disttrain.shards.label_format import Labels
from disttrain.shards.photos import decode_crops
from disttrain.shards.remote import fetch_shard
from disttrain.shards.tar import Contents, scan
from disttrain.userdirs import cache_folder, remember

Ids = npt.NDArray[np.int64]
Sample: TypeAlias = dict[str, Any]
"""A sample of webdataset: a dict with one field for each member, by extension."""

_OPEN_SHARDS = 256  # the usual shuffle buffer spreads over some 80 shards of 64 MiB of photos
_TICK_NS = 100_000_000  # a file that was just written could change again with the same time stamp


class ShardError(DataError):
    """A whole shard is missing or does not match the index.

    Args:
        index: its data set.
        shard: the shard.
        problem: what is wrong.
    """

    def __init__(self, index: Index, shard: Shard, problem: str) -> None:
        super().__init__(f"{index.place(shard)}: {problem}; {remedy(index)}")
        self.problem = problem


class OpenShard:
    """A checked shard, open for reading from any thread.

    Attributes:
        place: path or URL of the shard, for messages.
        contents: its samples.
    """

    def __init__(self, place: str, descriptor: int, contents: Contents) -> None:
        self.place = place
        self.contents = contents
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, position: int) -> bytes:
        """Returns the image file of a sample.

        Raises:
            ValueError: the sample cannot be used, or the shard has changed since it was opened.
        """
        if self.contents.problems and (problem := self.contents.problems.get(position)):
            raise ValueError(problem)
        size = int(self.contents.sizes[position])
        image = os.pread(self._descriptor, size, int(self.contents.offsets[position]))
        if len(image) != size:
            raise ValueError("the shard was truncated while it was being read")
        return image

    def sample(self, position: int) -> Sample:
        """Returns a sample in webdataset's form: `__key__`, `__url__`, and the bytes of the image and `cls`.

        The label is a number; in multi-label data, `cls` is a list of JSON.

        Raises:
            ValueError: see `read`.
        """
        key, extension = self.contents.keys[position], self.contents.extensions[position]
        labels = self.contents.labels[position]
        label = json.dumps(labels.nonzero()[0].tolist() if labels.ndim else int(labels)).encode()
        return {"__key__": key, "__url__": self.place, extension: self.read(position), "cls": label}


def sample_error(index: Index, place: str, key: str, error: Exception) -> DataError:
    """Returns the error for a bad sample; `place` is the path or URL of its shard."""
    return DataError(
        f"{place}: sample {key}: {reason(error)}; {remedy(index)}, or skip such samples with "
        "data.on_error=skip"
    )


def open_shard(index: Index, split: str, number: int, say: Callable[[str], None] | None = None) -> OpenShard:
    """Checks and opens a shard; downloads it first if it is on a server.

    Any single process may call this.

    Args:
        index: the data set.
        split: train or val.
        number: number of the shard in the split.
        say: called with a message if the shard is downloaded.

    Raises:
        ShardError: the shard is missing or does not match the index. The message names the shard, the first
            bad sample if known, and the remedy.
        DataError: the download failed.
        UnsafeError: the shard has a member of a forbidden kind.
    """
    shard = index.splits[split].shards[number]
    url = index.url(shard)
    if url is None:
        return _open(index, shard, index.folder / shard.file)
    path = fetch_shard(url, size=shard.bytes, sha256=shard.sha256, say=say)
    try:
        return _open(index, shard, path)
    except ShardError:  # another process removed it meanwhile, or it is damaged on this disk
        path.unlink(missing_ok=True)
        return _open(index, shard, fetch_shard(url, size=shard.bytes, sha256=shard.sha256, say=say))


def sample_keys(index: Index, ids: Sequence[int], split: str = "train") -> list[str | None]:
    """Returns the keys of samples in their shards; None for samples of an unreadable shard."""
    shards = index.splits[split].shards
    ends = list(itertools.accumulate(shard.samples for shard in shards))
    keys: list[str | None] = []
    opened: dict[int, tuple[str, ...]] = {}
    for id_ in ids:
        number = bisect.bisect_right(ends, id_)
        if number not in opened:
            opened[number] = ()
            with suppress(DisttrainError):
                opened[number] = open_shard(index, split, number).contents.keys
        names = opened[number]
        keys.append(names[id_ - ends[number]] if names else None)
    return keys


def _open(index: Index, shard: Shard, path: Path) -> OpenShard:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ShardError(index, shard, "is not a file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(index, shard, reason(error)) from None
    try:
        return OpenShard(index.place(shard), descriptor, _contents(index, shard, descriptor, path))
    except BaseException:
        os.close(descriptor)
        raise


def _contents(index: Index, shard: Shard, descriptor: int, path: Path) -> Contents:
    """Returns the contents of an open shard, from the cache if this file was checked before."""
    if problem := size_problem(path, shard):
        raise ShardError(index, shard, problem.removeprefix(f"{path}: "))
    seen = stamp(descriptor)
    identity = f"{path.resolve()} {len(index.classes)} {seen}"
    if index.multi_label:
        identity += " multi-label"
    if index.label is not None:
        identity += f" {index.label} {index.classes}"
    name = f"{shard.sha256[:32]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    record = cache_folder() / "checked" / name
    if (contents := _load(record)) is not None and len(contents.keys) == shard.samples:
        return contents
    with open(descriptor, "rb", closefd=False) as file:
        intact = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
        file.seek(0)
        contents, problem = None, ""
        try:
            contents = scan(file, index.label_reader())
        except ValueError as error:
            problem = str(error)
        except UnsafeError as error:
            raise UnsafeError(f"{index.place(shard)}: {error}") from None
    if not intact:
        if contents is not None:
            problem = _first_bad(index, OpenShard(str(path), os.dup(descriptor), contents))
        found = f" ({problem})" if problem else ""
        raise ShardError(index, shard, f"damaged: its SHA-256 does not match the index{found}")
    if contents is None:
        raise ShardError(index, shard, problem)
    if len(contents.keys) != shard.samples:
        raise ShardError(index, shard, f"{len(contents.keys)} samples, but the index says {shard.samples}")
    if time.time_ns() - max(seen[1:]) > _TICK_NS:
        _store(record, contents)
    return contents


def _first_bad(index: Index, shard: OpenShard) -> str:
    """Returns the first bad sample of a damaged shard and its problem, or an empty string."""
    height, width = index.stored_height, index.stored_width
    for position, key in enumerate(shard.contents.keys):
        try:
            image = shard.read(position)
            if height is None or width is None:
                decode_image(image, index.channels)
            else:
                decode_exactly(image, height, width, index.channels)
        except ValueError as error:
            return f"first bad sample {key}: {error}"
    return ""


def _load(record: Path) -> Contents | None:
    try:
        with np.load(record, allow_pickle=False) as arrays:
            text = json.loads(arrays["text"].tobytes())
            offsets, sizes, labels = (arrays[name] for name in ("offsets", "sizes", "labels"))
        problems = {int(position): problem for position, problem in text["problems"].items()}
        return Contents(tuple(text["keys"]), tuple(text["extensions"]), offsets, sizes, labels, problems)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _store(record: Path, contents: Contents) -> None:
    text = {"keys": contents.keys, "extensions": contents.extensions, "problems": contents.problems}
    file = io.BytesIO()
    np.savez(
        file,
        text=np.frombuffer(json.dumps(text).encode(), np.uint8),
        offsets=contents.offsets,
        sizes=contents.sizes,
        labels=contents.labels,
    )
    remember(record, file.getvalue())


class Reader:
    """Reads samples of a split by id, from any thread; at most 256 shards are open at a time.

    Args:
        index: the data set.
        split: train or val.
        say: called with messages about downloads.
    """

    def __init__(self, index: Index, split: str, say: Callable[[str], None] | None = None) -> None:
        self._index = index
        self._split = split
        self._say = say
        self._first = index.first_ids(split)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in index.splits[split].shards]

    def decode(
        self,
        ids: Ids,
        images: Pixels,
        labels: Labels,
        positions: Ids | None = None,
        crops: Crops | None = None,
    ) -> None:
        """Decodes samples.

        Args:
            ids: int64 [B].
            images: output for the pixels, uint8 [B, H, W, C].
            labels: output for the labels, see `Labels`.
            positions: of the samples in the order of the epoch, int64 [B]; needed with `crops`.
            crops: chooses the crops of the images of a cropped data set; None means those of an evaluation.

        Raises:
            DataError: a shard or a sample is bad; the message names it.
            UnsafeError: a shard has a member of a forbidden kind.
        """
        places = self._places(ids)
        files: list[bytes] = []
        at = 0
        try:
            for at, (shard, position) in enumerate(places):
                files.append(shard.read(position))
                labels[at] = shard.contents.labels[position]
            decode_files(self._index, files, images, positions, crops)
        except (ValueError, OSError) as error:
            raise self._error(places[error.place if isinstance(error, ImageError) else at], error) from None

    def samples(self, ids: Ids) -> list[Sample]:
        """Returns samples in webdataset's form, each with its id as `__id__`.

        Args:
            ids: int64 [B].

        Raises:
            DataError, UnsafeError: see `decode`.
        """
        places = self._places(ids)
        samples: list[Sample] = []
        try:
            for id_, (shard, position) in zip(ids.tolist(), places, strict=True):
                samples.append({"__id__": id_} | shard.sample(position))
        except (ValueError, OSError) as error:
            raise self._error(places[len(samples)], error) from None
        return samples

    def _places(self, ids: Ids) -> list[tuple[OpenShard, int]]:
        """Returns the open shard of each sample, and the sample's position in it."""
        numbers = np.searchsorted(self._first, ids, side="right") - 1
        positions = (ids - self._first[numbers]).tolist()
        shards = {number: self._shard(number) for number in set(numbers.tolist())}
        return [(shards[n], position) for n, position in zip(numbers.tolist(), positions, strict=True)]

    def _error(self, place: tuple[OpenShard, int], error: Exception) -> DataError:
        shard, position = place
        return sample_error(self._index, shard.place, shard.contents.keys[position], error)

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if shard := self._open.get(number):
                self._open.move_to_end(number)
                return shard
        with self._shard_locks[number]:  # one thread checks the shard, the others wait
            with self._lock:
                if shard := self._open.get(number):
                    return shard
            shard = open_shard(self._index, self._split, number, self._say)
            with self._lock:
                self._open[number] = shard
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)  # closed when no thread uses it any more
            return shard


def decode_files(
    index: Index,
    files: Sequence[Encoded],
    out: Pixels,
    positions: Ids | None = None,
    crops: Crops | None = None,
) -> None:
    """Decodes image files of a data set into `out`, uint8 [n, H, W, C]; see `Reader.decode`.

    Raises:
        ImageError: an image cannot be decoded, or has another size.
    """
    if index.image_size is None:
        decode_into(files, out)
    elif crops is None or positions is None:
        decode_crops(files, np.zeros(len(files), np.int64), CenterCrops(index.crop_pct), out)
    else:
        decode_crops(files, positions, crops, out, index.decoded_side)
