"""Writes one shard: a plain WebDataset tar, and a record of what went into it.

A tar holds `<key>.png|jpg|webp` and `<key>.cls` (the label in decimal) for each sample; the key is the
sample's running number in its split. The same samples give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from disttrain.errors import DataError
from disttrain.files import sha256
from disttrain.shards.images import decode_image, pixel_sums
from disttrain.shards.index import MAX_SHARD_PIXELS

BLOCK = 512  # of a tar, in bytes


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


class Record(msgspec.Struct, frozen=True):
    """What went into a shard."""

    bytes: int
    sha256: str
    class_counts: list[int]
    shape: tuple[int, int]
    """Height and width of its images."""
    first: str
    """Origin of its first sample."""
    sums: list[list[int]]
    """Of the pixels, as `pixel_sums` has them."""


def member_bytes(size: int) -> int:
    """Returns the bytes that an image of `size` bytes and its label take in a tar."""
    return BLOCK + -(-size // BLOCK) * BLOCK + 2 * BLOCK


def write_shard(
    path: Path,
    samples: Iterable[tuple[int, Sample]],
    classes: int,
    channels: int,
    on_sample: Callable[[int], object],
) -> Record:
    """Writes a shard and checks every sample on the way: it must be sound and have the shape of the first.

    Args:
        path: the tar.
        samples: at least one, each with its running number in its split.
        classes: labels are below.
        channels: 1 or 3, to which the images are converted when they are decoded.
        on_sample: told the number of samples written, after each.

    Raises:
        DataError: an image is broken or of another shape, or a label is none of the classes.
        OSError: a write failed.
    """
    from webdataset.writer import TarWriter

    counts = [0] * classes
    sums = np.zeros((2, channels), np.int64)
    shape, origin = (0, 0), ""
    with path.open("wb") as file:
        tar = TarWriter(
            file, encoder=False, mtime=0, mode=0o444, user="disttrain", group="disttrain", compress=False
        )
        with tar:
            for count, (number, sample) in enumerate(samples, 1):
                name = sample.origin or f"{path.stem.partition('-')[0]} sample {number}"
                if not 0 <= sample.label < classes:
                    raise DataError(f"{name}: label {sample.label}, but {classes} classes")
                try:
                    pixels = decode_image(sample.image, channels, MAX_SHARD_PIXELS)
                except ValueError as error:
                    raise DataError(f"{name}: {error}; repair or remove it") from None
                found = (pixels.shape[0], pixels.shape[1])
                if not origin:
                    shape, origin = found, name
                check_shape(name, found, origin, shape)
                sums += pixel_sums(pixels)
                counts[sample.label] += 1
                label = str(sample.label).encode()
                tar.write({"__key__": f"{number:08d}", sample.extension: sample.image, "cls": label})
                on_sample(count)
        file.flush()
        os.fsync(file.fileno())
    return Record(path.stat().st_size, sha256(path), counts, shape, origin, sums.tolist())


def check_shape(name: str, shape: tuple[int, int], first: str, expected: tuple[int, int]) -> None:
    """Raises DataError if an image, or the first one of a shard, has another shape than the first of all."""
    if shape != expected:
        raise DataError(
            f"{name} is {shape[1]}x{shape[0]} but {first} is {expected[1]}x{expected[0]}; all images must "
            "have one size"
        )
