"""The index of a packed data set, index.json, and the folders of data sets.

    <root>/<name>/index.json
    <root>/<name>/train-000000.tar ...   val-000000.tar ...

The index has the shape and statistics of the images, and the size and SHA-256 of every shard, so that a
damaged shard is noticed before any of its samples is used. Images of one size make an index of version 1.
Images of several sizes make one of version 2, which has their range in place of a height and a width.
Multi-label data make one of version 3, whatever the sizes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards.index_file import INDEX_LIMIT_BYTES, IndexFile, Shard, check_index
from disttrain.shards.label_format import LabelReader, Labels
from disttrain.shards.origin import existing_tar
from disttrain.shards.remote import fetch_text
from disttrain.urls import is_url, public, without_secrets
from disttrain.userdirs import user_cache

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BUILT_IN = ("digits", "mnist", "cifar10")
"""The data sets that `disttrain data prepare` can make."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKED = re.compile(r"[a-z]+-\d{6,}\.tar")  # the names that `pack` gives


class Index(IndexFile):
    """A packed data set.

    `mean` and `std` are per channel, of the train split's pixels scaled to 0..1; `std` is 0 for a constant
    channel. `digest` is the SHA-256 of index.json. It covers every byte of the data set, because index.json
    has the shards' hashes. `base` is the URL of a data set on a server; `folder` is then empty.
    `image_size` is the side of the squares that the images are cropped to, or None to take them as they are;
    see `crops`. `crop_pct` is the share of the shorter side that the crop of an evaluation has.
    `decoded_side` is the shorter side to which larger images are reduced before a random crop, or None.
    """

    folder: Path
    name: str
    digest: str
    base: str | None = None
    image_size: int | None = None
    crop_pct: float = 0.875
    decoded_side: int | None = None

    @property
    def height(self) -> int:
        """Height of the images in a batch, in pixels."""
        return self.image_size or self._one(self.stored_height)

    @property
    def width(self) -> int:
        """Width of the images in a batch, in pixels."""
        return self.image_size or self._one(self.stored_width)

    def _one(self, side: int | None) -> int:
        if side is None:
            raise UsageError(
                f"{self.name}: its images have several sizes, {self.sizes_text()}; set data.image_size to "
                "the side of the squares that they are cropped to, for example data.image_size=224"
            )
        return side

    def sizes_text(self) -> str:
        """Returns the size of the stored images, or its range: width x height in pixels."""
        if self.stored_height is not None:
            return f"{self.stored_width}x{self.stored_height}"
        found = [split.sizes for split in self.splits.values() if split.sizes]
        ends = (
            f"{end(sizes.width[i] for sizes in found)}x{end(sizes.height[i] for sizes in found)}"
            for i, end in enumerate((min, max))
        )
        return " to ".join(ends)

    def cropped(self, image_size: int | None, crop_pct: float, decoded_side: int | None = None) -> Index:
        """Returns the data set with images that are cropped to squares, unless `image_size` is None."""
        update = {"image_size": image_size, "crop_pct": crop_pct, "decoded_side": decoded_side}
        return self.model_copy(update=update)

    def label_reader(self) -> LabelReader:
        """Returns what reads the labels of its shards."""
        named = self.label is not None and self.label.named
        names = {name: label for label, name in enumerate(self.classes)} if named else None
        classes = len(self.classes)
        return LabelReader(self.label, classes=classes, names=names, multi_label=self.multi_label)

    def empty_labels(self, samples: int) -> Labels:
        """Returns an array for the labels of so many samples, without a label; see `Labels`."""
        import numpy as np

        if self.multi_label:
            return np.zeros((samples, len(self.classes)), np.uint8)
        return np.full(samples, -1, np.int64)

    def url(self, shard: Shard) -> str | None:
        """Returns the URL of a shard on a server, or None for a local one."""
        if is_url(shard.file):
            return shard.file
        return f"{self.base}/{shard.file}" if self.base else None

    def place(self, shard: Shard) -> str:
        """Returns the path or the URL of a shard, for messages."""
        return without_secrets(self.url(shard) or str(self.folder / shard.file))

    @property
    def decoded_bytes(self) -> int:
        """Size of the decoded images and labels that a node can keep.

        With `decoded_side`, those of the train split, if all have an aspect ratio of 4:3.
        """
        if self.decoded_side is not None:
            return self.splits["train"].samples * self.decoded_side**2 * 4 // 3 * self.channels
        samples = sum(split.samples for split in self.splits.values())
        label_bytes = len(self.classes) if self.multi_label else 8
        return samples * (self.height * self.width * self.channels + label_bytes)

    def first_ids(self, split: str) -> npt.NDArray[np.int64]:
        """Returns the first id of each shard, then the number of samples: int64 [shards + 1]."""
        import numpy as np  # here, because a launcher does not need it

        counts = [shard.samples for shard in self.splits[split].shards]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def check_decoded_side(decoded_side: int | None, image_size: int | None, resized_crop: float | None) -> None:
    """Raises UsageError if `data.decoded_side` is set without the keys that it needs."""
    if decoded_side is not None and (image_size is None or resized_crop is None):
        raise UsageError(
            f"data.decoded_side = {decoded_side} needs data.image_size and augment.resized_crop; set "
            "them, for example data.image_size=224 augment.resized_crop=0.08"
        )


