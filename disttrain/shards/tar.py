"""Finds the samples of a WebDataset tar, and refuses members that do not belong in one.

A strict parser: it reads only headers and labels, and unpacks nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from disttrain.errors import UnsafeError
from disttrain.shards.label_format import Label, LabelReader, Labels

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
"""Extensions of the members that are images."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_MEMBER_BYTES = 2**28
_MAX_EXTRA_BYTES = 2**20  # of a pax or GNU header; extended attributes can have 64 KiB each
_MAX_IMAGE_BYTES = 2**25
_FOLDER = b"5"
_PAX, _PAX_GLOBAL, _LONG_NAME = b"x", b"g", b"L"
_PICKLED = frozenset(["pyd", "pkl", "pickle", "pth", "pt", "pyc", "joblib", "dill"])
_COMPRESSED = frozenset(["gz", "xz", "bz2", "lzma", "zst", "lz4", "zip", "7z"])
_ELSEWHERE = re.compile(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://").match  # a drive or a URL
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
    """The samples of a shard, in order: all keys with a member that looks like an image or a label.

    Attributes:
        keys: the name that a sample's members share, without extension.
        extensions: extension of each image, one of `IMAGE_EXTENSIONS`; empty without an image.
        offsets: offset of each image in the shard, in bytes: int64 [n].
        sizes: size of each image in bytes: int64 [n].
        labels: see `Labels`.
        problems: position -> why that sample cannot be used.
    """

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: Labels
    problems: dict[int, str]


def scan(file: BinaryIO, labels: LabelReader) -> Contents:
    """Reads the headers and labels of a whole shard.

    Args:
        file: an uncompressed tar, seekable.
        labels: reads the labels.

    Raises:
        ValueError: the tar is damaged or incomplete; the message says what is wrong, and near which member.
        UnsafeError: the shard has a member of a forbidden kind.
    """
    samples: list[_Sample] = []
    seen: set[str] = set()
    member = labels.place.member
    for name, offset, size, head in _members(file.fileno()):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:  # a hidden file, as some systems add
            continue
        key, extension, problem = f"{folder}{slash}{stem}", extension.lower(), ""
        if not samples or samples[-1].key != key:
            if again := key in seen:
                problem = f"key {key} occurs twice: interleaved or duplicated members"
            samples.append(_Sample(key, member, again, problem=problem))
            seen.add(key)
        sample = samples[-1]
        if extension in sample.members:
            problem = f"two members named {name}"
        elif extension in IMAGE_EXTENSIONS:
            if sample.extension:
                problem = "two images"
            elif size == 0:
                problem = "the image is empty"
            elif size > _MAX_IMAGE_BYTES:
                problem = f"the image file has {size} bytes, over the limit of {_MAX_IMAGE_BYTES}"
            sample.extension, sample.offset, sample.size = extension, offset, size
        elif extension == member and size > labels.most_bytes:
            problem = f"{head[:20]!r} is not a label"
        elif extension == member:
            content = head[:size] if size <= len(head) else os.pread(file.fileno(), size, offset)
            try:
                sample.label = labels.read(content)
            except ValueError as error:
                problem = str(error)
        sample.members.add(extension)
        sample.problem = sample.problem or problem
    samples = [sample for sample in samples if sample.is_one()]
    if not samples:
        raise ValueError(
            f"has no samples: no member is an image ({', '.join(IMAGE_EXTENSIONS)}) or a label (cls)"
        )
    return Contents(
        tuple(sample.key for sample in samples),
        tuple(sample.extension for sample in samples),
        np.array([sample.offset for sample in samples], np.int64),
        np.array([sample.size for sample in samples], np.int64),
        labels.array([sample.label for sample in samples]),
        {place: problem for place, sample in enumerate(samples) if (problem := sample.unusable())},
    )


@dataclass
class _Sample:
    key: str
    label_member: str
    again: bool
    extension: str = ""
    offset: int = 0
    size: int = 0
    label: Label = -1
    problem: str = ""
    members: set[str] = field(default_factory=set)

    def is_one(self) -> bool:
        """Returns whether a member looks like an image or a label, even one such as `KEY.input.png`.

        A single .txt or .json file is no sample, unless its image was somewhere else in the tar.
        """
        if any(member.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "cls") for member in self.members):
            return True
        return self.again and self.label_member in self.members

    def unusable(self) -> str:
        """Returns why the sample cannot be used, or an empty string; call it after all members."""
        if self.problem or not self.extension:
            return self.problem or f"no image{self._after_first_dot()}"
        if self.label_member in self.members:
            return ""
        return f"no label (member {self.label_member}){self._after_first_dot()}"

    def _after_first_dot(self) -> str:
        """Returns an explanation if a member of the sample has a dot in its extension, else nothing."""
        dotted = sorted(member for member in self.members if "." in member)
        if not dotted:
            return ""
        return f": a key ends at the first dot of the name, so that the extension of a member is {dotted[0]}"


