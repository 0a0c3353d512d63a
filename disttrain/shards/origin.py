"""Tells the tars that disttrain wrote from those of other tools, which it must never replace."""

from __future__ import annotations

from pathlib import Path

OWNER = "disttrain"
"""The user and the group of every member that disttrain writes."""

_MARK = OWNER.encode().ljust(32, b"\0") * 2  # both fields of a tar header
_LOOK_BYTES = 2**20  # has many headers, so that a damaged one does not hide who wrote a tar


def existing_tar(folder: Path) -> Path | None:
    """Returns the first tar in a folder that disttrain did not write, or None.

    An empty file counts as written by disttrain, because nothing is lost with it. A tar that cannot be read
    counts as one.
    """
    return next((path for path in sorted(folder.rglob("*.tar")) if not _is_ours(path)), None)


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_LOOK_BYTES)
    except OSError:
        return False
    return not head or _MARK in head
