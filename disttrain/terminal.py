"""Output to a terminal or a file: whether it can be animated, and a stream that never raises."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, TextIO

_ASCII = dict(zip(map(ord, "━╾─▁▂▃▄▅▆▇█░▒│•°…"), "#--_..-=+*#.:|o ~", strict=True))  # for streams without UTF
_UPPER, _LOWER = 0b00011011, 0b11100100  # the dots of a braille character
_ASCII |= {0x2800 + dots: " .':"[2 * bool(dots & _UPPER) + bool(dots & _LOWER)] for dots in range(256)}


def is_animated(stream: TextIO | Output) -> bool:
    """Returns whether a stream can show a dashboard or a progress bar, redrawn in place.

    False on a terminal that cannot move the cursor, and in a Jupyter notebook: its cells look like a
    terminal, but show all frames one below the other.
    """
    terminal = os.environ.get("TERM", "dumb")
    return stream.isatty() and terminal not in ("dumb", "unknown") and "JPY_PARENT_PID" not in os.environ


def hide_pillow_warnings() -> None:
    """Hides Pillow's warnings, which name no file; `pillow_warnings` collects those of a data set."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def printable(text: str) -> str:
    """Returns a text with `?` for each character that is not printable, so that nothing moves the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def columns(stream: TextIO) -> int | None:
    """Returns the width of a terminal; None for a file or a pipe, where nothing is cut."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def width_of(text: str) -> int:
    """Returns how many columns a text takes; characters of Chinese, Japanese and Korean take two."""
    from rich.cells import cell_len

    return cell_len(text)


def fitted(text: str, width: int, *, cut: bool = True) -> str:
    """Returns a printable text that fills a column of a table on a terminal.

    Args:
        text: the text.
        width: of the column.
        cut: whether a longer text is cut, with three dots at its end.
    """
    from rich.cells import set_cell_size

    text = printable(text)
    if cut and width_of(text) > width:
        text = set_cell_size(text, max(0, width - 3)).rstrip(" ,;") + "..."
    return text + " " * (width - width_of(text))


class Output:
    """A stream that never raises: after a failure, it drops all output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._glyphs = {} if self.encoding.lower().startswith("utf") else _ASCII

    def write(self, text: str) -> int:
        """Writes a text; characters that the stream cannot encode are replaced."""
        shown = text.translate(self._glyphs).encode(self.encoding, "replace").decode(self.encoding)
        self._try(lambda stream: stream.write(shown))
        return len(text)

    def write_line(self, text: str) -> None:
        """Writes a line of printable characters, and flushes it."""
        self.write(printable(text) + "\n")
        self.flush()

    def flush(self) -> None:
        """Flushes the stream."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
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
                # Python flushes standard output at exit; if that failed, the exit code would be 120.
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)
            return None
