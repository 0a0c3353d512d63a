"""The folder of a data set that is made: hidden beside its place, then renamed to it when it is complete."""

from __future__ import annotations

import contextlib
import errno
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from disttrain.errors import DataError
from disttrain.files import file_lock, sync_folder
from disttrain.shards.origin import existing_tar


@contextlib.contextmanager
def scratch_folder(target: Path, say: Callable[[str], None], *, keep: bool) -> Iterator[Path]:
    """Makes a hidden folder beside the target; after a failure, keeps it for the next attempt if `keep`."""
    scratch = target.parent / f".{target.name}.partial"
    with file_lock(target, lambda: say(f"waiting for another process to pack {target.name}")):
        scratch.mkdir(exist_ok=True)
        try:
            yield scratch
        except BaseException:
            if not keep:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)  # still exists if another process published its data set


def check_replaceable(target: Path) -> None:
    """Refuses to replace anything but a packed data set: a wrong --root must not delete a home folder.

    Raises:
        DataError: the folder has a file that disttrain did not write.
    """
    if not target.exists():
        return
    for path in target.iterdir() if target.is_dir() else [target]:
        if path == target or not (path.name == "index.json" or path.suffix == ".tar"):
            raise DataError(f"{path}: not part of a packed data set; move it away or choose another name")
    if tar := existing_tar(target):
        raise DataError(
            f"{tar}: disttrain did not write this tar, so it is not replaced; choose another name, or "
            f"use the tars as they are with `disttrain data index {shlex.quote(str(target))} --force`"
        )


def publish(folder: Path, target: Path, overwrite: bool) -> bool:
    """Renames a complete folder to `target`; returns False if that exists and `overwrite` is False."""
    while True:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync_folder(target.parent)
            return True
        if not overwrite:
            return False
        old = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
        with old as folder_of_old, contextlib.suppress(FileNotFoundError):
            target.rename(Path(folder_of_old) / target.name)  # readers keep the shards that they have open


def instead_of(target: Path) -> str:
    """Returns what to do if there is something in the place of a new data set."""
    if tar := existing_tar(target):
        return f"disttrain did not write {tar.name}, so choose another name"
    return "replace it with --force or choose another name"
