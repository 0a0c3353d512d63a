"""Files of JSON lines: whole lines are appended, and read while others append to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import msgspec

from disttrain.files import storage_error

_CHUNK_BYTES = 2**20  # the decoded rows fit in the CPU cache
_FIRST_BYTES = 2**20
_MOST_BYTES = 2**26  # a follower searches at most this much of the end of a file

Row = TypeVar("Row")


def encoded(record: object) -> bytes:
    """Returns a record as a line of JSON; a number that is not finite becomes null."""
    return msgspec.json.format(msgspec.json.encode(record), indent=0) + b"\n"


class JsonLines:
    """Appends records to a file, each as one complete line, unbuffered.

    An incomplete last line, left by a process that was killed, is removed first.

    Args:
        path: created if missing.

    Raises:
        StorageError: it cannot be written; every method may raise this.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._told():
            self._file = path.open("ab+", buffering=0)
            whole = _end_of_last_line(self._file)
            if whole < self._file.seek(0, os.SEEK_END):
                self._file.truncate(whole)

    def write(self, record: object) -> None:
        """Appends one record."""
        rest = memoryview(encoded(record))
        with self._told():
            while rest:  # usually once; on a full disk only a part may fit
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Makes sure that the lines are on the disk."""
        with self._told():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with self._told():
            self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self._path, error) from None


def _end_of_last_line(file: BinaryIO) -> int:
    """Returns the offset after the last newline of a file, in bytes."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 2**16)
        file.seek(begin)
        if place := file.read(end - begin).rfind(b"\n") + 1:
            return begin + place
        end = begin
    return 0


class Part(NamedTuple, Generic[Row]):
    """Some lines of a file.

    Attributes:
        rows: those that could be read.
        unread: how many could not.
        end: byte offset of the next line.
    """

    rows: list[Row]
    unread: int
    end: int


def parts(
    path: Path, decoder: msgspec.json.Decoder[Row], begin: int = 0, end: int | None = None
) -> Iterator[Part[Row]]:
    """Yields the lines of a file in chunks, without an incomplete last line.

    Args:
        path: of the file; yields nothing if it cannot be opened.
        decoder: of a line.
        begin: the lines that begin after this byte and not after `end` are read, but the first one of all; a
            negative one counts from the end of the file.
        end: None is the end of the file.
    """
    size = _CHUNK_BYTES
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        return
    with file:
        if begin < 0:
            begin = max(0, file.seek(0, os.SEEK_END) + begin)
        begin = _next_line(file, begin)
        end = _next_line(file, end) if end is not None else None
        while end is None or begin < end:
            file.seek(begin)
            data = file.read(size if end is None else min(size, end - begin))
            lines = memoryview(data)[: data.rfind(b"\n") + 1]
            if not lines and len(data) == size:
                size *= 2  # a line of very many GPUs
                continue
            if not lines:
                return
            begin += len(lines)
            try:
                yield Part(decoder.decode_lines(lines), 0, begin)
            except msgspec.MsgspecError:
                each = bytes(lines[:-1]).split(b"\n")
                rows = [row for line in each for row in _decoded(decoder, line)]
                yield Part(rows, len(each) - len(rows), begin)


def _next_line(file: BinaryIO, place: int) -> int:
    """Returns the byte offset of the first line at or after an offset."""
    if place == 0:
        return 0
    file.seek(place - 1)
    return place - 1 + len(file.readline())


def _decoded(decoder: msgspec.json.Decoder[Row], line: bytes) -> Iterator[Row]:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        yield decoder.decode(line)


class Follower(Generic[Row]):
    """Follows a file to which other processes append.

    Args:
        path: need not exist yet; may be replaced by another file.
        decoder: of a line.
        take: called with new rows. The first call gets the end of the file, and a longer part of it again
            until this returns True.
    """

    def __init__(
        self, path: Path, decoder: msgspec.json.Decoder[Row], take: Callable[[Sequence[Row]], bool]
    ) -> None:
        self._path = path
        self._decoder = decoder
        self._take = take
        self._file = 0  # its inode
        self._offset = 0

    def read(self) -> None:
        """Reads the lines completed since the last call."""
        with contextlib.suppress(OSError):
            state = self._path.stat()
            if state.st_ino == self._file and state.st_size >= self._offset:
                self._read_from(self._offset)
                return
            self._file, self._offset, length = state.st_ino, 0, _FIRST_BYTES
            while not self._read_from(-length) and length < min(state.st_size, _MOST_BYTES):
                length *= 8

    def _read_from(self, begin: int) -> bool:
        rows: list[Row] = []
        for part in parts(self._path, self._decoder, begin):
            rows += part.rows
            self._offset = part.end
        return self._take(rows)
