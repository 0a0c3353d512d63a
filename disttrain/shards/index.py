"""The index of a packed data set, index.json, and the folders of data sets.

    <root>/<name>/index.json
    <root>/<name>/train-000000.tar ...   val-000000.tar ...

The index has the shape and statistics of the images, and the size and SHA-256 of every shard, so that a
damaged shard is noticed before any of its samples is used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import Field

from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards.label_format import LabelPlace, LabelReader
from disttrain.shards.origin import foreign_tar
from disttrain.shards.remote import check_url, fetch_text
from disttrain.urls import is_url, public, without_secrets
from disttrain.userdirs import user_cache

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BUILT_IN = ("digits", "mnist", "cifar10")
"""The data sets that `disttrain data prepare` can make."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARD = re.compile(rf"{_NAME.pattern}(/{_NAME.pattern})*")
_PACKED = re.compile(r"[a-z]+-\d{6,}\.tar")  # the names that `pack` gives
_INDEX_LIMIT_BYTES = 2**25
VERSION = 1
MAX_SHARD_PIXELS = 4096 * 4096
"""The limit for images in shards, because whole batches must fit into memory."""

_LEAST_BYTES = 512  # of a sample in a tar
_Count = Annotated[int, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Shard:
    """One tar."""

    file: str
    """Path relative to the folder of the index, or an address on a server (`urls.is_url`)."""
    samples: _Count
    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Split:
    """The shards of a split, in order."""

    samples: _Count
    shards: tuple[Shard, ...]
    class_counts: tuple[Annotated[int, Field(ge=0)], ...]


class IndexFile(pydantic.BaseModel):
    """The contents of index.json."""

    model_config = pydantic.ConfigDict(frozen=True)

    version: Literal[1]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    channels: Literal[1, 3]
    height: _Count
    width: _Count
    mean: tuple[_Fraction, ...]
    std: tuple[_Fraction, ...]
    splits: dict[str, Split]
    label: LabelPlace | None = None  # not a number in KEY.cls

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits, in order."""
        return [shard for split in self.splits.values() for shard in split.shards]


class Index(IndexFile):
    """A packed data set.

    `mean` and `std` are per channel, of the train split's pixels scaled to 0..1; `std` is 0 for a constant
    channel. `digest` is the SHA-256 of index.json. It covers every byte of the data set, because index.json
    has the shards' hashes. `base` is the URL of a data set on a server; `folder` is then empty.
    """

    folder: Path
    name: str
    digest: str
    base: str | None = None

    def label_reader(self) -> LabelReader:
        """Returns what reads the labels of its shards."""
        named = self.label is not None and self.label.named
        names = {name: label for label, name in enumerate(self.classes)} if named else None
        return LabelReader(self.label, classes=len(self.classes), names=names)

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
        """Size of the decoded images and labels of all splits."""
        samples = sum(split.samples for split in self.splits.values())
        return samples * (self.height * self.width * self.channels + 8)

    def first_ids(self, split: str) -> npt.NDArray[np.int64]:
        """Returns the first id of each shard, then the number of samples: int64 [shards + 1]."""
        import numpy as np  # here, because a launcher does not need it

        counts = [shard.samples for shard in self.splits[split].shards]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


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
        text = fetch_text(f"{base}/index.json", _INDEX_LIMIT_BYTES)
        return parse_index(text, name, Path(), base=base)
    folder = data_folder(name, root)
    path = folder / "index.json"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _INDEX_LIMIT_BYTES:
            remade = _again(name, folder, None)
            raise DataError(f"{path}: is not a file of up to {_INDEX_LIMIT_BYTES} bytes; {remade}")
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


def check_index(text: bytes) -> IndexFile:
    """Returns the contents of an index.json.

    Raises:
        ValueError: it is damaged, inconsistent or too large; the message is the reason.
        UnsafeError: it names a file that may not be a shard.
    """
    if len(text) > _INDEX_LIMIT_BYTES:
        raise ValueError(f"{len(text)} bytes, over the limit of {_INDEX_LIMIT_BYTES}")
    try:
        content = IndexFile.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    for shard in content.shards:
        if not _is_place(shard.file):
            raise UnsafeError(
                f"refused to open {shard.file!r}: a shard must be a file in the folder of its index "
                "or an http(s)://, s3://, gs:// or hf:// address"
            )
    if problem := _contradiction(content):
        raise ValueError(problem)
    return content


def _is_place(file: str) -> bool:
    """Returns whether this may be a shard: a path in the folder of the index, or an address on a server."""
    if not is_url(file):
        return _SHARD.fullmatch(file) is not None
    try:
        check_url(file)
    except (UnsafeError, UsageError):
        return False
    return True


def _again(name: str, folder: Path, base: str | None) -> str:
    if base:
        return "repair it on the server"
    if foreign_tar(folder):
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
    for shard in index.shards:
        if index.url(shard) is None and (problem := size_problem(index.folder / shard.file, shard)):
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
    if foreign_tar(folder):
        return f"{text}; index its tars with `disttrain data index {shlex.quote(str(folder))}`"
    wanted = close[0] if close and close[0] not in there else name
    command = make_command(wanted, folder.parent, force=folder.exists() and wanted == name)
    found = f"in {folder.parent}: {', '.join(there)}" if there else f"{folder.parent} has no data sets yet"
    return f"{text}; make it with {command} ({found})"


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "not valid JSON"
    if first["loc"] == ("version",) and first["type"] != "missing":
        return f"format version {first['input']!r}, but this disttrain reads version {VERSION}"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _contradiction(content: IndexFile) -> str | None:
    """Returns the first inconsistency between the fields of an index, or None."""
    if not len(content.mean) == len(content.std) == content.channels:
        return f"mean and std must have {content.channels} values, one per channel"
    if content.height * content.width > MAX_SHARD_PIXELS:
        size = f"{content.width}x{content.height}"
        return f"images of {size} are over the limit of {MAX_SHARD_PIXELS} pixels"
    if "train" not in content.splits:
        return "splits: train is missing"
    for name, split in content.splits.items():
        if len(split.class_counts) != len(content.classes):
            return f"splits.{name}.class_counts: {len(split.class_counts)} for {len(content.classes)} classes"
        total, counted = sum(shard.samples for shard in split.shards), sum(split.class_counts)
        if not split.samples == total >= counted:  # samples without a valid label have no class
            return f"splits.{name}: {split.samples} samples, but {total} in shards and {counted} in classes"
    for shard in content.shards:
        if shard.samples * _LEAST_BYTES > shard.bytes:
            return f"{shard.file}: {shard.bytes} bytes are too few for {shard.samples} samples"
    for field in ("file", "sha256"):
        seen = set[str]()
        for shard in content.shards:
            if getattr(shard, field) in seen:
                return f"the shard {shard.file} is listed twice (same {field})"
            seen.add(getattr(shard, field))
    return None


def mean_std(sums: npt.NDArray[np.int64], pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel, of pixels in 0..1, from exact integer sums.

    Args:
        sums: sums of the pixels; see `pixel_sums`.
        pixels: number of pixels.
    """
    pairs = list(zip(*sums.tolist(), strict=True))
    mean = tuple(total / (255 * pixels) for total, _ in pairs)
    std = tuple(math.sqrt(pixels * square - total**2) / (255 * pixels) for total, square in pairs)
    return mean, std


def size_problem(path: Path, shard: Shard) -> str | None:
    """Returns an error message if a shard does not have its size, or None."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: the shard cannot be read: {error.strerror}"
    return None if size == shard.bytes else f"{path}: {size} bytes, but the index says {shard.bytes}"


def index_bytes(content: IndexFile) -> bytes:
    """Returns the contents of the file index.json."""
    return (json.dumps(content.model_dump(mode="json", exclude_none=True), indent=1) + "\n").encode()
