"""A training pass before the start: what it refuses, with which remedy, and that it leaves no trace."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttrain.config import Config
from disttrain.data.epoch_plan import Plan
from disttrain.errors import UsageError
from disttrain.models import build_model
from disttrain.training.rng import preserve_rng_state
from disttrain.training.trial import try_training

INDEX: Any = SimpleNamespace(channels=3, height=4, width=4, classes=("a", "b", "c"))


def single_valued() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 4), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


class Grouped(nn.Module):
    """Normalizes groups of four images, so that a batch must be a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(images.flatten(1))
        return scores if not self.training else (scores.view(-1, 4, 3) - scores.mean()).flatten(0, 1)


class Gives(nn.Module):
    """Gives a value made of its scores in training mode, and the scores otherwise."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.made = nn.Linear(48, 3), made

    def forward(self, images: Tensor) -> Any:
        scores = self.head(images.flatten(1))
        return self.made(scores) if self.training else scores


class Restless(nn.Module):
    """Skips a layer at random, draws from every generator, and counts its passes in three places."""

    def __init__(self, rarely: float = 0.5) -> None:
        super().__init__()
        self.rarely, self.passes = rarely, 0
        self.head, self.block = nn.Linear(48, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("calls", torch.zeros(()))
        self.level = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        self.calls.add_(1)
        self.level.add_(torch.rand(()) + float(np.random.random()))
        scores: Tensor = self.head(images.flatten(1))
        return scores if random.random() < self.rarely else scores + self.block(scores)


def attempt(
    model: nn.Module,
    samples: int,
    *,
    batch_size: int,
    world_size: int = 1,
    accumulate: int = 1,
    remainder: str = "keep",
    name: str = "mine:Net",
) -> list[str]:
    """Tries a model on a data set of so many samples."""
    tree = {
        "name": "tiny",
        "data": {"name": "digits", "remainder": remainder},
        "model": {"name": name},
        "train": {"epochs": 1, "batch_size": batch_size, "accumulate": accumulate},
        "optim": {"name": "sgd", "lr": 0.1},
    }
    plan = Plan(0, (samples,), batch_size, remainder == "drop")
    with preserve_rng_state(torch.device("cpu")):
        return try_training(Config.model_validate(tree), model, INDEX, plan, world_size)


def refusal(model: nn.Module, samples: int, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        attempt(model, samples, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("samples", "settings", "when", "remedies"),
    [
        (9, {"batch_size": 4}, "in the last batch of an epoch, a rank gets",
         "train.batch_size=3 or 5, or data.remainder=drop"),
        # Rank 1 has no sample of the last batch, and trains on one with a weight of zero.
        (9, {"batch_size": 8, "world_size": 2}, "in the last batch of an epoch, a rank gets",
         "train.batch_size=10, or data.remainder=drop"),
        (10, {"batch_size": 8, "accumulate": 2}, "in the last batch of an epoch, a rank gets",
         "train.batch_size=6 or 10, or train.accumulate=1, or data.remainder=drop"),
        (8, {"batch_size": 4, "world_size": 2, "accumulate": 2}, "every micro-batch has",
         "train.batch_size=8, or train.accumulate=1"),
        (3, {"batch_size": 1, "remainder": "drop"}, "every micro-batch has", "train.batch_size=2"),
    ],
)  # fmt: skip
def test_batch_norm_of_a_single_value_is_refused_with_what_works(
    samples: int, settings: dict[str, Any], when: str, remedies: str
) -> None:
    message = refusal(single_valued(), samples, **settings)
    error = "ValueError: Expected more than 1 value per channel when training, got input size torch.Size"
    assert message == (
        f"model mine:Net: {when} only 1 image of 3x4x4, on which layer 1 cannot be trained "
        f"({error}([1, 2, 1, 1])); use {remedies}"
    )
    for remedy in remedies.split(", or "):
        key, _, values = remedy.partition("=")
        for value in values.split(" or "):
            changed = {key.rpartition(".")[2]: value if value == "drop" else int(value)}
            assert attempt(single_valued(), samples, **settings | changed) == []


def test_a_last_batch_that_fits_no_group_is_refused_with_what_works() -> None:
    assert attempt(Grouped(), 16, batch_size=8) == []
    message = refusal(Grouped(), 19, batch_size=8)
    assert message.startswith(
        "model mine:Net: in the last batch of an epoch, a rank gets only 3 images of 3x4x4"
    )
    assert message.endswith("use data.remainder=drop")
    assert attempt(Grouped(), 19, batch_size=8, remainder="drop") == []
    assert re.search(
        r"fails in training on 3 images of 3x4x4: RuntimeError: shape", refusal(Grouped(), 9, batch_size=3)
    )
    assert refusal(single_valued(), 1, batch_size=2).endswith("; it needs more training images")


def test_synchronised_batch_norm_needs_no_two_values_on_each_rank() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(single_valued())
    assert attempt(model, 9, batch_size=8, world_size=2) == []
    assert "layer 1 cannot be trained" in refusal(model, 9, batch_size=8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda scores: (scores, scores[:, :2]),
            r"returns a tuple of \[8, 3\], \[8, 2\] in training mode, expected scores \[8, 3\] first",
        ),
        (lambda scores: (scores, {"aux": scores}), r"a tuple of \[8, 3\], a value of type dict in training"),
        (lambda scores: (), "returns a tuple of nothing in training mode"),
        (lambda scores: {"logits": scores}, "returns a value of type dict in training mode"),
        (lambda scores: scores[:, :2], r"returns \[8, 2\] in training mode, expected scores \[8, 3\]"),
        (
            lambda scores: SimpleNamespace(logits=scores, aux_logits=scores),
            "return them alone, or a tuple of scores and auxiliary scores",
        ),
        (lambda scores: scores / 0 @ scores, "fails in training on .*: RuntimeError"),
    ],
)
def test_an_output_that_is_not_scores_is_refused(made: Callable[[Tensor], Any], message: str) -> None:
    assert re.search(message, refusal(Gives(made), 8, batch_size=8))


def test_auxiliary_heads_train() -> None:
    heads = Gives(lambda scores: (scores, None, heads.more(scores)))
    heads.more = nn.Linear(3, 3)
    assert attempt(heads, 8, batch_size=8) == []


def test_auxiliary_heads_of_torchvision_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(
        "torchvision:googlenet", num_classes=3, in_channels=3, image_size=(32, 32),
        args={"aux_logits": True, "init_weights": False},
    )  # fmt: skip
    index = SimpleNamespace(channels=3, height=32, width=32, classes=INDEX.classes)
    monkeypatch.setitem(globals(), "INDEX", index)
    assert attempt(model, 8, batch_size=8, name="torchvision:googlenet") == []
    assert any(name.startswith("aux1.") for name, _ in model.named_parameters())


def test_parameters_without_a_gradient_are_found() -> None:
    spare = Gives(lambda scores: scores)
    spare.spare, spare.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    assert attempt(spare, 8, batch_size=8) == ["spare.weight", "spare.bias"]
    assert attempt(Restless(rarely=0.5), 8, batch_size=8, world_size=2)[0] == "block.0.weight"
    assert attempt(Restless(rarely=0.0), 8, batch_size=8, world_size=2) == []
    frozen = single_valued().requires_grad_(False)
    assert "has no parameter to train" in refusal(frozen, 8, batch_size=8)


def test_the_trial_leaves_no_trace() -> None:
    model = Restless()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def draws() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    with preserve_rng_state(torch.device("cpu")):
        expected = draws()
    attempt(model, 8, batch_size=8, world_size=2)
    assert draws() == expected
    assert model.passes == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_has_no_independent_copy_gets_no_gradient() -> None:
    model = single_valued()
    model.forward = lambda images: nn.Sequential.forward(model, images)  # type: ignore[method-assign]
    assert attempt(model, 8, batch_size=8) == []
    assert all(parameter.grad is None for parameter in model.parameters())
