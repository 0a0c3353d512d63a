"""What is written to a terminal or in place of one: whether it can move, and that it never raises."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TextIO

_ASCII = str.maketrans("━╾─▁▂▃▄▅▆▇█°…", "#--_..-=+*# ~")  # for terminals that have nothing else


def is_animated(stream: TextIO | Output) -> bool:
    """Tells whether what is written can be replaced in place, as a dashboard or a progress bar does.

    Not on a terminal that knows no movements of the cursor, nor in a cell of a Jupyter notebook: it gives the
    commands in it a terminal, and then shows each frame after the one before.
    """
    terminal = os.environ.get("TERM", "dumb")
    return stream.isatty() and terminal not in ("dumb", "unknown") and "JPY_PARENT_PID" not in os.environ


def printable(text: str) -> str:
    """Returns a text in which nothing moves the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class Output:
    """A stream that never raises: once it fails, what is written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._glyphs = {} if self.encoding.lower().startswith("utf") else _ASCII

    def write(self, text: str) -> int:
        """Writes what the stream can show of a text."""
        shown = text.translate(self._glyphs).encode(self.encoding, "replace").decode(self.encoding)
        self._try(lambda stream: stream.write(shown))
        return len(text)

    def write_line(self, text: str) -> None:
        """Writes a line in which nothing moves the cursor, at once."""
        self.write(printable(text) + "\n")
        self.flush()

    def flush(self) -> None:
        """Hands on what was written."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Tells whether the stream is a terminal."""
        return bool(self._try(lambda stream: stream.isatty()))

    def _try(self, use: Callable[[TextIO], Any]) -> Any:
        stream = self._stream
        if stream is None:
            return None
        try:
            return use(stream)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._stream = None
            if isinstance(error, BrokenPipeError):
                # Python flushes standard output at exit; what is left in it would become exit code 120.
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)
            return None
