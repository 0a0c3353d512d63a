"""The results of each class, and summaries of a confusion matrix, int64 [true class, predicted class]."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.files import write_atomically
from disttrain.runs.eval_metrics import class_scores
from disttrain.runs.evaluation import Evaluation

Confusion = npt.NDArray[np.int64]

_IN_WORDS = 30  # classes; a larger matrix is drawn by matrix.js instead of shown as a table
_COLUMNS = ("class", "images", "correct", "accuracy", "precision", "f1", "mistaken_for", "mistaken_images")
_MULTI_LABEL_COLUMNS = (*_COLUMNS[:6], "average_precision")


class ClassRow(NamedTuple):
    """The results for one class.

    Attributes:
        name: of the class.
        samples: of this class.
        correct: samples of this class that were recognized.
        accuracy: `correct` / `samples`, also called recall; None without samples.
        precision: share of the predictions of this class that are correct, 0..1; None without any.
        f1: harmonic mean of accuracy and precision; None without samples and predictions.
        mistaken_for: the most frequent wrong prediction; empty without one.
        mistakes: how often it was predicted.
        average_precision: of multi-label data, 0..1, or None.
    """

    name: str
    samples: int
    correct: int
    accuracy: float | None
    precision: float | None
    f1: float | None
    mistaken_for: str = ""
    mistakes: int = 0
    average_precision: float | None = None

    @property
    def score(self) -> float | None:
        """How good the class is: the average precision of multi-label data, otherwise the accuracy."""
        return self.accuracy if self.average_precision is None else self.average_precision


class Confused(NamedTuple):
    """A frequent mistake: so many images, a share of 0..1, of class `true` are taken for `predicted`."""

    true: int
    predicted: int
    images: int
    share: float


def class_rows(evaluation: Evaluation) -> list[ClassRow]:
    """Returns the results of each class, in the order of the labels."""
    rows = []
    for name, (correct, samples, predicted) in zip(
        evaluation.classes, evaluation.counts.tolist(), strict=True
    ):
        precision, accuracy, f1 = class_scores(correct, samples, predicted)
        rows.append(ClassRow(name, samples, correct, accuracy, precision, f1))
    if evaluation.labels is not None:
        found = zip(rows, evaluation.labels, strict=True)
        return [row._replace(average_precision=label.average_precision) for row, label in found]
    wrong = evaluation.confusion
    np.fill_diagonal(wrong, 0)
    worst, most = wrong.argmax(1).tolist(), wrong.max(1).tolist()
    return [
        row._replace(
            mistaken_for=evaluation.classes[worst[label]] if most[label] else "", mistakes=most[label]
        )
        for label, row in enumerate(rows)
    ]


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


def most_confused(confusion: Confusion, most: int = 10) -> list[Confused]:
    """Returns the most frequent mistakes; of equally frequent ones, those of smaller classes first."""
    samples = confusion.sum(1)
    true, predicted = np.nonzero(confusion)
    true, predicted = true[true != predicted], predicted[true != predicted]
    counts = confusion[true, predicted]
    shares = counts / samples[true]
    order = np.lexsort((-shares, -counts))[:most]
    columns = (column[order].tolist() for column in (true, predicted, counts, shares))
    return [Confused(*pair) for pair in zip(*columns, strict=True)]


def drawing(confusion: Confusion, classes: Sequence[str]) -> dict[str, Any] | None:
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
