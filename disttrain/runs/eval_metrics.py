"""The metrics of an evaluation: how each one is defined, and which evaluation is the best by one of them.

Nothing here imports numpy or torch. The counts are integers, so the metrics do not depend on how the samples
are divided among the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from disttrain.runs.records import EvalRecord
from disttrain.units import accuracy_text, number, percent

BINS = 15
"""Of the expected calibration error."""
UNITS = 2**24
"""A confidence of 1 in the sums of the bins: whole numbers have the same sum in any order."""


class Metric(NamedTuple):
    """A metric that can decide which evaluation is the best.

    Attributes:
        key: of EvalRecord.
        title: for people.
        lower: whether a lower value is better.
    """

    key: str
    title: str
    lower: bool = False

    def of(self, record: EvalRecord) -> float | None:
        """Returns its value in a record; None if it is not known, or the loss is not finite."""
        if record.loss is None or not math.isfinite(record.loss):
            return None
        value: float | None = getattr(record, self.key)
        return value

    def improves(self, value: float | None, best: float | None, by: float = 0.0) -> bool:
        """Returns whether a value is better than the best one so far by more than `by`."""
        if value is None or best is None:
            return value is not None
        return (best - value if self.lower else value - best) > by

    def text(self, value: float | None) -> str:
        """Returns a value with its unit."""
        return number(value, ".4f") if self.key == "loss" else percent(value)


EVAL_METRICS = {
    "accuracy": Metric("accuracy", "accuracy"),
    "loss": Metric("loss", "validation loss", lower=True),
    "macro_f1": Metric("macro_f1", "macro F1"),
    "map": Metric("map", "mAP"),
    "top5": Metric("top5_accuracy", "top-5 accuracy"),
}
"""The choices of eval.best and train.stop_early.metric."""


def best_of(evals: Iterable[EvalRecord], metric: Metric) -> EvalRecord | None:
    """Returns the first evaluation with the best value; None if no value is known."""
    best: EvalRecord | None = None
    for record in evals:
        if metric.improves(metric.of(record), None if best is None else metric.of(best)):
            best = record
    return best


class ClassScores(NamedTuple):
    """The metrics of one class, 0..1.

    Attributes:
        precision: share of its predictions that are correct; None without predictions.
        recall: share of its samples that are recognized; None without samples.
        f1: harmonic mean of both; None without samples and predictions.
    """

    precision: float | None
    recall: float | None
    f1: float | None


def class_scores(correct: int, samples: int, predicted: int) -> ClassScores:
    """Returns the metrics of a class from its correct predictions, its samples and its predictions."""
    return ClassScores(
        correct / predicted if predicted else None,
        correct / samples if samples else None,
        2 * correct / (samples + predicted) if samples + predicted else None,
    )


def macro(scores: Iterable[ClassScores]) -> ClassScores:
    """Returns the means over the classes that have samples or predictions; there must be one.

    An unknown value counts as 0. These are the macro averages of scikit-learn with zero_division=0. If every
    predicted class has samples, the recall is the balanced accuracy.
    """
    rows = [row for row in scores if row.f1 is not None]
    means = (math.fsum(value or 0.0 for value in column) / len(rows) for column in zip(*rows, strict=True))
    return ClassScores(*means)


def calibration_error(bins: Sequence[Sequence[int]]) -> float:
    """Returns the expected calibration error (Guo et al. 2017, equation 3), 0..1.

    Args:
        bins: samples, correct predictions and the sum of the confidences in `UNITS`, for each of the `BINS`
            equal intervals of the confidence.
    """
    gaps = sum(abs(correct * UNITS - confidence) for _, correct, confidence in bins)
    return gaps / (UNITS * sum(samples for samples, _, _ in bins))


def result_text(record: EvalRecord) -> str:
    """Returns the result of an evaluation in a line: `accuracy 98.05 % (352 of 359), macro F1 98.01 %`.

    That of multi-label data begins with the mAP.
    """
    first = "" if record.map is None else f"mAP {percent(record.map)}, "
    text = f"{first}accuracy {accuracy_text(record.accuracy, record.correct, record.total)}"
    return text if record.macro_f1 is None else f"{text}, macro F1 {percent(record.macro_f1)}"
