"""Widgets of the terminal views: frames, rows and bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.text import Text

from disttrain.terminal import printable

LABEL = 9
"""Cells of the column of labels."""


class Frame:
    """A view as rich asks for it: drawn for the place in which it is shown.

    A line that is the same object as in the last frame is not rendered again.
    """

    def __init__(self, draw: Callable[[int, int], list[Text]]) -> None:
        self._draw = draw
        self._last: dict[int, tuple[Text, list[Segment]]] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - 3)  # a terminal that echoes ^C behind the last line must not wrap
        height = max(1, options.size.height - 1)  # a line is left for the outcome
        rendered = {}
        for line in self._draw(width, height):
            known = self._last.get(id(line))  # whose lines are alive, so no other has their id
            if known is None:
                line.truncate(width, overflow="ellipsis")
                known = (line, list(line.render(console, end="\n")))
            rendered[id(line)] = known
            yield from known[1]
        self._last = rendered


def plain(text: str, style: str = "") -> Text:
    """Returns text without markup and control characters."""
    return Text(printable(text), style)


def row(label: str, value: Text | str, label_width: int = LABEL) -> Text:
    """Returns a label and its value in one line."""
    line = plain(label, "bold")
    line.truncate(label_width, pad=True)
    return plain("").append_text(line).append_text(plain(value) if isinstance(value, str) else value)


def bar(share: float, width: int) -> tuple[str, str]:
    """Returns the filled and the empty part of a bar, together `width` cells, distinct without colour."""
    halves = int(min(1.0, max(0.0, share)) * width * 2)
    done = "━" * (halves // 2) + "╾" * (halves % 2)
    return done, "─" * (width - len(done))


def rule(text: str, width: int) -> Text:
    """Returns a line that begins a part of the view, with its title."""
    line = Text.assemble(("── ", "bright_black"), plain(text))
    line.truncate(max(0, width), overflow="ellipsis")
    return line.append(" " + "─" * max(0, width - line.cell_len - 1), "bright_black")


def gauge(share: float, width: int, style: str) -> Text:
    """Returns a bar in a colour."""
    done, rest = bar(share, max(0, width))
    return Text.assemble((done, style), (rest, "bright_black"))


def side_by_side(cells: Sequence[Text], width: int, gap: int) -> Text:
    """Returns a line of cells of equal width."""
    for cell in cells[:-1]:
        cell.truncate(width, overflow="ellipsis", pad=True)
    return plain(" " * gap).join(cells)
