"""Files that are complete or absent, and made by one process at a time.

On disks that fill up, and on NFS, where an operation may lag or be reported as failed although it was done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from disttrain.errors import StorageError, reason

PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Pauses before what failed in passing is tried again."""

_BUFFER_BYTES = 2**20
_PASSING = {
    errno.ESTALE,
    errno.EBUSY,
    errno.EIO,
    errno.ENOENT,  # another client's change is not seen yet
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EAGAIN,
    errno.ETIMEDOUT,
}


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces a file by a complete new one.

    Args:
        path: the file.
        content: the new one.
        durable: whether to wait until it is on the disk.

    Raises:
        StorageError: it cannot be written; the old file is as it was and nothing else is left.
    """
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.unlink(missing_ok=True)
        try:
            write_new(partial, data, durable=durable)
            move(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error, len(data)) from None


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Gives a hidden name under which to make a file or folder; then it takes the place of what was there.

    One process at a time, as `file_lock` sees to it. After an error nothing of it is left.

    Raises:
        OSError: it cannot be renamed.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)  # left by a process that was killed
    try:
        yield partial
        if partial.is_dir():  # which cannot be renamed to what is not empty
            _remove(path)
        move(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(IsADirectoryError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Lets one process at a time make a file or folder; the lock is a hidden file beside it.

    Args:
        path: what is made.
        on_wait: called when another process has its turn.

    Raises:
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # here, because a launcher takes no turn

    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    lock = FileLock(name)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        held = lock.acquire()
    with held:
        try:
            yield
        finally:
            name.unlink(missing_ok=True)  # who has waited for this very file notices, and takes a new one


def stamp(file: Path | int) -> list[int]:
    """Returns what changes when a file does: its size in bytes and when it was written and changed, in ns."""
    status = os.stat(file)  # noqa: PTH116  # of a descriptor too
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(path: Path) -> str:
    """Returns the hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_new(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
    """Makes a file of these bytes and, if it is to be durable, sees to it that they are on the disk.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # who verifies reads the disk
    finally:
        os.close(descriptor)


def holds(path: Path, *pieces: bytes | memoryview) -> bool:
    """Tells whether a file has just these bytes; what is read of it does not stay in the page cache.

    Raises:
        OSError: it cannot be read.
    """
    buffer = bytearray(_BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                count = file.readinto(memoryview(buffer)[: len(rest)])
                # In this order: memoryviews compare one element after the other.
                if not count or buffer[:count] != rest[:count]:
                    return False
                rest = rest[count:]
        whole = not file.read(1)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return whole


def move(source: Path, target: Path) -> None:
    """Renames a file or folder; the name of the target must be free, or be that of a file for a file."""
    # A rename that was sent twice fails the second time although the first was done.
    persist(lambda: source.replace(target), lambda: not os.path.lexists(source) and os.path.lexists(target))


def link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, in place of what link was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    persist(lambda: partial.symlink_to(target), lambda: partial.is_symlink())
    move(partial, path)


def persist(action: Callable[[], object], done: Callable[[], bool] = lambda: False) -> None:
    """Does something, and for some seconds again where it fails as things fail in passing on NFS.

    Args:
        action: raises OSError when it fails.
        done: tells after a failure whether it was done all the same.

    Raises:
        OSError: the last failure.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            action()
            return
        except OSError as error:
            if done():
                return
            if pause_s is None or error.errno not in _PASSING:
                raise
        time.sleep(pause_s)


def storage_error(path: Path, error: OSError, needed_bytes: int | None = None) -> StorageError:
    """Returns the error to raise where a file or folder cannot be written: how much is needed and free."""
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    free = free_bytes(path)
    sizes = f" ({needed}{'unknown' if free is None else f'{free:,} bytes'} free)"
    advice = {
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EDQUOT: "free some of your quota",
        errno.ENOSPC: "free some space",
        errno.EROFS: "make the file system writable",
    }.get(error.errno or 0, "see to the file system")
    return StorageError(f"{path}: cannot be written: {reason(error)}{sizes}; {advice}, then try again")


def free_bytes(path: Path) -> int | None:
    """Returns the space that is left where a path is or would be, or None if that is not known."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def sync_folder(path: Path) -> None:
    """Makes sure that the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
