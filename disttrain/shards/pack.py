"""Writes samples as a packed data set: plain WebDataset tars and their index.

A tar holds `<key>.png|jpg|webp` and `<key>.cls` (the label in decimal) for each sample; the key is the
sample's running number in its split. The same samples give the same bytes. Where the samples come from is
the business of `datasets` and `imagefolder`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.errors import DataError, StorageError
from disttrain.shards.images import decode_image, map_in_threads
from disttrain.shards.index import (
    VERSION,
    Index,
    IndexFile,
    Shard,
    Split,
    data_folder,
    index_bytes,
    load_index,
)

Progress = Callable[[int], None]


class Sample(NamedTuple):
    """One encoded image with its label."""

    image: bytes
    """An image file."""
    extension: str
    """Its format: png, jpg or webp."""
    label: int
    """Position in the list of classes."""
    origin: str = ""
    """Where it comes from, for messages; not stored."""


def pack(
    name: str,
    root: str | None,
    splits: Mapping[str, Iterable[Sample]],
    classes: Sequence[str],
    *,
    channels: Literal[1, 3],
    shard_mib: float = 64,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Index:
    """Writes samples as a data set, which appears under its name when it is complete.

    Every image is decoded once: it must be sound and have the shape of the first. Samples are taken as
    they are needed, so that memory stays bounded. When a data set of that name exists, or another process
    makes it meanwhile, the existing one stays: it is returned if it is the same.

    Args:
        name: folder under the root.
        root: as for `data_root`.
        splits: the samples of `train` and other splits, each in the order of the shards.
        classes: their names; labels are positions in it.
        channels: 1 or 3, to which the images are converted when they are decoded.
        shard_mib: a shard is closed when it has reached this size.
        overwrite: replace an existing data set.
        on_progress: called now and then with the number of samples written so far, and at the end.

    Raises:
        DataError: an image is broken or of another shape, a split is empty, or another data set of that
            name exists.
        StorageError: a write failed.
    """
    target = data_folder(name, root)
    place = target.resolve()  # a data set may be a link to a larger disk
    if overwrite:
        _check_replaceable(place)
    try:
        with _scratch_folder(place) as scratch:
            census = Census(len(classes), channels, on_progress or (lambda done: None))
            written = {}
            for split, samples in splits.items():
                shards = _write_shards(scratch, split, census.check(split, samples), int(shard_mib * 2**20))
                counts = census.class_counts[split]
                written[split] = Split(sum(counts), shards, tuple(counts))
            height, width, _ = census.shape
            mean, std = census.mean_std()
            text = index_bytes(
                IndexFile(
                    version=VERSION,
                    classes=tuple(classes),
                    channels=channels,
                    height=height,
                    width=width,
                    mean=mean,
                    std=std,
                    splits=written,
                )
            )
            with (scratch / "index.json").open("wb") as file:
                file.write(text)
                _sync(file)
            _sync_folder(scratch)
            published = _publish(scratch, place, overwrite)
    except OSError as error:
        raise StorageError(
            f"{error.filename or target}: the data set cannot be written: {error.strerror or error}; "
            "make room or choose another folder with --root"
        ) from error
    index = load_index(name, root)
    if not published and index.digest != hashlib.sha256(text).hexdigest():
        raise DataError(
            f"{target}: another data set of this name exists; replace it with --force or choose another name"
        )
    return index


class _Measured(NamedTuple):
    sample: Sample
    shape: tuple[int, int, int]
    sums: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]


class Census:
    """What is counted while samples pass on their way into the shards."""

    def __init__(self, classes: int, channels: int, on_progress: Progress) -> None:
        self.class_counts: dict[str, list[int]] = {}
        self.shape = (0, 0, channels)
        self._classes = classes
        self._channels = channels
        self._on_progress = on_progress
        self._first = ""
        self._done = 0
        self._sums = np.zeros(channels, np.int64)  # of the train split; exact up to 1e14 pixels
        self._squares = np.zeros(channels, np.int64)

    def check(self, split: str, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yields the samples after checking and counting them."""
        counts = self.class_counts[split] = [0] * self._classes
        named = (
            sample if sample.origin else sample._replace(origin=f"{split} sample {number}")
            for number, sample in enumerate(samples)
        )
        for sample, shape, sums, squares in map_in_threads(self._measure, named):
            if not 0 <= sample.label < self._classes:
                raise DataError(f"{sample.origin}: label {sample.label}, but {self._classes} classes")
            if not self._first:
                self._first, self.shape = sample.origin, shape
            if shape != self.shape:
                (height, width, _), (first_height, first_width, _) = shape, self.shape
                raise DataError(
                    f"{sample.origin} is {width}x{height} but {self._first} is {first_width}x{first_height}; "
                    "all images must have one size"
                )
            counts[sample.label] += 1
            if split == "train":
                self._sums += sums
                self._squares += squares
            self._done += 1
            if self._done % 100 == 0:
                self._on_progress(self._done)
            yield sample
        if not any(counts):
            raise DataError(f"the {split} split has no images; add some")
        self._on_progress(self._done)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns both per channel for pixels in 0..1, rounded once from exact integers."""
        pixels = sum(self.class_counts["train"]) * self.shape[0] * self.shape[1]
        pairs = list(zip(self._sums.tolist(), self._squares.tolist(), strict=True))
        mean = tuple(total / (255 * pixels) for total, _ in pairs)
        std = tuple(math.sqrt(pixels * square - total**2) / (255 * pixels) for total, square in pairs)
        return mean, std

    def _measure(self, sample: Sample) -> _Measured:
        try:
            pixels = decode_image(sample.image, self._channels)
        except ValueError as error:
            raise DataError(f"{sample.origin}: {error}; repair or remove it") from None
        flat = pixels.reshape(-1, self._channels)
        sums = flat.sum(axis=0, dtype=np.int64)
        squares = np.square(flat, dtype=np.uint16).sum(axis=0, dtype=np.int64)  # 255 * 255 < 2**16
        return _Measured(sample, (pixels.shape[0], pixels.shape[1], pixels.shape[2]), sums, squares)


def _write_shards(folder: Path, split: str, samples: Iterator[Sample], shard_bytes: int) -> tuple[Shard, ...]:
    from webdataset.writer import TarWriter

    shards: list[Shard] = []
    number = 0
    sample = next(samples, None)
    while sample is not None:
        path = folder / f"{split}-{len(shards):06d}.tar"
        first = number
        with path.open("wb") as file:
            tar = TarWriter(
                file, encoder=False, mtime=0, mode=0o444, user="disttrain", group="disttrain", compress=False
            )
            with tar:
                while sample is not None and (number == first or file.tell() < shard_bytes):
                    label = str(sample.label).encode()
                    tar.write({"__key__": f"{number:08d}", sample.extension: sample.image, "cls": label})
                    number += 1
                    sample = next(samples, None)
            _sync(file)
        with path.open("rb") as file:
            digest = sha256(file)
        shards.append(Shard(path.name, number - first, path.stat().st_size, digest))
    return tuple(shards)


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Makes a hidden folder beside the target and removes it in the end, whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Refuses to replace what is not a packed data set: a wrong --root must not delete a home folder."""
    if not target.exists():
        return
    foreign = (
        target
        if not target.is_dir()
        else next(
            (path for path in target.iterdir() if not (path.name == "index.json" or path.suffix == ".tar")),
            None,
        )
    )
    if foreign:
        raise DataError(f"{foreign}: not part of a packed data set; move it away, or choose another name")


def _publish(folder: Path, target: Path, overwrite: bool) -> bool:
    """Renames a complete folder to its place; returns False if another one is there and may not go."""
    while True:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync_folder(target.parent)
            return True
        if not overwrite:
            return False
        with _scratch_folder(target) as old, contextlib.suppress(FileNotFoundError):
            target.rename(old / target.name)  # a reader that has its shards open keeps them


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
