"""Decodes all samples of a shard in order: for a decoded copy, and to find bad samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from disttrain.errors import reason
from disttrain.parallel import ordered_map
from disttrain.shards.images import Pixels, decode_exactly, decode_image, pixel_sums
from disttrain.shards.index import Index
from disttrain.shards.label_format import Labels
from disttrain.shards.photos import decode_reduced, read_header
from disttrain.shards.reader import Ids, OpenShard, open_shard
from disttrain.shards.remarks import collected

_T = TypeVar("_T")

_CHUNK = 256  # samples that one thread decodes at a time
_LARGE_CHUNK = 16  # the same for images of several sizes, which are usually large


class Chunk(NamedTuple):
    """Consecutive decoded samples of a shard.

    Attributes:
        first: id of the first sample.
        images: uint8 [n, H, W, C]; arbitrary for bad samples.
        labels: see `Labels`; none for an invalid label.
        problems: id -> key, and why the sample cannot be used.
        remarks: key of a sample that can be used, and a remark on its image.
    """

    first: int
    images: Pixels
    labels: Labels
    problems: dict[int, tuple[str, str]]
    remarks: list[tuple[str, str]]


def decoded(index: Index, split: str, number: int, *, threads: int) -> Iterator[Chunk]:
    """Yields all samples of a shard of a data set with images of one size, decoded, in order.

    Raises:
        DataError, UnsafeError: see `open_shard`.
    """
    shape = (index.height, index.width, index.channels)

    def work(shard: OpenShard, positions: range, base: int) -> Chunk:
        images = np.empty((len(positions), *shape), np.uint8)
        problems, remarks = {}, []
        for place, position in enumerate(positions):
            key = shard.contents.keys[position]
            try:
                with collected() as found:
                    images[place] = decode_exactly(shard.read(position), *shape)
            except (ValueError, OSError) as error:
                problems[base + position] = (key, reason(error))
                continue
            remarks += [(key, text) for text in found]
        labels = shard.contents.labels[positions.start : positions.stop]
        return Chunk(base + positions.start, images, labels, problems, remarks)

    yield from _by_chunk(index, split, number, work, _CHUNK, threads)


class Reduced(NamedTuple):
    """Consecutive decoded samples of a shard with images of any size.

    Attributes:
        first: id of the first sample.
        images: uint8 [H, W, C] of each sample, with a shorter side of at most `decoded_side`; None for bad
            samples.
        labels: see `Labels`; none for an invalid label.
        problems: id -> key, and why the sample cannot be used.
    """

    first: int
    images: list[Pixels | None]
    labels: Labels
    problems: dict[int, tuple[str, str]]


def reduced(index: Index, split: str, number: int, *, threads: int) -> Iterator[Reduced]:
    """Yields all samples of a shard, decoded and reduced to the data set's `decoded_side`, in order.

    Raises:
        DataError, UnsafeError: see `open_shard`.
    """
    side = index.decoded_side
    assert side is not None

    def work(shard: OpenShard, positions: range, base: int) -> Reduced:
        images: list[Pixels | None] = []
        problems = {}
        for position in positions:
            try:
                image = shard.read(position)
                images.append(decode_reduced(image, read_header(image), side, index.channels))
            except (ValueError, OSError) as error:
                images.append(None)
                problems[base + position] = (shard.contents.keys[position], reason(error))
        labels = shard.contents.labels[positions.start : positions.stop]
        return Reduced(base + positions.start, images, labels, problems)

    yield from _by_chunk(index, split, number, work, _LARGE_CHUNK, threads)


class ScannedSamples(NamedTuple):
    """What is known of consecutive samples of a shard after they were decoded.

    Attributes:
        first: id of the first sample.
        labels: see `Labels`; none for an invalid label.
        problems: id -> key, and why the sample cannot be used.
        remarks: key of a sample that can be used, and a remark on its image.
        sizes: height and width of the upright images in pixels, int64 [n, 2]; 0 for bad samples.
        sums: of the pixels of the usable samples, int64 [2, C]; see `pixel_sums`.
    """

    first: int
    labels: Labels
    problems: dict[int, tuple[str, str]]
    remarks: list[tuple[str, str]]
    sizes: Ids
    sums: npt.NDArray[np.int64]

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Whether each sample can be used: bool [n]."""
        usable = np.ones(len(self.labels), bool)
        usable[[sample - self.first for sample in self.problems]] = False
        return usable


def scanned(index: Index, split: str, number: int, *, threads: int) -> Iterator[ScannedSamples]:
    """Decodes all samples of a shard, in order, and yields what is known of them.

    Raises:
        DataError, UnsafeError: see `open_shard`.
    """
    if index.stored_height is not None:
        one_size = index.cropped(None, index.crop_pct)
        for chunk in decoded(one_size, split, number, threads=threads):
            first, images, labels, problems, remarks = chunk
            sizes = np.full((len(labels), 2), images.shape[1:3], np.int64)
            sizes[[sample - first for sample in problems]] = 0
            sums = pixel_sums(images[sizes[:, 0] > 0])
            yield ScannedSamples(first, labels, problems, remarks, sizes, sums)
        return
    work = partial(_scan_some, index.channels)
    yield from _by_chunk(index, split, number, work, _LARGE_CHUNK, threads)


def _by_chunk(
    index: Index,
    split: str,
    number: int,
    work: Callable[[OpenShard, range, int], _T],
    size: int,
    threads: int,
) -> Iterator[_T]:
    """Yields what `work` returns for every `size` samples of a shard, in order, computed by threads.

    `work` gets the shard, the positions of the samples in it, and the id of the shard's first sample.

    Raises:
        DataError, UnsafeError: see `open_shard`.
    """
    shard = open_shard(index, split, number)
    count = len(shard.contents.keys)
    base = int(index.first_ids(split)[number])
    chunks = (range(begin, min(begin + size, count)) for begin in range(0, count, size))
    yield from ordered_map(lambda positions: work(shard, positions, base), chunks, threads)


def _scan_some(channels: int, shard: OpenShard, positions: range, base: int) -> ScannedSamples:
    problems: dict[int, tuple[str, str]] = {}
    remarks: list[tuple[str, str]] = []
    sizes = np.zeros((len(positions), 2), np.int64)
    sums = np.zeros((2, channels), np.int64)
    for place, position in enumerate(positions):
        key = shard.contents.keys[position]
        try:
            image = shard.read(position)
            header = read_header(image)
            with collected() as found:
                pixels = decode_image(image, channels)
            if pixels.shape[:2] != header[:2]:
                raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, but its header says otherwise")
        except (ValueError, OSError) as error:
            problems[base + position] = (key, reason(error))
            continue
        remarks += [(key, text) for text in found]
        sizes[place] = pixels.shape[:2]
        sums += pixel_sums(pixels)
    labels = shard.contents.labels[positions.start : positions.stop]
    return ScannedSamples(base + positions.start, labels, problems, remarks, sizes, sums)
