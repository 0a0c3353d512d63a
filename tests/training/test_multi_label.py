"""Losses and metrics of multi-label data, against their definitions."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from disttrain.config import Config, TrainConfig
from disttrain.data.batches import Batch
from disttrain.errors import UsageError
from disttrain.preflight import check_label_keys, relative_class_weights
from disttrain.runs.records import EvalRecord
from disttrain.training.augment import Mix
from disttrain.training.collectives import Group
from disttrain.training.loss import evaluation_loss, is_correct, loss_sum
from disttrain.training.metrics import MultiLabelMetrics, add_label_metrics, average_precision

CPU = torch.device("cpu")


def config(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 1, "batch_size": 8, "loss": "bce"} | keys)


@pytest.fixture
def scores() -> torch.Tensor:
    return 3 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return (torch.rand(16, 5, generator=torch.Generator().manual_seed(1)) < 0.4).to(torch.uint8)


def test_bce_is_torchs_with_its_weights_and_a_mean_over_the_classes(
    scores: torch.Tensor, labels: torch.Tensor
) -> None:
    weights = torch.tensor([0.5, 1, 2, 4, 0])
    found = loss_sum(scores, labels, None, None, config(), weights)
    expected = F.binary_cross_entropy_with_logits(scores, labels.float(), pos_weight=weights)
    assert found.item() == pytest.approx(16 * expected.item(), rel=1e-6)
    plain = loss_sum(scores, labels, None, None, config(), None)
    assert evaluation_loss(scores, labels).item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_focal_loss_of_each_label(scores: torch.Tensor, labels: torch.Tensor) -> None:
    right = torch.where(labels > 0, scores.sigmoid(), 1 - scores.sigmoid()).double()
    expected = -((1 - right) ** 1.5 * right.log()).mean(1).sum()
    found = loss_sum(scores, labels, None, None, config(loss="focal", focal_gamma=1.5), None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    extreme = torch.tensor([[90.0, -90.0]], requires_grad=True)
    targets = torch.tensor([[0, 1]], dtype=torch.uint8)
    loss_sum(extreme, targets, None, None, config(loss="focal", focal_gamma=0.5), None).backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_smoothing_moves_the_targets_towards_a_half(scores: torch.Tensor, labels: torch.Tensor) -> None:
    found = loss_sum(scores, labels, None, None, config(label_smoothing=0.2), None)
    expected = F.binary_cross_entropy_with_logits(scores, 0.8 * labels.float() + 0.1)
    assert found.item() == pytest.approx(16 * expected.item(), rel=1e-6)


def test_mixed_images_have_mixed_targets(scores: torch.Tensor, labels: torch.Tensor) -> None:
    partners = labels.flip(0)
    mix = Mix(lam=0.3, shift=1, box=None)
    found = loss_sum(scores, labels, partners, mix, config(), None)
    expected = F.binary_cross_entropy_with_logits(scores, 0.3 * labels.float() + 0.7 * partners.float())
    assert found.item() == pytest.approx(16 * expected.item(), rel=1e-6)


def test_a_sample_is_correct_if_all_its_labels_are() -> None:
    scores = torch.tensor([[1.0, -1], [1, 1], [-1, -1], [0, 1]])
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=torch.uint8)
    assert is_correct(scores, labels).tolist() == [True, False, True, True]


def precision_by_definition(scores: list[float], labels: list[int]) -> float:
    """Returns the sum over the thresholds of precision times the gain in recall."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        total += sum(chosen) / len(chosen) * (sum(chosen) - before) / sum(labels)
        before = sum(chosen)
    return total


def test_average_precision_is_that_of_its_definition() -> None:
    random = np.random.default_rng(0)
    for samples in (1, 2, 7, 40):
        scores = random.integers(0, 12, samples).astype(np.float32)  # some are equal
        labels = random.integers(0, 2, samples).astype(np.uint8)
        labels[0] = 1
        expected = precision_by_definition(scores.tolist(), labels.tolist())
        assert average_precision(scores, labels) == pytest.approx(expected)
        order = random.permutation(samples)
        assert average_precision(scores[order], labels[order]) == average_precision(scores, labels)
    assert average_precision(np.array([3, 2, 1], np.float32), np.array([1, 1, 0], np.uint8)) == 1
    assert average_precision(np.array([3, 2], np.float32), np.array([0, 0], np.uint8)) is None


