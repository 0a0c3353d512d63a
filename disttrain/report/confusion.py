"""Summaries of a confusion matrix, which is int64 [true class, predicted class]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.report.pictures import Picture, mosaic

Confusion = npt.NDArray[np.int64]

_IN_WORDS = 30  # classes; a larger matrix is a picture instead of a table
_ROWS = 200


class ClassRow(NamedTuple):
    """The results for one class; `accuracy` is 0..1, or None without samples."""

    name: str
    samples: int
    correct: int
    accuracy: float | None
    mistaken_for: str


def class_rows(confusion: Confusion, classes: Sequence[str]) -> list[ClassRow]:
    """Returns the results per class, lowest accuracy first."""
    rows = []
    for label, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        samples, correct = int(counts.sum()), int(counts[label])
        wrong = counts.copy()
        wrong[label] = 0
        most = f"{classes[int(wrong.argmax())]} ({wrong.max():,})" if wrong.any() else ""
        rows.append(ClassRow(name, samples, correct, correct / samples if samples else None, most))
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy))[:_ROWS]


def most_confused(confusion: Confusion, most: int = 10) -> list[tuple[int, int, int]]:
    """Returns (true class, predicted class, count) of the most frequent mistakes."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = ((int(cell) // len(off), int(cell) % len(off)) for cell in order)
    return [(true, guess, int(off[true, guess])) for true, guess in pairs if off[true, guess]]


def matrix(confusion: Confusion) -> Picture | None:
    """Returns a picture of a matrix that is too large for a table; None for a smaller one."""
    if len(confusion) <= _IN_WORDS:
        return None
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return mosaic(np.sqrt(shares)[None].astype(np.float64), 1)
