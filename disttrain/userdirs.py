"""The folders of this user's caches."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from disttrain.errors import StorageError, UsageError
from disttrain.files import write_atomically
from disttrain.slurm_env import job_folders


def user_cache() -> Path:
    """Returns the cache folder of this user: disttrain/ in $XDG_CACHE_HOME, or else in ~/.cache.

    Raises:
        UsageError: the user has no home folder, as in a container with an unknown user id.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            raise UsageError(
                "this user has no home folder for data sets and caches; set HOME to a writable folder, or "
                "set DISTTRAIN_DATA and DISTTRAIN_CACHE"
            ) from None
    return cache / "disttrain"


def cache_folder() -> Path:
    """Returns the folder for files derived from data sets: $DISTTRAIN_CACHE, or else the user's cache."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or user_cache())


def decoded_folder() -> Path:
    """Returns the folder of decoded data sets.

    In a Slurm job it is on the local disk of the node, in $SLURM_TMPDIR or else $TMPDIR, if only this user
    can write there. A shared folder such as /tmp may be in memory, is not cleaned up after the job, and may
    contain files of other users. $DISTTRAIN_CACHE takes precedence.
    """
    if not os.environ.get("DISTTRAIN_CACHE"):
        for folder in job_folders(os.environ):
            if folder.is_absolute() and _is_private(folder):
                return folder / "disttrain" / "decoded"
    return cache_folder() / "decoded"


def _is_private(folder: Path) -> bool:
    try:
        status = folder.stat()
    except OSError:  # it does not exist on this node
        return False
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others_write


def remember(record: Path, content: str | bytes) -> None:
    """Writes a result to the cache; if that fails, the next process has to compute it again."""
    with contextlib.suppress(OSError, StorageError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, content, durable=False)