def test_the_metrics_of_batches_are_those_of_all_samples(scores: torch.Tensor, labels: torch.Tensor) -> None:
    labels[:, 4] = 0  # a class without samples
    metrics = MultiLabelMetrics(CPU, 5)
    for part in (slice(0, 5), slice(5, 16)):
        batch = Batch(torch.empty(0), labels[part], np.arange(16)[part])
        metrics.add(batch, scores[part], scores[part])
    results = metrics.results(Group(0, 1, CPU))
    predicted, present = scores > 0, labels > 0
    assert [(row.correct, row.samples, row.predicted) for row in results] == [
        (int((predicted & present)[:, c].sum()), int(present[:, c].sum()), int(predicted[:, c].sum()))
        for c in range(5)
    ]
    precisions = [average_precision(scores[:, c].numpy(), labels[:, c].numpy()) for c in range(5)]
    assert [row.average_precision for row in results] == precisions
    assert precisions[4] is None
    sums = metrics.sums()
    assert (sums.samples, sums.correct) == (16, is_correct(scores, labels).sum())
    assert math.fsum(metrics.losses()) == pytest.approx(evaluation_loss(scores, labels).item())
    record = EvalRecord(loss=0.5, accuracy=0, correct=0, total=16, step=1, epoch=1)
    add_label_metrics(record, results)
    assert record.map == pytest.approx(np.mean(precisions[:4]))
    hits = int((predicted & present).sum())
    assert record.micro_f1 == pytest.approx(2 * hits / int(predicted.sum() + present.sum()))


def test_without_a_finite_loss_there_is_no_map() -> None:
    metrics = MultiLabelMetrics(CPU, 2)
    labels = torch.tensor([[1, 0]], dtype=torch.uint8)
    metrics.add(Batch(torch.empty(0), labels, np.array([0])), torch.full((1, 2), math.nan), labels.float())
    record = EvalRecord(loss=math.nan, accuracy=0, correct=0, total=1, step=1, epoch=1)
    add_label_metrics(record, metrics.results(Group(0, 1, CPU)))
    assert record.map is None


def test_the_worst_mistakes_say_what_was_missed_and_what_is_not_there() -> None:
    scores = torch.tensor([[4.0, -9], [3, -2], [-1, -1]])
    labels = torch.tensor([[0, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    metrics = MultiLabelMetrics(CPU, 2)
    metrics.add(Batch(torch.empty(0), labels, np.array([10, 11, 12])), scores, scores)
    found = sorted(metrics.mistakes(), reverse=True)
    assert [(one.id, one.label, one.predicted) for one in found] == [(10, -1, 0), (11, 1, -1)]
    chances = torch.tensor([4.0, 2.0]).sigmoid().tolist()
    assert [one.probability for one in found] == pytest.approx(chances)


def index(*, multi_label: bool = True, counts: tuple[int, ...] = (10, 20, 100)) -> Any:
    split = SimpleNamespace(class_counts=counts, samples=100)
    return SimpleNamespace(
        name="set", classes=("ant", "bee", "cat"), splits={"train": split}, multi_label=multi_label
    )


def test_balanced_weights_are_those_without_the_label_for_each_with_it() -> None:
    assert relative_class_weights(config(class_weights="balanced"), index()) == [9, 4, 0.01]
    assert relative_class_weights(config(class_weights=[3.0, 0.0, 1.0]), index()) == [3, 0, 1]
    with pytest.raises(UsageError, match="class bee has no sample in the train split"):
        relative_class_weights(config(class_weights="balanced"), index(counts=(1, 0, 2)))


@pytest.mark.parametrize(
    ("keys", "multi_label", "message"),
    [
        ({"train.loss": "cross_entropy"}, True, "those of set have several; use train.loss=bce"),
        ({"eval.best": "top5"}, True, "use eval.best=map"),
        ({"train.stop_early": {"metric": "top5", "patience_epochs": 1}}, True, "train.stop_early.metric=map"),
        ({"data.sampling": "balanced"}, True, "use data.sampling=uniform"),
        ({"train.loss": "bce"}, False, "each sample of set has one label; use train.loss=cross_entropy"),
        ({"train.loss": "focal", "eval.best": "map"}, False, "use eval.best=accuracy"),
    ],
)
def test_keys_that_do_not_suit_the_labels_are_refused(
    keys: dict[str, Any], multi_label: bool, message: str
) -> None:
    sections: dict[str, Any] = {
        "name": "x", "data": {"name": "set"}, "model": {"name": "lenet5"}, "optim": {"lr": 0.1}, "eval": {},
        "train": {"epochs": 1, "batch_size": 8, "loss": "bce" if multi_label else "cross_entropy"},
    }  # fmt: skip
    check_label_keys(Config(**sections), index(multi_label=multi_label))
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections[section] = sections[section] | {name: value}
    with pytest.raises(UsageError, match=message):
        check_label_keys(Config(**sections), index(multi_label=multi_label))
