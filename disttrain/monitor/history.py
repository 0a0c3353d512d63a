"""The history of a run in bounded memory, and its curves as text: braille dots and rows of blocks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from disttrain.runs.records import mean

_POINTS = 512  # at most; then pairs of them become one
_BLOCKS = "▁▂▃▄▅▆▇"  # the full block would touch the row above
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character, by column and row

Curve = Sequence[float | None]


class History:
    """Several quantities over the steps of a run.

    Each point is a mean over equally many log points. An unknown value is None.

    Attributes:
        steps: the last step of each point.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._curves: dict[str, list[float | None]] = {}
        self._per_point = 1  # log points
        self._in_last = 0

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds a log point."""
        if not self.steps or self._in_last == self._per_point:
            if len(self.steps) == _POINTS:
                self._halve()
            self.steps.append(step)
            self._in_last = 0
            for curve in self._curves.values():
                curve.append(None)
        self._in_last += 1
        self.steps[-1] = step
        for key, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            curve = self._curves.get(key) or self._curves.setdefault(key, [None] * len(self.steps))
            before = curve[-1]
            curve[-1] = value if before is None else before + (value - before) / self._in_last

    def _halve(self) -> None:
        self.steps = self.steps[1::2]
        for key, curve in self._curves.items():
            self._curves[key] = [mean(curve[i : i + 2]) for i in range(0, len(curve), 2)]
        self._per_point *= 2

    def points(self, key: str) -> list[tuple[int, float]]:
        """Returns the known values of a quantity with their steps."""
        pairs = zip(self.steps, self._curves.get(key, ()), strict=False)
        return [(step, value) for step, value in pairs if value is not None]

    def columns(self, key: str, count: int) -> list[float | None]:
        """Returns the means of a quantity in `count` equal parts of the steps.

        A point holds from the step of the one before to its own. So a few points fill all columns.
        """
        curve = self._curves.get(key)
        if curve is None or not count:
            return [None] * count
        edges = [self.steps[-1] * edge / count for edge in range(count + 1)]
        return [
            mean(curve[bisect_right(self.steps, begin) : bisect_left(self.steps, end) + 1])
            for begin, end in pairwise(edges)
        ]

    def smooth(self, key: str, count: int) -> list[float | None]:
        """Returns a moving average of `columns`, which also joins the few points of a short run."""
        columns = self.columns(key, count)
        half = max(count // 20, count // max(1, 2 * len(self.steps)))
        smoothed: list[float | None] = []
        for place, value in enumerate(columns):
            near = min(half, place, count - 1 - place)  # fewer at the ends, so that the last value is reached
            smoothed.append(None if value is None else mean(columns[place - near : place + near + 1]))
        return smoothed


def blocks(values: Curve, low: float = 0.0, high: float = 100.0) -> str:
    """Returns a character per value, whose height is its place between `low` and `high`."""
    last = len(_BLOCKS) - 1
    return "".join(
        " " if value is None else _BLOCKS[round(min(1.0, max(0.0, (value - low) / (high - low))) * last)]
        for value in values
    )


def dots(values: Curve, height: int, low: float, high: float) -> list[list[str]]:
    """Returns the characters of a line of braille dots, `height` rows for two values a column."""
    cells = [[0] * ((len(values) + 1) // 2) for _ in range(height)]
    before = None
    for x, value in enumerate(values):
        if value is None:
            before = None
            continue
        y = row_of(value, 4 * height, low, high)
        from_y = y if before is None else before + (y > before) - (y < before)
        for dot in range(min(y, from_y), max(y, from_y) + 1):
            cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    return [[chr(0x2800 + cell) if cell else " " for cell in row] for row in cells]


def row_of(value: float, rows: int, low: float, high: float) -> int:
    """Returns the row of a value, counted from the top; the nearest one if it lies outside."""
    return round((1 - min(1.0, max(0.0, (value - low) / (high - low)))) * (rows - 1))


def limits(values: Curve) -> tuple[float, float] | None:
    """Returns the axis of a curve, or None if nothing is known.

    The few highest values, such as the first losses, do not stretch it. Nor does noise fill it.
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    low, high = known[0], known[-1 - len(known) // 50]
    least = 0.1 * max(abs(low), abs(high)) or 1.0
    spare = max(0.0, least - (high - low)) / 2
    return (max(0.0, low - spare) if low >= 0 else low - spare), high + spare