def _members(descriptor: int) -> Iterator[tuple[str, int, int, bytes]]:
    """Yields name, offset, size and first block of every regular member.

    Raises:
        ValueError: the tar is damaged or incomplete.
        UnsafeError: a member is not a regular file, or of another forbidden kind.
    """
    end = os.fstat(descriptor).st_size
    if end % _BLOCK:
        raise ValueError(
            f"{end} bytes are not a whole number of {_BLOCK}-byte blocks: the tar was truncated or extended"
        )
    place, name = 0, ""
    stated: dict[str, str] = {}  # name and size of the next member, from pax or GNU headers
    while True:
        block = os.pread(descriptor, 2 * _BLOCK, place)
        header, head = block[:_BLOCK], block[_BLOCK:]
        if len(header) < _BLOCK:
            raise ValueError(f"no end mark after {name or 'the start'}: the tar was truncated")
        if header == _ZEROS:
            if stated:
                raise ValueError("no member after the last header of a name")
            _check_end(descriptor, place, end, name)
            return
        size = _check_header(header, place, name)
        kind = header[156:157]
        content, next_place = place + _BLOCK, place + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if next_place > end:
            raise ValueError(f"member {_text(header[:100], place)} is incomplete: the tar was truncated")
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
            if size > _MAX_EXTRA_BYTES:
                raise ValueError(f"the header of a name has {size} bytes, near byte {place}")
            stated |= _stated(kind, os.pread(descriptor, size, content), place)
            place = next_place
            continue
        prefix = _text(header[345:500], place) if header[257:263] == b"ustar\0" else ""
        name = _text(header[:100], place)
        name = stated.get("path") or (f"{prefix}/{name}" if prefix else name)
        if "size" in stated and stated["size"] != str(size):
            raise ValueError(f"member {name} has two different sizes")
        stated, place = {}, next_place
        _check_name(name)
        if kind == _FOLDER and size == 0:
            continue
        if kind not in (b"0", b"\0"):
            what = _KINDS.get(kind, f"of the unknown kind {kind!r}")
            raise UnsafeError(f"member {name} is {what}; make the shard again with only regular files")
        if size > _MAX_MEMBER_BYTES:
            raise UnsafeError(f"member {name} has {size} bytes, over the limit of {_MAX_MEMBER_BYTES}")
        yield name, content, size, head


def _stated(kind: bytes, data: bytes, place: int) -> dict[str, str]:
    """Returns `path` and `size` from a header before a member; a GNU long name becomes `path`."""
    if kind == _LONG_NAME:
        return {"path": _text(data, place)}
    records = _pax_records(data, place)
    if kind == _PAX:
        return records
    if records:
        raise UnsafeError("a global header sets the name or size of all members; make the shard again")
    return {}


def _check_header(header: bytes, place: int, after: str) -> int:
    """Checks a header and returns the size in it."""
    where = f"at byte {place}" + (f", after member {after}" if after else "")
    if place == 0:
        for magic, kind in _MAGICS.items():
            if header.startswith(magic):
                raise ValueError(f"is compressed with {kind}; shards must be plain tars, so decompress it")
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
        raise ValueError(f"the name at byte {place} is not UTF-8") from None


def _pax_records(data: bytes, place: int) -> dict[str, str]:
    """Returns the keywords `path` and `size` of a pax header, if it has them."""
    records: dict[str, str] = {}
    begin = 0
    while begin < len(data):
        digits, space, _ = data[begin : begin + 8].partition(b" ")
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = data[begin + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not space or not equals or end <= begin or end > len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"the header of a name is damaged at byte {place}")
        if key.startswith(b"GNU.sparse") or key == b"linkpath":
            raise UnsafeError(
                "a member is a sparse file or a link; make the shard again with only regular files"
            )
        if key in (b"path", b"size"):  # the others can be binary, such as extended attributes
            if b"\0" in value:
                raise UnsafeError(f"the name at byte {place} has a NUL; make the shard again")
            records[key.decode()] = _text(value, place)
        begin = end
    return records


def _check_name(name: str) -> None:
    parts = name.split("/")
    if not name.isprintable():
        raise UnsafeError(f"member {name!r} has control characters in its name; make the shard again")
    if name.startswith("/") or ".." in parts or "\\" in name or _ELSEWHERE(name):
        raise UnsafeError(f"member {name!r} leaves the folder; make the shard again with plain names")
    *before, last = parts[-1].lower().split(".")
    if last in _PICKLED:
        raise UnsafeError(f"member {name!r} is a pickle, which can run code; make the shard again without it")
    # Others, such as KEY.json.gz, are never opened.
    if last in _COMPRESSED and (len(before) < 2 or before[-1] in (*IMAGE_EXTENSIONS, "cls")):
        raise UnsafeError(f"member {name!r} is compressed; make the shard again with plain members")


def _check_end(descriptor: int, place: int, end: int, after: str) -> None:
    """Checks that only zeros follow, at least two blocks of them."""
    if end - place < 2 * _BLOCK:
        raise ValueError(f"half an end mark after {after or 'the start'}: the tar was truncated")
    for begin in range(place, end, 2**20):
        if os.pread(descriptor, min(2**20, end - begin), begin).strip(b"\0"):
            raise ValueError(f"has data after its end mark at byte {place}")
