"""The metrics of an evaluation, against values computed by hand and with plain formulas."""

from __future__ import annotations

import math

from msgspec import structs

from disttrain.runs.eval_metrics import (
    BINS,
    EVAL_METRICS,
    UNITS,
    ClassScores,
    best_of,
    calibration_error,
    class_scores,
    macro,
)
from kit.run_files import eval_record


def test_the_scores_of_a_class() -> None:
    assert class_scores(6, 8, 12) == (0.5, 0.75, 0.6)
    assert class_scores(0, 3, 0) == (None, 0.0, 0.0), "never predicted"
    assert class_scores(0, 0, 2) == (0.0, None, 0.0), "only predicted"
    assert class_scores(0, 0, 0) == (None, None, None)


def test_a_mean_leaves_out_classes_without_samples_and_predictions() -> None:
    counts = [(6, 8, 12), (0, 3, 0), (0, 0, 2), (0, 0, 0), (2, 5, 2)]
    assert macro(class_scores(*row) for row in counts) == ClassScores(
        (0.5 + 0 + 0 + 1) / 4, (0.75 + 0 + 0 + 0.4) / 4, (0.6 + 0 + 0 + 4 / 7) / 4
    )


def test_the_calibration_error_weighs_the_gap_of_each_bin() -> None:
    bins = [[0, 0, 0] for _ in range(BINS)]
    assert calibration_error([*bins[:-1], [4, 4, 4 * UNITS]]) == 0.0, "sure, and right"
    assert calibration_error([*bins[:-1], [4, 0, 4 * UNITS]]) == 1.0, "sure, and wrong"
    bins[7], bins[14] = [10, 4, 5 * UNITS], [30, 30, 30 * UNITS * 7 // 8]
    assert calibration_error(bins) == (1 + 3.75) / 40


def test_the_best_evaluation_is_the_first_with_the_best_known_value() -> None:
    accuracies, losses, f1 = (0.5, 0.8, 0.8, 0.7), (1.0, 0.4, 0.3, math.nan), (None, 0.6, 0.7, 0.9)
    evals = [
        structs.replace(eval_record(10 * (i + 1), accuracy), loss=loss, macro_f1=value)
        for i, (accuracy, loss, value) in enumerate(zip(accuracies, losses, f1, strict=True))
    ]
    found = {name: best_of(evals, metric) for name, metric in EVAL_METRICS.items()}
    epochs = {name: None if record is None else record.epoch for name, record in found.items()}
    assert epochs == {"accuracy": 2, "loss": 3, "macro_f1": 3, "map": None, "top5": None}, (
        "never with a loss of NaN"
    )


def test_an_improvement_is_more_than_the_least_one() -> None:
    accuracy, loss = EVAL_METRICS["accuracy"], EVAL_METRICS["loss"]
    assert accuracy.improves(0.5, None)
    assert not accuracy.improves(0.5, 0.5)
    assert not accuracy.improves(0.75, 0.5, 0.25)
    assert accuracy.improves(0.76, 0.5, 0.25)
    assert loss.improves(0.5, 0.6)
    assert not loss.improves(0.5, 0.6, 0.2)
    assert not loss.improves(0.7, 0.6)
    assert not loss.improves(None, 0.6)
