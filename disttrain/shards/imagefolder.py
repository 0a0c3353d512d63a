"""Packs image files, in one folder per class, as a data set."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from disttrain.errors import DataError, UsageError, reason
from disttrain.parallel import ordered_map
from disttrain.shards.colors import GRAY_MODES, RULES, is_opaque, stored
from disttrain.shards.foldertree import Files, list_tree, shown
from disttrain.shards.images import (
    Pixels,
    as_picture,
    decode_image,
    encode_image,
    open_image,
)
from disttrain.shards.index import Index, data_folder
from disttrain.shards.pack import Options, Source, check_replaceable, instead_of, pack
from disttrain.shards.remarks import pillow_warnings
from disttrain.shards.writer import BadSampleError, Sample

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: JPEG files of some phones
_READERS = 8  # threads that read headers; more than cores, because they wait for network disks


def pack_folder(
    folder: Path,
    name: str,
    root: str | None,
    options: Options,
    *,
    size: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    follow_links: bool = False,
) -> Index:
    """Packs a folder of images: DIR/{train,val}/<class>/<files>, or DIR/<class>/<files> to be split.

    The classes are the sorted folder names. The images are shuffled, in an order that depends only on the
    seed and the names. PNG, JPEG and WebP files of upright opaque 8-bit gray or RGB pixels keep their bytes;
    all other images become PNG. If the images have several sizes, all PNG, JPEG and WebP files keep their
    bytes. The data set is gray if every image is.

    Args:
        folder: the images. What is left out is told by its kind and number.
        name: name of the new data set.
        root: see `data_root`.
        options: see `pack`.
        size: side in pixels. Images are resized so that the shorter side has this length, and cropped to the
            center. JPEG files become JPEG of quality 95, others PNG. None: images keep their size.
        val_fraction: share of each class for the val split, if the folder has no val split.
        seed: seed of the order and of the split.
        follow_links: take links to files and folders outside the folder.

    Raises:
        DataError: the folder does not have the expected layout, an image is broken, or the sizes differ.
        UsageError: an argument is out of range or does not match the folder.
        StorageError: a write failed.
    """
    target = data_folder(name, root)
    if target.exists() and not options.force:
        raise DataError(f"{target}: already exists; {instead_of(target)}")
    check_replaceable(target.resolve())
    if size is not None and size < 1:
        raise UsageError(f"--size {size}: must be at least 1")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: must be between 0 and 1")
    tree = scan_tree(folder, val_fraction, seed, options.say, follow_links=follow_links)
    index = pack(name, root, tree.sources(size), tree.classes, tree.channels, options)
    for note in tree.notes:  # once more, below what was said meanwhile
        options.say(note)
    return index


class _Picture(NamedTuple):
    """An image file, from its header."""

    file: str
    label: int
    extension: str
    """Its format if that is allowed in a shard, else empty."""
    plain: bool
    """Upright, 8 bits, gray or RGB, opaque, so that every decoder returns the same pixels."""
    gray: bool
    size: tuple[int, int]
    """Width and height after applying the EXIF orientation."""
    bytes: int
    mtime_ns: int
    problem: str = ""
    """Why the header cannot be read; the other fields but the file and the label are then meaningless."""


class Tree(NamedTuple):
    """The contents of a folder of images."""

    classes: tuple[str, ...]
    splits: dict[str, list[_Picture]]
    """The images of each split, in the order of packing."""
    sizes: dict[tuple[int, int], str]
    """Each width and height, with the first file of that size."""
    channels: Literal[1, 3]
    notes: list[str]
    """Which folder is which split, and what was left out; see `Listing`."""

    def sources(self, side: int | None = None) -> dict[str, Source]:
        """Returns the splits for `pack`, resized to squares of `side` pixels unless that is None."""
        keep = side is None and len(self.sizes) > 1
        return {
            split: _Pictures(pictures, self.channels, side, keep) for split, pictures in self.splits.items()
        }


def scan_tree(
    folder: Path,
    val_fraction: float | None,
    seed: int,
    say: Callable[[str], None],
    *,
    follow_links: bool = False,
) -> Tree:
    """Lists a folder of images, reads their headers, and chooses the split and the order."""
    listing = list_tree(folder, val_fraction, follow_links)
    for note in listing.notes:
        say(note)
    files, classes = listing.files, listing.classes
    rng = np.random.default_rng(seed)
    if val_fraction is not None:
        files = _split_off(files["train"], classes, val_fraction, rng)
    splits: dict[str, list[_Picture]] = {}
    sizes: dict[tuple[int, int], str] = {}
    gray = True
    for split, images in files.items():
        with pillow_warnings():  # they come again when the image is decoded
            pictures = list(ordered_map(_read_header, images, _READERS, chunk=64))
        for picture in pictures:
            if not picture.problem:
                sizes.setdefault(picture.size, shown(picture.file))
                gray = gray and picture.gray
        splits[split] = [pictures[i] for i in rng.permutation(len(pictures))]
    return Tree(classes, splits, sizes, 1 if gray else 3, listing.notes)


def _split_off(
    files: Files, classes: Sequence[str], fraction: float, rng: np.random.Generator
) -> dict[str, Files]:
    """Moves the same share of every class to val, at least one image and never all."""
    listing: dict[str, Files] = {"train": [], "val": []}
    for label, members in itertools.groupby(files, key=lambda item: item[1]):
        of_class = list(members)
        if len(of_class) < 2:
            raise DataError(
                f"{shown(of_class[0][0])}: the only image of {classes[label]!r}, but a split needs two; "
                "add another"
            )
        count = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        chosen = set(rng.permutation(len(of_class))[:count].tolist())
        for i, item in enumerate(of_class):
            listing["val" if i in chosen else "train"].append(item)
    return listing


def _read_header(item: tuple[str, int]) -> _Picture:
    file, label = item
    try:
        with Path(file).open("rb") as stream, open_image(stream) as picture:
            status = os.fstat(stream.fileno())
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            plain = picture.mode in ("L", "RGB") and is_opaque(picture) and stored(picture).bits <= 8
            size, mtime_ns = status.st_size, status.st_mtime_ns
    except Exception as error:  # Pillow raises all kinds of errors
        return _Picture(file, label, "", False, False, (0, 0), 0, _mtime_ns(file), reason(error))
    extension = _EXTENSIONS.get(picture.format or "", "")
    turned = orientation in range(5, 9)
    return _Picture(
        file,
        label,
        extension,
        plain=plain and bool(extension) and orientation not in range(2, 9),
        gray=picture.mode in GRAY_MODES,
        size=(picture.height, picture.width) if turned else picture.size,
        bytes=size,
        mtime_ns=mtime_ns,
    )


def _mtime_ns(file: str) -> int:
    with contextlib.suppress(OSError):
        return Path(file).stat().st_mtime_ns
    return 0


@dataclass(frozen=True)
class _Pictures:
    """The image files of a split, in the order of packing.

    Attributes:
        pictures: the files.
        channels: channels of the data set.
        side: side in pixels to resize the images to; None keeps their size.
        keep: whether every file in a format of shards keeps its bytes.
    """

    pictures: Sequence[_Picture]
    channels: int
    side: int | None
    keep: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, number: int) -> Sample:
        """Reads a file, and keeps its bytes if the image is plain and has the right size.

        Raises:
            BadSampleError: it is broken.
        """
        picture = self.pictures[number]
        file = shown(picture.file)
        if picture.problem:
            raise BadSampleError(file, picture.problem)
        try:
            image = Path(picture.file).read_bytes()
            kept = Sample(image, picture.extension, picture.label, file)
            if (picture.plain or (self.keep and picture.extension)) and self.side is None:
                return kept
            pixels = decode_image(image, self.channels)
        except (OSError, ValueError) as error:
            raise BadSampleError(file, reason(error)) from None
        if self.side is not None:
            if picture.plain and pixels.shape[:2] == (self.side, self.side):
                return kept
            pixels = fitted(pixels, self.side, self.side)
            if picture.extension == "jpg":
                return kept._replace(image=encode_image(pixels, "JPEG"))
        return kept._replace(image=encode_image(pixels, "PNG"), extension="png")

    def size(self, number: int) -> int:
        """Returns the bytes of the file, or of the pixels if it is resized."""
        return self.pictures[number].bytes if self.side is None else self.side**2 * self.channels

    def sample_fingerprint(self, number: int) -> str:
        """Returns a text that identifies the file and how it is packed."""
        return f"{self.pictures[number]} {self.side} {self.keep} {RULES}"


def fitted(pixels: Pixels, height: int, width: int) -> Pixels:
    """Returns an image, uint8 [H, W, C], in another size: resized to cover it, then cropped to the center.

    An image of eight times the size or more is first reduced by a whole factor (Pillow's reducing_gap), which
    takes 0.3 to 0.6 of the time. It changes the values 0..255 by 0.3 on average; a Lanczos filter instead of
    the bicubic one changes them by 1.
    """
    picture = as_picture(pixels)
    scale = max(width / picture.width, height / picture.height)
    left, top = max(0, picture.width - width / scale) / 2, max(0, picture.height - height / scale) / 2
    box = (left, top, picture.width - left, picture.height - top)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=4.0)
    return np.asarray(picture).reshape(height, width, -1)
