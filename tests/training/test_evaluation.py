"""The evaluation inside training, against sums written out by hand."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch.nn.functional as F
from torch import Tensor

from disttrain.training.evaluation import evaluate
from disttrain.training.state import Progress
from kit.training import (
    CLASSES,
    NAMES,
    QUIET,
    batch_of,
    make_state,
    network,
    run,
    same,
    weights_of,
    with_,
)

pytestmark = pytest.mark.usefixtures("clean_process")


def macro_by_hand(labels: Tensor, predicted: Tensor) -> list[Any]:
    """Returns the means of precision, recall and F1 as scikit-learn defines them, with zero_division=0."""
    rows = []
    for label in set(labels.tolist()) | set(predicted.tolist()):
        true = int(((labels == label) & (predicted == label)).sum())
        false, missed = int((predicted == label).sum()) - true, int((labels == label).sum()) - true
        precision, recall = true / max(1, true + false), true / max(1, true + missed)
        rows.append((precision, recall, true and 2 * precision * recall / (precision + recall)))
    return [pytest.approx(sum(column) / len(rows)) for column in zip(*rows, strict=True)]


def calibration_by_hand(chances: Tensor, labels: Tensor) -> float:
    """Returns the expected calibration error of Guo et al. 2017 in 15 bins."""
    confidence, predicted = chances.max(1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].float().mean()
            error += float(inside.float().mean() * (accuracy - confidence[inside].mean()).abs())
    return error


@pytest.mark.parametrize("tta", ["none", "flip", "multi_view"])
@pytest.mark.parametrize("samples", [1, 15, 16, 17, 150])
def test_evaluation_counts_every_sample_once(samples: int, tta: Any) -> None:
    state = with_(make_state(network(dropout=0.5, norm=True), val_samples=samples), eval={"tta": tta})
    model = copy.deepcopy(state.bare_model).eval()
    images, labels = batch_of(2, range(samples), samples)
    plain = logits = model(images)
    if tta == "flip":
        logits = (plain + model(images.flip(3))) / 2
    elif tta == "multi_view":
        logits = (plain + model(images.flip(3))) / 4
        for index in ([1, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 4]):  # reflected at a border of one pixel
            seen = images[:, :, index][:, :, :, index]
            logits = logits + (model(seen) + model(seen.flip(3))) / 8
    correct, plain_correct = (int((scores.argmax(1) == labels).sum()) for scores in (logits, plain))
    before = weights_of(state.bare_model)
    found = evaluate(state, tta, Progress(step=7, epoch=2), QUIET)
    assert found is not None
    predicted = logits.argmax(1)
    assert msgspec.to_builtins(found.record) == {
        "kind": "eval",
        "loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5),
        "accuracy": correct / samples,
        "correct": correct,
        "total": samples,
        "skipped": 0,
        "step": 7,
        "epoch": 2,
        **dict(
            zip(
                ("macro_precision", "macro_recall", "macro_f1"), macro_by_hand(labels, predicted), strict=True
            )
        ),
        "calibration_error": pytest.approx(calibration_by_hand(logits.detach().softmax(1), labels), abs=1e-5),
        **(
            {}
            if tta == "none"
            else {"tta": tta, "plain_accuracy": plain_correct / samples, "plain_correct": plain_correct}
        ),
    }
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    assert found.confusion.tolist() == [[pairs[i, j] for j in range(CLASSES)] for i in range(CLASSES)]
    assert (found.classes, found.top5_correct) == (NAMES, samples)
    chances = logits.softmax(1).amax(1).tolist()
    wrong = sorted((predicted != labels).nonzero().flatten().tolist(), key=lambda i: -chances[i])
    assert [(one.id, one.label, one.predicted) for one in found.mistakes] == [
        (i, int(labels[i]), int(predicted[i])) for i in wrong[:24]
    ]
    assert same(weights_of(state.bare_model), before)
    assert state.bare_model.training  # as it was


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_evaluations_come_when_due_and_at_the_end(every: int, epochs: list[int]) -> None:
    recorder = run(with_(make_state(epochs=3), eval={"every_epochs": every}))
    assert [record.epoch for record in recorder.evaluations] == epochs
    assert [record.step for record in recorder.evaluations] == [3 * epoch for epoch in epochs]


def test_test_time_augmentation_can_wait_for_the_end() -> None:
    sections = {"tta": "multi_view", "tta_when": "end"}
    recorder = run(with_(make_state(epochs=3), eval=sections))
    assert [record.tta for record in recorder.evaluations] == [None, None, "multi_view"]
