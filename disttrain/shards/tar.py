"""Finds the samples of a WebDataset tar, and refuses what does not belong into one.

A strict reader of headers: nothing is unpacked, and nothing but headers and labels is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from disttrain.errors import UnsafeError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
"""The members that are images."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_MEMBER_BYTES = 2**28
_MAX_NAME_BYTES = 2**16  # of a pax or GNU header
_MAX_LABEL_BYTES = 16
_MAX_LABEL = 10**6
_MAX_IMAGE_BYTES = 2**25
_FOLDER = b"5"
_PAX, _PAX_GLOBAL, _LONG_NAME = b"x", b"g", b"L"
_PICKLED = frozenset(["pyd", "pkl", "pickle", "pth", "pt", "pyc", "joblib", "dill"])
_COMPRESSED = frozenset(["gz", "xz", "bz2", "lzma", "zst", "lz4", "zip", "7z"])
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe",
    b"S": "a sparse file", b"K": "a link",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The samples of a shard, in its order.

    Attributes:
        keys: the common name of a sample's members, without extension.
        extensions: of the image, one of `IMAGE_EXTENSIONS`; empty if the sample has none.
        offsets: where the image begins in the shard, in bytes: int64 [n].
        sizes: of the image in bytes: int64 [n].
        labels: int64 [n]; -1 if unknown.
        problems: position -> why that sample cannot be used.
    """

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    problems: dict[int, str]


def scan(file: BinaryIO, classes: int | None) -> Contents:
    """Reads the headers and labels of a shard from its beginning to its end.

    Args:
        file: an uncompressed tar, seekable.
        classes: labels must be below; None accepts any.

    Raises:
        ValueError: the tar is damaged or incomplete; the message says what and near which member.
        UnsafeError: a member is of a kind that does not belong into a shard.
    """
    samples: list[_Sample] = []
    seen: set[str] = set()
    for name, offset, size, head in _members(file.fileno()):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:  # a hidden file, as some systems add
            continue
        key, extension, problem = f"{folder}{slash}{stem}", extension.lower(), ""
        if not samples or samples[-1].key != key:
            if key in seen:
                problem = f"key {key} is there twice: interleaved or duplicated members"
            samples.append(_Sample(key, problem=problem))
            seen.add(key)
        sample = samples[-1]
        if extension in sample.members:
            problem = f"two members {name}"
        elif extension in IMAGE_EXTENSIONS:
            if sample.extension:
                problem = "two images"
            elif size == 0:
                problem = "the image is empty"
            elif size > _MAX_IMAGE_BYTES:
                problem = f"an image file of {size} bytes, more than the limit of {_MAX_IMAGE_BYTES}"
            sample.extension, sample.offset, sample.size = extension, offset, size
        elif extension == "cls":
            sample.label, problem = _label(head[:size].strip(), size, classes)
        sample.members.add(extension)
        sample.problem = sample.problem or problem
    if not samples:
        raise ValueError("holds no samples")
    return Contents(
        tuple(sample.key for sample in samples),
        tuple(sample.extension for sample in samples),
        np.array([sample.offset for sample in samples], np.int64),
        np.array([sample.size for sample in samples], np.int64),
        np.array([sample.label for sample in samples], np.int64),
        {place: problem for place, sample in enumerate(samples) if (problem := sample.unusable())},
    )


@dataclass
class _Sample:
    key: str
    extension: str = ""
    offset: int = 0
    size: int = 0
    label: int = -1
    problem: str = ""
    members: set[str] = field(default_factory=set)

    def unusable(self) -> str:
        """Returns why, once all of its members have been seen, or nothing."""
        if self.problem or not self.extension:
            return self.problem or "no image"
        return "" if "cls" in self.members else "no label (member cls)"


def _label(text: bytes, size: int, classes: int | None) -> tuple[int, str]:
    """Returns the label that a member states, or -1 and what is wrong with it."""
    if size > _MAX_LABEL_BYTES or not text.isdigit() or int(text) > _MAX_LABEL:
        return -1, f"{text[:20]!r} is not a label"
    if classes is not None and int(text) >= classes:
        return -1, f"label {int(text)} is not one from 0 to {classes - 1}"
    return int(text), ""


def _members(descriptor: int) -> Iterator[tuple[str, int, int, bytes]]:
    """Yields name, offset, size and first block of every regular member.

    Raises:
        ValueError: the tar is damaged or incomplete.
        UnsafeError: a member is not a regular file, or of a kind that is refused.
    """
    end = os.fstat(descriptor).st_size
    if end % _BLOCK:
        raise ValueError(
            f"{end} bytes are not a whole number of {_BLOCK}-byte blocks: the tar was cut or added to"
        )
    place, name = 0, ""
    stated: dict[str, str] = {}  # of the next member, by headers of its own
    while True:
        block = os.pread(descriptor, 2 * _BLOCK, place)
        header, head = block[:_BLOCK], block[_BLOCK:]
        if len(header) < _BLOCK:
            raise ValueError(f"ends without an end mark after {name or 'nothing'}: the tar was cut")
        if header == _ZEROS:
            if stated:
                raise ValueError("ends after the header of a name")
            _check_end(descriptor, place, end, name)
            return
        size = _check_header(header, place, name)
        kind = header[156:157]
        content, next_place = place + _BLOCK, place + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if next_place > end:
            raise ValueError(f"member {_text(header[:100], place)} reaches beyond the end: the tar was cut")
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
            if size > _MAX_NAME_BYTES:
                raise ValueError(f"a header of {size} bytes for a name near byte {place}")
            stated |= _stated(kind, os.pread(descriptor, size, content), place)
            place = next_place
            continue
        prefix = _text(header[345:500], place) if header[257:263] == b"ustar\0" else ""
        name = _text(header[:100], place)
        name = stated.get("path") or (f"{prefix}/{name}" if prefix else name)
        if "size" in stated and stated["size"] != str(size):
            raise ValueError(f"member {name}: two different sizes")
        stated, place = {}, next_place
        _check_name(name)
        if kind == _FOLDER and size == 0:
            continue
        if kind not in (b"0", b"\0"):
            what = _KINDS.get(kind, f"of the unknown kind {kind!r}")
            raise UnsafeError(
                f"member {name} is {what}; shards hold regular files only: make it again without"
            )
        if size > _MAX_MEMBER_BYTES:
            raise UnsafeError(f"member {name} has {size} bytes, more than the limit of {_MAX_MEMBER_BYTES}")
        yield name, content, size, head


def _stated(kind: bytes, data: bytes, place: int) -> dict[str, str]:
    """Returns what a header before a member states about it, in the words of pax."""
    if kind == _LONG_NAME:
        return {"path": _text(data, place)}
    records = _pax_records(data, place)
    if kind == _PAX:
        return records
    if records.keys() & {"path", "size"}:
        raise UnsafeError("a global header gives a name or size to all members; make the shard again")
    return {}


def _check_header(header: bytes, place: int, after: str) -> int:
    """Returns the size that a header states, after checking that it is one."""
    where = f"at byte {place}" + (f", after member {after}" if after else "")
    if place == 0:
        for magic, kind in _MAGICS.items():
            if header.startswith(magic):
                raise ValueError(f"is compressed with {kind}; shards are plain tars: unpack it")
    if header[257:262] != b"ustar":
        raise ValueError(f"is not a tar {where}")
    stated = _number(header[148:156], where)
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError(f"a header is damaged {where}")
    return _number(header[124:136], where)


def _number(text: bytes, where: str) -> int:
    if text[0] == 0x80:  # GNU's base 256
        return int.from_bytes(text[1:])
    digits = text.strip(b" \0")
    if not digits or digits.translate(None, b"01234567"):
        raise ValueError(f"a header is damaged {where}")
    return int(digits, 8)


def _text(data: bytes, place: int) -> str:
    try:
        return data.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        raise ValueError(f"a name that is not UTF-8 at byte {place}") from None


def _pax_records(data: bytes, place: int) -> dict[str, str]:
    records = {}
    begin = 0
    while begin < len(data):
        digits, space, _ = data[begin : begin + 8].partition(b" ")
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = data[begin + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not space or not equals or end <= begin or end > len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"a damaged header of a name at byte {place}")
        if key.startswith(b"GNU.sparse") or key == b"linkpath":
            raise UnsafeError(
                "a member is sparse or a link; shards hold regular files only: make it again without"
            )
        if b"\0" in value:
            raise UnsafeError(f"a name with a NUL at byte {place}; make the shard again")
        records[_text(key, place)] = _text(value, place)
        begin = end
    return records


def _check_name(name: str) -> None:
    parts = name.split("/")
    if not name.isprintable():
        raise UnsafeError(f"member {name!r} has control characters in its name; make the shard again")
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise UnsafeError(f"member {name!r} leaves the folder; make the shard again with plain names")
    last = parts[-1].rpartition(".")[2].lower()
    if last in _PICKLED:
        raise UnsafeError(
            f"member {name!r} is a pickle, which can run programs; make the shard again without"
        )
    if last in _COMPRESSED:
        raise UnsafeError(f"member {name!r} is compressed; make the shard again with plain members")


def _check_end(descriptor: int, place: int, end: int, after: str) -> None:
    """Checks that nothing but zeros follows, two blocks of them at least."""
    if end - place < 2 * _BLOCK:
        raise ValueError(f"ends with half an end mark after {after or 'nothing'}: the tar was cut")
    for begin in range(place, end, 2**20):
        if os.pread(descriptor, min(2**20, end - begin), begin).strip(b"\0"):
            raise ValueError(f"goes on after its end mark at byte {place}")
