"""Attributes of records as arrays, and their downsampling for charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def columns(rows: Sequence[object], names: Sequence[str]) -> Array:
    """Returns attributes of rows as float64 [rows, names], NaN for None."""
    return np.array([[*map(attrgetter(name), rows)] for name in names], np.float64).T


def parse_times(times: Sequence[str]) -> Array:
    """Returns ISO 8601 times in UTC, at least to the millisecond, as seconds since 1970; NaN if invalid."""
    text = np.frombuffer("".join(times).encode("ascii", "replace"), np.uint8)
    width = len(times[0]) if times else 0
    if width >= 23 and len(text) == width * len(times):
        table = text.reshape(-1, width)
        digits = table[:, _DIGITS] - np.uint8(ord("0"))
        if (table[:, :11] == table[0, :11]).all() and (digits <= 9).all():  # the same day, as in most chunks
            parsed: Array = _parse(f"{times[0][:11]}00:00:00.000") + digits @ _WEIGHTS_S
            return parsed
    return np.array([_parse(time[:23]) for time in times], np.float64)


_DIGITS = [11, 12, 14, 15, 17, 18, 20, 21, 22]  # digits of hours, minutes, seconds and milliseconds
_WEIGHTS_S = np.array([36000, 3600, 600, 60, 10, 1, 0.1, 0.01, 0.001])


def _parse(time: str) -> float:
    try:
        return datetime.fromisoformat(f"{time}+00:00").timestamp()
    except ValueError:
        return math.nan


def downsample(values: Array, points: int) -> Ids:
    """Returns increasing indices of about `points` values or fewer, without losing an extreme.

    Splits the values into buckets of equal length and keeps the minimum and maximum of each, and the first
    and last value. A bucket of unknown values keeps one of them, which leaves a gap in the curve.

    Args:
        values: float64 [n], NaN where unknown.
        points: at least 4.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    buckets = max(1, (points - 2) // 2)
    width = -(-count // buckets)
    padded = np.full(width * -(-count // width), np.nan)
    padded[:count] = values
    table = padded.reshape(-1, width)
    unknown = np.isnan(table)
    starts = np.arange(len(table)) * width
    low = starts + np.where(unknown, np.inf, table).argmin(1)
    high = starts + np.where(unknown, -np.inf, table).argmax(1)
    kept: Ids = np.unique(np.concatenate([[0], low, high, [count - 1]]))
    return kept
