"""Parallel coordinates of the settings of several runs: an axis for each key, and a line for each setting.

The last axis is the metric by which the settings are compared. Everything here is in units of the drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from disttrain.report.columns import Array
from disttrain.runs.eval_metrics import Metric

_WIDTH, _HEIGHT = 960, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 80, 34, 300
_MOST_TICKS = 8
_MOST_LINES = 500
_LOG_RATIO = 20  # from this ratio of the largest to the smallest value, an axis is logarithmic


class Line(NamedTuple):
    """A setting.

    Attributes:
        values: key -> value.
        result: the mean of the metric over its seeds.
        title: the setting in words.
    """

    values: Mapping[str, str]
    result: float
    title: str


class Axis(NamedTuple):
    """An axis: its name, its place and its marks (place, text)."""

    name: str
    x: float
    ticks: list[tuple[float, str]]


class Stroke(NamedTuple):
    """A drawn line.

    Attributes:
        points: as SVG takes them.
        share: of the way from the worst result to the best, 0..1.
        title: the setting and its result.
    """

    points: str
    share: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """The drawing, of `width` x `height`; the best line comes last, above the others."""

    axes: list[Axis]
    lines: list[Stroke]
    width: int = _WIDTH
    height: int = _HEIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def draw(settings: Sequence[Line], metric: Metric) -> Drawing | None:
    """Returns the drawing of the settings with the best results; None if there is nothing to compare.

    Args:
        settings: best first; all have the same keys.
        metric: of the results.
    """
    settings = settings[:_MOST_LINES]
    if len(settings) < 2:
        return None
    keys = list(settings[0].values)
    columns = [_places([line.values[key] for line in settings]) for key in keys]
    results = np.array([line.result for line in settings])
    columns.append(_scaled(results, [metric.text(value) for value in results.tolist()]))
    step = (_WIDTH - _LEFT - _RIGHT) / len(keys)
    xs = [_LEFT + step * number for number in range(len(columns))]
    names = [*keys, metric.title]
    axes = [Axis(name, x, ticks) for name, x, (_, ticks) in zip(names, xs, columns, strict=True)]
    strokes = []
    for number, line in enumerate(settings):
        points = " ".join(f"{x:.0f},{ys[number]:.1f}" for x, (ys, _) in zip(xs, columns, strict=True))
        share = (_BOTTOM - columns[-1][0][number]) / (_BOTTOM - _TOP)
        share = 1 - share if metric.lower else share
        strokes.append(Stroke(points, share, f"{line.title}: {metric.text(line.result)}"))
    return Drawing(axes, strokes[::-1])


def _places(values: Sequence[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns the place of each value on its axis, and the marks of the axis."""
    try:
        return _scaled(np.array([float(value) for value in values]), values)
    except ValueError:  # words stand at equal distances, in the order of their first use
        names = list(dict.fromkeys(values))
        places = dict(zip(names, np.linspace(_BOTTOM, _TOP, len(names)).tolist(), strict=True))
        return [places[value] for value in values], [(places[name], name) for name in names]


def _scaled(values: Array, texts: Sequence[str]) -> tuple[list[float], list[tuple[float, str]]]:
    low, high = values.min(), values.max()
    if low > 0 and high / low >= _LOG_RATIO:
        values, low, high = np.log(values), np.log(low), np.log(high)
    shares = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    ys = (_BOTTOM - shares * (_BOTTOM - _TOP)).tolist()
    first, *others = sorted(dict(zip(ys, texts, strict=True)).items())
    ticks, room = [first], (_BOTTOM - _TOP) / _MOST_TICKS
    for tick in others:  # those that do not overlap, and both ends
        if tick[0] - ticks[-1][0] >= room and (tick is others[-1] or others[-1][0] - tick[0] >= room):
            ticks.append(tick)
    return ys, ticks
