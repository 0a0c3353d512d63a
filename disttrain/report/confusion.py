"""The results of the classes and a confusion matrix, as a page and its CSV file have them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from disttrain.files import write_atomically
from disttrain.runs.evaluation import ClassRow

_IN_WORDS = 30  # classes; a larger matrix is drawn by matrix.js instead of shown as a table
_COLUMNS = ("class", "images", "correct", "accuracy", "precision", "f1", "mistaken_for", "mistaken_images")
_MULTI_LABEL_COLUMNS = (*_COLUMNS[:6], "average_precision")


def worst_first(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """Returns the rows with the lowest score first; those of more samples first, and without any last."""
    return sorted(rows, key=lambda row: (row.score is None, row.score, -row.samples))


def axis_start(rows: Sequence[ClassRow]) -> float:
    """Returns where an axis of the scores begins, 0..1, so that it shows their differences."""
    least = min((row.score for row in rows if row.score is not None), default=0.0)
    return max(start for start in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995) if start <= least)


def write_classes(rows: Sequence[ClassRow], path: Path, *, multi_label: bool) -> None:
    """Writes the rows as CSV; shares are 0..1, and unknown ones empty.

    Raises:
        StorageError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_MULTI_LABEL_COLUMNS if multi_label else _COLUMNS)
    for *columns, average_precision in rows:
        columns = [*columns[:6], average_precision] if multi_label else columns
        writer.writerow([value if value is not None else "" for value in columns])
    write_atomically(path, text.getvalue())


def drawing(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any] | None:
    """Returns what matrix.js needs to draw a matrix; None for one that is small enough for a table.

    Returns:
        `names` of the classes, and `rows`: for each true class, predicted classes and their counts in turn.
    """
    if len(classes) <= _IN_WORDS:
        return None
    rows: list[list[int]] = [[] for _ in classes]
    for true, predicted in np.argwhere(confusion).tolist():
        rows[true] += [predicted, int(confusion[true, predicted])]
    return {"names": list(classes), "rows": rows}