def data_root(root: str | None) -> Path:
    """Returns the folder of the packed data sets.

    Args:
        root: the --root option or data.root; None means $DISTTRAIN_DATA, or else the user's cache folder.

    Raises:
        UsageError: the root is the URL of a server.
    """
    if (server := server_root(root)) is not None:
        raise UsageError(f"{server}: cannot write to a server; give a folder with --root, then upload it")
    if chosen := root or os.environ.get("DISTTRAIN_DATA"):
        return Path(chosen).expanduser().absolute()
    return user_cache() / "data"


def server_root(root: str | None) -> str | None:
    """Returns the root if it is the URL of a server, without its secrets, else None."""
    chosen = public(root or os.environ.get("DISTTRAIN_DATA") or "")
    return chosen.rstrip("/") if "://" in chosen or chosen.startswith("pipe:") else None


def data_folder(name: str, root: str | None) -> Path:
    """Returns the folder of a data set, which may not exist yet.

    Raises:
        UsageError: the name is invalid.
    """
    _check_name(name)
    return data_root(root) / name


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid name of a data set; use letters, digits, '.', '_' and '-', "
            "and give its folder with --root"
        )


def make_command(name: str, root: Path, *, force: bool = False) -> str:
    """Returns the command that makes a data set under a root; `force` replaces an existing one."""
    is_default = server_root(None) is None and root == data_root(None)
    place = "" if is_default else f" --root {shlex.quote(str(root))}"
    if name in BUILT_IN:
        return f"`disttrain data prepare {name}{place}`"
    return f"`disttrain data pack DIR --name {name}{place}{' --force' if force else ''}`"


