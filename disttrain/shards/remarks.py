"""Remarks on images that can be used: what Pillow warns about, and gray levels that are lost.

The decoder makes them without knowing the name of the image. Its caller collects them, and tells each kind
once, with the number of images and the name of the first.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import PIL
from PIL import Image

Remarks = dict[str, tuple[int, str]]
"""Remark -> number of images, and the name of the first."""

_PILLOW = str(Path(PIL.__file__).parent)


class _Here(threading.local):
    found: list[str] | None = None


_here = _Here()


def remark(text: str) -> None:
    """Makes a remark on the image that this thread decodes; it is lost if nobody collects."""
    if _here.found is not None and text not in _here.found:
        _here.found.append(text)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Yields the list that gets this thread's remarks on one image."""
    before, _here.found = _here.found, []
    try:
        yield _here.found
    finally:
        _here.found = before


@contextlib.contextmanager
def pillow_warnings() -> Iterator[None]:
    """Makes remarks of Pillow's warnings, in all threads; only the main thread may enter this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we have our own limit
        show = warnings.showwarning

        def take(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if filename.startswith(_PILLOW):
                remark(f"Pillow says: {' '.join(str(message).split())}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = take
        yield


def add(remarks: Remarks, text: str, name: str, number: int = 1) -> None:
    """Counts a remark on an image, or on a number of them of which this is the first."""
    before, first = remarks.get(text, (0, name))
    remarks[text] = before + number, first


def lines(remarks: Mapping[str, tuple[int, str]]) -> list[str]:
    """Returns a line for each kind of remark: the number of images, the first of them, and the remark."""
    return [
        f"{number:,} images, such as {first}: {text}" if number > 1 else f"1 image: {first}: {text}"
        for text, (number, first) in remarks.items()
    ]
