"""Indexes tars in a folder that cannot be written: the index lies elsewhere, beside links to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from disttrain.errors import DataError, StorageError
from disttrain.files import storage_error
from disttrain.shards.existing_tars import Labels, index_folder
from disttrain.shards.index import Index, data_folder
from disttrain.shards.pack import Options


def index_tars(
    folder: Path,
    name: str | None,
    root: str | None,
    patterns: dict[str, Sequence[str]],
    options: Options,
    **labels: Unpack[Labels],
) -> Index:
    """Indexes the tars of a folder, there or as another data set.

    Args:
        folder: folder of the tars.
        name: name of a data set that gets the index and a link to each tar; None means the folder's name.
        root: see `data_root`. Without name and root, the index is written into the folder.
        patterns: see `index_folder`.
        options: see `index_folder`.
        labels: see `index_folder`.

    Raises:
        DataError: see `index_folder`; or the data set exists, and is not to be replaced.
        StorageError: the folder cannot be written.
    """
    place = folder if name is root is None else data_folder(name or folder.absolute().name, root)
    if not folder.is_dir() or (place.exists() and place.samefile(folder)):
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise StorageError(
                f"{folder}: index.json cannot be written there; put the index elsewhere with --name NAME and "
                "--root FOLDER, beside links to the tars"
            )
        return index_folder(folder, patterns, options, **labels)
    if is_new := not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
    else:
        _check_replaceable(place, force=options.force)
    try:
        _link(folder.absolute(), place)
        return index_folder(place, patterns, options, **labels)
    except OSError as error:
        raise storage_error(place, error) from None
    except BaseException:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)  # removes links, not what they lead to
        raise


def _check_replaceable(place: Path, *, force: bool) -> None:
    if not force:
        raise DataError(f"{place}: already exists; replace it with --force or choose another --name")
    for path in sorted(place.rglob("*")):
        if path != place / "index.json" and not path.is_symlink() and not path.is_dir():
            raise DataError(f"{path}: is not a link to a tar; move it away or choose another --name")


def _link(folder: Path, place: Path) -> None:
    """Makes a link to each tar of a folder, in the same sub-folders, and removes older links."""
    for old in place.rglob("*"):
        if old.is_symlink():
            old.unlink()
    for tar in sorted(folder.rglob("*.tar")):
        link = place / tar.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tar)
    place.mkdir(exist_ok=True)
