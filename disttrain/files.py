"""Files that are either complete or absent, and written by one process at a time.

This holds on full disks, and on NFS, where an operation may lag or be reported as failed although it
succeeded.
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
"""Pauses between attempts after a transient error, in seconds."""

_BUFFER_BYTES = 2**20
_TRANSIENT = {
    errno.ESTALE,
    errno.EBUSY,
    errno.EIO,
    errno.ENOENT,  # a change by another NFS client is not visible yet
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EAGAIN,
    errno.ETIMEDOUT,
}


_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""Of a file system without symbolic links, such as FAT, some FUSE and network file systems."""


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces the content of a file atomically.

    Args:
        path: the file; a device or pipe, such as /dev/stdout, is written to.
        content: its new content.
        durable: whether to wait until it is on disk.

    Raises:
        StorageError: it cannot be written; the old file is unchanged and no partial file is left.
    """
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_device(path):
            path.write_bytes(data)
            return
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
    """Yields a hidden name to write a file or folder to, then renames it to `path`, replacing what is there.

    Only one process at a time may use it; `file_lock` ensures that. After an error, nothing is left.

    Raises:
        OSError: it cannot be renamed.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)  # left by a process that was killed
    try:
        yield partial
        if _is_device(path):
            path.write_bytes(partial.read_bytes())
            return
        if partial.is_dir():  # a folder cannot replace one that is not empty
            _remove(path)
        move(partial, path)
    finally:
        _remove(partial)


def _is_device(path: Path) -> bool:
    """Returns whether a path is a device or pipe, such as /dev/stdout, which a rename would replace."""
    if str(path.parent) in ("/dev", "/dev/fd"):  # its target may be a regular file
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(IsADirectoryError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Lets only one process at a time write a file or folder; the lock is a hidden file beside it.

    Args:
        path: the file or folder.
        on_wait: called if another process holds the lock.

    Raises:
        OSError: the parent folder is not writable.
    """
    from filelock import FileLock, Timeout  # imported here because the launcher never takes this lock

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
            name.unlink(missing_ok=True)  # a waiting process notices and makes a new lock file


def stamp(file: Path | int) -> list[int]:
    """Returns numbers that change whenever a file does: its size in bytes, and its mtime and ctime in ns."""
    status = os.stat(file)  # noqa: PTH116  # also accepts a descriptor
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_new(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
    """Creates a file with these bytes; if `durable`, waits until they are on disk.

    Raises:
        OSError: the file exists already, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # a later check reads the disk itself
    finally:
        os.close(descriptor)


def holds(path: Path, *pieces: bytes | memoryview) -> bool:
    """Returns whether a file has exactly these bytes, and leaves none of it in the page cache.

    Raises:
        OSError: it cannot be read.
    """
    buffer = bytearray(_BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                count = file.readinto(memoryview(buffer)[: len(rest)])
                # A bytearray on the left: memoryviews would compare element by element.
                if not count or buffer[:count] != rest[:count]:
                    return False
                rest = rest[count:]
        whole = not file.read(1)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return whole


def move(source: Path, target: Path) -> None:
    """Renames a file or folder. The target must not exist, except that a file may replace a file."""
    # NFS may send a rename twice: the second fails although the first succeeded.
    persist(lambda: source.replace(target), lambda: not os.path.lexists(source) and os.path.lexists(target))


def link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, replacing a file or link.

    Where the file system has no symbolic links, `path` becomes a text file with the name of the target.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        persist(lambda: partial.symlink_to(target), lambda: partial.is_symlink())
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        write_new(partial, f"{target}\n".encode())
    move(partial, path)


def persist(action: Callable[[], object], done: Callable[[], bool] = lambda: False) -> None:
    """Runs an action, and retries it for some seconds after errors that are transient on NFS.

    Args:
        action: raises OSError when it fails.
        done: called after a failure; returns whether the action succeeded nevertheless.

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
            if pause_s is None or error.errno not in _TRANSIENT:
                raise
        time.sleep(pause_s)


def storage_error(path: Path, error: OSError, needed_bytes: int | None = None) -> StorageError:
    """Returns the error for a file or folder that cannot be written, with the bytes needed and free."""
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    free = free_bytes(path)
    sizes = f" ({needed}{'unknown' if free is None else f'{free:,} bytes'} free)"
    advice = {
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EDQUOT: "free some of your quota",
        errno.ENOSPC: "free some space",
        errno.EROFS: "make the file system writable",
        errno.ENOENT: "make the folder that it is to be in",
    }.get(error.errno or 0, "check the file system")
    return StorageError(f"{path}: cannot be written: {reason(error)}{sizes}; {advice}, then try again")


def free_bytes(path: Path) -> int | None:
    """Returns the free bytes of the file system that a path is or would be on, or None if unknown."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def sync_folder(path: Path) -> None:
    """Waits until the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
