"""Where this user's caches lie."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from disttrain.errors import StorageError
from disttrain.files import write_atomically
from disttrain.slurm_env import job_folders


def user_cache() -> Path:
    """Returns the folder of this user's caches: disttrain in $XDG_CACHE_HOME, else in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "disttrain"


def cache_folder() -> Path:
    """Returns the folder of what is made from data sets: $DISTTRAIN_CACHE, else in the user's cache."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or user_cache())


def decoded_folder() -> Path:
    """Returns the folder of decoded data sets.

    In a Slurm job it lies on the node's own disk, in $SLURM_TMPDIR or else $TMPDIR, if that is a folder of
    this user alone: one that everybody can write to, such as /tmp, may be memory, is cleaned up by nobody,
    and may hold what others have put there. $DISTTRAIN_CACHE has the last word.
    """
    if not os.environ.get("DISTTRAIN_CACHE"):
        for folder in job_folders(os.environ):
            if folder.is_absolute() and _is_private(folder):
                return folder / "disttrain" / "decoded"
    return cache_folder() / "decoded"


def _is_private(folder: Path) -> bool:
    try:
        status = folder.stat()
    except OSError:  # on this node there is none
        return False
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others_write


def remember(record: Path, content: str | bytes) -> None:
    """Writes to the cache what was found; if it cannot be written, the next process has to look again."""
    with contextlib.suppress(OSError, StorageError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, content, durable=False)
