"""Writes one shard, a plain WebDataset tar, and returns a record of its contents.

A tar has `<key>.png|jpg|webp` and `<key>.cls`, the label in decimal, for each sample. In multi-label data,
`<key>.json` has the labels in its field `labels`, in place of `<key>.cls`. The key is the number of the
sample in its split. The same samples give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from disttrain.errors import DataError, reason
from disttrain.files import sha256
from disttrain.shards.images import Pixels, decode_image, pixel_sums
from disttrain.shards.label_format import Label, LabelPlace, LabelReader, classes_of
from disttrain.shards.origin import OWNER
from disttrain.shards.remarks import Remarks, add, collected, lines, pillow_warnings
from disttrain.shards.tar import scan

BLOCK = 512  # bytes of a tar block
SEVERAL = LabelPlace("json", "labels")
"""Where the labels of multi-label data are."""


class Sample(NamedTuple):
    """One encoded image with its label."""

    image: bytes
    """The image file."""
    extension: str
    """The format: png, jpg or webp."""
    label: Label
    """Position in the list of classes, or several of them."""
    origin: str = ""
    """Name of the sample in messages, such as its file; not stored."""


class WrittenShard(msgspec.Struct, frozen=True):
    """A record of the contents of a shard."""

    bytes: int
    sha256: str
    class_counts: list[int]
    sizes: list[tuple[int, int]]
    """Height and width of each image, upright."""
    sums: list[list[int]]
    """Sums of the pixels; see `pixel_sums`."""
    problems: list[tuple[str, str]] = []
    """Origin of each bad sample, which is not in the shard, and why it is bad."""
    remarks: Remarks = {}
    """Remarks on images in the shard."""
    multi_label: bool = False

    @property
    def samples(self) -> int:
        """The number of samples in the shard."""
        return len(self.sizes)


class BadSampleError(DataError):
    """A sample cannot be packed."""

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(f"{origin}: {problem}; repair or remove it")
        self.origin, self.problem = origin, problem


def member_bytes(size: int) -> int:
    """Returns the size in a tar, in bytes, of an image of `size` bytes and its label."""
    return BLOCK + -(-size // BLOCK) * BLOCK + 2 * BLOCK


def write_shard(
    path: Path,
    load: Callable[[int], Sample],
    numbers: Iterable[int],
    classes: int,
    channels: int,
    on_sample: Callable[[int], object],
) -> WrittenShard:
    """Writes a shard, and checks that every image is intact.

    Bad samples are left out and recorded, so that a caller can report all of them at once.

    Args:
        path: the tar.
        load: returns the sample of a number, or raises BadSampleError.
        numbers: numbers of the samples in their split, at least one.
        classes: number of classes; labels must be below.
        channels: number of channels to decode the images to, 1 or 3.
        on_sample: called after each sample with the number of samples done.

    Raises:
        OSError: a write failed.
    """
    from webdataset.writer import TarWriter

    counts = [0] * classes
    sums = np.zeros((2, channels), np.int64)
    sizes: list[tuple[int, int]] = []
    problems: list[tuple[str, str]] = []
    remarks: Remarks = {}
    names: list[str] = []
    multi_label = False
    with path.open("wb") as file, pillow_warnings():
        tar = TarWriter(file, encoder=False, mtime=0, mode=0o444, user=OWNER, group=OWNER, compress=False)
        with tar:
            for count, number in enumerate(numbers, 1):
                try:
                    sample, name, pixels, remarked = _loaded(path, load, number, classes, channels)
                except BadSampleError as error:
                    problems.append((error.origin, error.problem))
                    on_sample(count)
                    continue
                sizes.append((pixels.shape[0], pixels.shape[1]))
                for text in remarked:
                    add(remarks, text, name)
                sums += pixel_sums(pixels)
                for label in classes_of(sample.label):
                    counts[label] += 1
                multi_label = isinstance(sample.label, tuple)
                member, content = _label_member(sample.label)
                tar.write({"__key__": f"{number:08d}", sample.extension: sample.image, member: content})
                names.append(name)
                on_sample(count)
        file.flush()
        os.fsync(file.fileno())
    if names:
        _read_back(path, names, classes, multi_label=multi_label)
    size, digest = path.stat().st_size, sha256(path)
    return WrittenShard(size, digest, counts, sizes, sums.tolist(), problems, remarks, multi_label)


def tell(records: Iterable[WrittenShard], say: Callable[[str], object]) -> None:
    """Says each kind of remark on the images of some shards once."""
    remarks: Remarks = {}
    for record in records:
        for text, (number, first) in record.remarks.items():
            add(remarks, text, first, number)
    for line in lines(remarks):
        say(line)


def _loaded(
    path: Path, load: Callable[[int], Sample], number: int, classes: int, channels: int
) -> tuple[Sample, str, Pixels, list[str]]:
    """Returns a sample, its name for messages, its pixels, uint8 [H, W, C], and the remarks on its image."""
    with collected() as remarked:
        sample = load(number)
        name = sample.origin or f"{path.stem.partition('-')[0]} sample {number}"
        return sample, name, _decoded(sample, name, classes, channels), remarked


def _label_member(label: Label) -> tuple[str, bytes]:
    """Returns the extension and the content of the member with a label."""
    if isinstance(label, tuple):
        return SEVERAL.member, json.dumps({SEVERAL.field: label}).encode()
    return "cls", str(label).encode()


def _decoded(sample: Sample, name: str, classes: int, channels: int) -> Pixels:
    """Returns the pixels of a sample, uint8 [H, W, C].

    Raises:
        BadSampleError: the label is out of range, or the image is broken.
    """
    for label in classes_of(sample.label):
        if not 0 <= label < classes:
            raise BadSampleError(name, f"label {label} is not in 0 to {classes - 1}")
    try:
        return decode_image(sample.image, channels)
    except ValueError as error:
        raise BadSampleError(name, reason(error)) from None


def _read_back(path: Path, names: Sequence[str], classes: int, *, multi_label: bool) -> None:
    """Raises BadSampleError if the reader would refuse a sample, so that it is not published."""
    reader = LabelReader(SEVERAL if multi_label else None, classes=classes, multi_label=multi_label)
    with path.open("rb") as file:
        for position, problem in scan(file, reader).problems.items():
            raise BadSampleError(names[position], problem)
