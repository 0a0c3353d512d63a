"""Packs image files as a data set: in one folder per class, or with a table of labels."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from PIL import ExifTags, Image

from disttrain.errors import DataError, UsageError, reason
from disttrain.parallel import ordered_map
from disttrain.shards.colors import GRAY_MODES, RULES, is_opaque, stored
from disttrain.shards.foldertree import Files, Listing, list_tree, shown
from disttrain.shards.images import (
    Pixels,
    as_picture,
    decode_image,
    encode_image,
    open_image,
)
from disttrain.shards.index import Index, data_folder
from disttrain.shards.label_format import Label, classes_of
from disttrain.shards.label_table import read_table
from disttrain.shards.pack import Options, Source, pack
from disttrain.shards.publish import check_replaceable, instead_of
from disttrain.shards.remarks import pillow_warnings
from disttrain.shards.writer import BadSampleError, Sample

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: JPEG files of some phones
_READERS = 8  # threads that read headers; more than cores, because they wait for network disks


class HowToRead(TypedDict, total=False):
    """How a folder of images is read.

    Attributes:
        size: side in pixels. Images are resized so that the shorter side has this length, and cropped to the
            center. JPEG files become JPEG of quality 95, others PNG. None: images keep their size.
        val_fraction: share of each class for the val split, if the folder has no val split.
        seed: seed of the order and of the split.
        follow_links: take links to files and folders outside the folder.
        labels: a table of the files and their labels; see `read_table`. None: folders are the classes.
        multi_label: a file of the table may have any number of labels, instead of one.
    """

    size: int | None
    val_fraction: float | None
    seed: int
    follow_links: bool
    labels: Path | None
    multi_label: bool


def pack_folder(
    folder: Path, name: str, root: str | None, options: Options, **how: Unpack[HowToRead]
) -> Index:
    """Packs a folder of images: DIR/{train,val}/<class>/<files>, or DIR/<class>/<files> to be split.

    The classes are the sorted folder names, unless there is a table of labels. The images are shuffled, in an
    order that depends only on the seed and the names. PNG, JPEG and WebP files of upright opaque 8-bit gray
    or RGB pixels keep their bytes; all other images become PNG. If the images have several sizes, all PNG,
    JPEG and WebP files keep their bytes. The data set is gray if every image is.

    Args:
        folder: the images. What is left out is told by its kind and number.
        name: name of the new data set.
        root: see `data_root`.
        options: see `pack`.
        how: see `HowToRead`.

    Raises:
        DataError: the folder does not have the expected layout, an image is broken, or the sizes differ.
        UsageError: an argument is out of range or does not match the folder.
        StorageError: a write failed.
    """
    target = data_folder(name, root)
    if target.exists() and not options.force:
        raise DataError(f"{target}: already exists; {instead_of(target)}")
    check_replaceable(target.resolve())
    size, val_fraction, labels = how.get("size"), how.get("val_fraction"), how.get("labels")
    multi_label, follow_links = how.get("multi_label", False), how.get("follow_links", False)
    if size is not None and size < 1:
        raise UsageError(f"--size {size}: must be at least 1")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: must be between 0 and 1")
    if labels is not None:
        listing = read_table(labels, folder, val_fraction, multi_label, follow_links)
    elif multi_label:
        raise UsageError("--multi-label: a class folder is one label; add a table of labels, --labels FILE")
    else:
        listing = list_tree(folder, val_fraction, follow_links)
    tree = scan_tree(listing, val_fraction, how.get("seed", 0), options.say)
    channels, in_train = tree.channels, tree.in_train()
    index = pack(name, root, tree.sources(size), tree.classes, channels, options, in_train=in_train)
    for note in tree.notes:  # once more, below what was said meanwhile
        options.say(note)
    return index


class _Picture(NamedTuple):
    """An image file, from its header."""

    file: str
    label: Label
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

    def in_train(self) -> set[str]:
        """Returns the names of the classes in the train split."""
        found = (classes_of(picture.label) for picture in self.splits["train"])
        return {self.classes[label] for label in set[int]().union(*found)}

    def sources(self, side: int | None = None) -> dict[str, Source]:
        """Returns the splits for `pack`, resized to squares of `side` pixels unless that is None."""
        keep = side is None and len(self.sizes) > 1
        return {
            split: _Pictures(pictures, self.channels, side, keep) for split, pictures in self.splits.items()
        }


def scan_tree(listing: Listing, val_fraction: float | None, seed: int, say: Callable[[str], None]) -> Tree:
    """Reads the headers of the listed images, and chooses the split and the order."""
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
    """Moves the same share of every class to val, at least one image and never all.

    In multi-label data, it moves this share of all images.
    """
    listing: dict[str, Files] = {"train": [], "val": []}
    for label, members in itertools.groupby(files, key=lambda item: isinstance(item[1], int) and item[1]):
        of_class = list(members)
        if len(of_class) < 2:
            of = f"of {classes[label]!r}" if isinstance(of_class[0][1], int) else "of all"
            raise DataError(
                f"{shown(of_class[0][0])}: the only image {of}, but a split needs two; add another"
            )
        count = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        chosen = set(rng.permutation(len(of_class))[:count].tolist())
        for i, item in enumerate(of_class):
            listing["val" if i in chosen else "train"].append(item)
    return listing


def _read_header(item: tuple[str, Label]) -> _Picture:
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
