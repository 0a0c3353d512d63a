"""The results of an evaluation, stored in the checkpoint that was evaluated, and those of each class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from disttrain.runs.eval_metrics import class_scores
from disttrain.runs.manifest import read_part
from disttrain.runs.records import EvalRecord

FILE = "evaluation.json"
"""In a checkpoint that was evaluated."""

MISTAKES = 24
"""How many of the most confident ones are kept."""


class Mistake(msgspec.Struct, order=True, frozen=True):
    """A misclassified sample."""

    probability: float
    """Of the predicted class, 0..1."""
    id: int
    """Sample id."""
    label: int
    """The true class; in multi-label data, a class that was missed, or -1."""
    predicted: int
    """The predicted class; in multi-label data, a class that is not there, or -1."""


class LabelResult(msgspec.Struct, frozen=True):
    """The result of one class of multi-label data."""

    correct: int
    """Samples with this label for which it is predicted."""
    samples: int
    """Samples with this label."""
    predicted: int
    """Samples for which it is predicted."""
    average_precision: float | None
    """0..1; None without samples."""


class Evaluation(msgspec.Struct):
    """The results of an evaluation over all ranks."""

    record: EvalRecord
    """Its line of metrics.jsonl, without the time."""
    top5_correct: int
    """Samples whose class is among the top five."""
    classes: tuple[str, ...]
    """Their names, in the order of the matrix."""
    cells: list[tuple[int, int, int]]
    """The confusion matrix without its zeros: (true class, predicted class, samples), row by row."""
    mistakes: list[Mistake]
    """The most confident ones, the worst first; in multi-label data, at most one of each sample."""
    labels: list[LabelResult] | None = None
    """Of multi-label data: the result of each class, in place of a confusion matrix."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Correct predictions, samples and predictions of each class: int64 [classes, 3]."""
        if self.labels is not None:
            rows = [(row.correct, row.samples, row.predicted) for row in self.labels]
            return np.array(rows, np.int64).reshape(-1, 3)
        matrix = self.confusion
        return np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], 1)

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """The confusion matrix, int64 [true class, predicted class]; not of multi-label data."""
        matrix = np.zeros((len(self.classes),) * 2, np.int64)
        true, predicted, samples = np.array(self.cells, np.int64).reshape(-1, 3).T
        matrix[true, predicted] = samples
        return matrix


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


def most_confused(confusion: npt.NDArray[np.int64], most: int = 10) -> list[Confused]:
    """Returns the most frequent mistakes; of equally frequent ones, those of smaller classes first."""
    samples = confusion.sum(1)
    true, predicted = np.nonzero(confusion)
    true, predicted = true[true != predicted], predicted[true != predicted]
    counts = confusion[true, predicted]
    shares = counts / samples[true]
    order = np.lexsort((-shares, -counts))[:most]
    columns = (column[order].tolist() for column in (true, predicted, counts, shares))
    return [Confused(*pair) for pair in zip(*columns, strict=True)]


def evaluation_of(checkpoint: Path) -> Evaluation | None:
    """Returns the evaluation of a checkpoint, None if it was not evaluated.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    data = read_part(checkpoint, FILE)
    if data is None:
        return None
    content = msgspec.json.decode(data)
    if "confusion" in content:  # a file of an earlier version has the whole matrix
        rows = enumerate(content["confusion"])
        content["cells"] = [(i, j, count) for i, row in rows for j, count in enumerate(row) if count]
    return msgspec.convert(content, Evaluation)