def load_index(name: str, root: str | None, *, strict: bool = True) -> Index:
    """Reads the index of a data set, and checks that its shards exist and have the right size.

    Args:
        name: a folder under the root.
        root: see `data_root`; or the URL of a server.
        strict: False accepts missing shards, extra shards and shards of another size, for callers that
            report them: `find_bad_samples` and `verify`.

    Raises:
        DataError: the data set is missing or damaged; the message names the file and the remedy.
        UnsafeError: the index names a file that may not be a shard.
        UsageError: the name is invalid.
    """
    if (server := server_root(root)) is not None:
        _check_name(name)
        base = f"{server}/{name}"
        text = fetch_text(f"{base}/index.json", INDEX_LIMIT_BYTES)
        return parse_index(text, name, Path(), base=base)
    folder = data_folder(name, root)
    path = folder / "index.json"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > INDEX_LIMIT_BYTES:
            remade = _again(name, folder, None)
            raise DataError(f"{path}: is not a file of up to {INDEX_LIMIT_BYTES} bytes; {remade}")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing(name, folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    index = parse_index(text, name, folder)
    if strict:
        _check_files(index)
    return index


def parse_index(text: bytes, name: str, folder: Path, *, base: str | None = None) -> Index:
    """Parses and checks an index.json.

    Args:
        text: contents of the file.
        name: name of the data set.
        folder: folder of the data set.
        base: URL of the data set if it is on a server.

    Raises:
        DataError: the index is damaged or inconsistent.
        UnsafeError: the index names a file that may not be a shard.
    """
    place = f"{base or folder}/index.json"
    try:
        content = check_index(text)
    except ValueError as error:
        raise DataError(f"{place}: {error}; {_again(name, folder, base)}") from None
    except UnsafeError as error:
        raise UnsafeError(f"{place}: {error}; {_again(name, folder, base)}") from None
    digest = hashlib.sha256(text).hexdigest()
    return Index.model_construct(**dict(content), folder=folder, name=name, digest=digest, base=base)


def _again(name: str, folder: Path, base: str | None) -> str:
    if base:
        return "repair it on the server"
    if existing_tar(folder):
        return _get_again(folder)
    return f"make the data set again with {make_command(name, folder.parent, force=True)}"


def _get_again(folder: Path) -> str:
    command = f"`disttrain data index {shlex.quote(str(folder))} --force`"
    return f"get the file again, then run {command} with the options of the first time"


def remedy(index: Index) -> str:
    """Returns the remedy for a damaged data set: it depends on who wrote the tars."""
    # The names tell too: a missing tar cannot be asked who wrote it.
    if index.base is None and not all(_PACKED.fullmatch(shard.file) for shard in index.shards):
        return _get_again(index.folder)
    return _again(index.name, index.folder, index.base)


def _check_files(index: Index) -> None:
    """Raises DataError if a local shard is missing, of another size, or not in the index."""
    folder = str(index.folder)  # to make 10,000 Paths takes as long as to ask for 10,000 sizes
    for shard in index.shards:
        if index.url(shard) is None and (problem := size_problem(f"{folder}/{shard.file}", shard)):
            raise DataError(f"{problem}; {remedy(index)}")
    for path in extra_shards(index):
        raise DataError(f"{path}: this shard is not in index.json; remove it, or {remedy(index)}")


def extra_shards(index: Index) -> list[Path]:
    """Returns the tars in the folder of a data set that are not in its index, sorted."""
    named = {shard.file for shard in index.shards}
    return [] if index.base else sorted(p for p in index.folder.glob("*.tar") if p.name not in named)


def _missing(name: str, folder: Path) -> str:
    there = sorted(path.parent.name for path in folder.parent.glob("[!.]*/index.json"))
    close = difflib.get_close_matches(name, [*there, *BUILT_IN], 1)
    text = f"{folder / 'index.json'}: there is no data set {name!r}"
    if close and close[0] != name:
        text += f"; did you mean {close[0]}?"
    if existing_tar(folder):
        return f"{text}; index its tars with `disttrain data index {shlex.quote(str(folder))}`"
    wanted = close[0] if close and close[0] not in there else name
    command = make_command(wanted, folder.parent, force=folder.exists() and wanted == name)
    found = f"in {folder.parent}: {', '.join(there)}" if there else f"{folder.parent} has no data sets yet"
    return f"{text}; make it with {command} ({found})"


def size_problem(path: Path | str, shard: Shard) -> str | None:
    """Returns an error message if a shard does not have its size, or None."""
    try:
        size = os.stat(path).st_size  # noqa: PTH116  also takes a str, which is faster to make
    except OSError as error:
        return f"{path}: the shard cannot be read: {error.strerror}"
    return None if size == shard.bytes else f"{path}: {size} bytes, but the index says {shard.bytes}"
