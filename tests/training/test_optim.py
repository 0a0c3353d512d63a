"""Optimizers against torch's own, and the learning rate by exact values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from disttrain.config import OptimConfig, ScheduleConfig
from disttrain.errors import UsageError
from disttrain.training.optim import (
    ConvMuon,
    LrSchedule,
    build_optimizer,
    load_state,
    lr_factor,
    set_lr,
    start_momentum,
    take_step,
)


def network(channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    return layers.to(memory_format=torch.channels_last) if channels_last else layers


def take_steps(
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    first: int = 0,
    take: Callable[[Optimizer], object] = take_step,
) -> None:
    """Takes steps along random gradients, which depend on the number of the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in its memory order
        take(optimizer)
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def optimizer_for(model: nn.Module, name: str, **options: Any) -> Optimizer:
    config = OptimConfig(name=name, **{"lr": 1e-2} | options)  # type: ignore[arg-type]
    return build_optimizer(config, ScheduleConfig(), model)[0]


# --- torch's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"name": "sgd"}, lambda p: SGD(p, 0.01, momentum=0.9)),
        ({"name": "sgd", "momentum": 0.0}, lambda p: SGD(p, 0.01)),
        (
            {"name": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
            lambda p: SGD(p, 0.01, momentum=0.8, nesterov=True, weight_decay=0.1),
        ),
        ({"name": "adam"}, lambda p: Adam(p, 0.01)),
        (
            {"name": "adam", "betas": (0.8, 0.9), "weight_decay": 0.1},
            lambda p: Adam(p, 0.01, (0.8, 0.9), weight_decay=0.1),
        ),
        ({"name": "adamw"}, lambda p: AdamW(p, 0.01, weight_decay=0)),
        (
            {"name": "adamw", "betas": (0.8, 0.9), "weight_decay": 0.1},
            lambda p: AdamW(p, 0.01, (0.8, 0.9), weight_decay=0.1),
        ),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_are_those_of_torch(options: dict[str, Any], reference: Any, channels_last: bool) -> None:
    model, other = network(channels_last), network()
    take_steps(model, optimizer_for(model, **options), 5)
    take_steps(other, reference(other.parameters()), 5)
    for found, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_step_is_that_of_the_optimizer_to_the_bit(name: str) -> None:
    model, other = network(), network()
    take_steps(model, optimizer_for(model, name, weight_decay=0.1), 3)
    take_steps(other, optimizer_for(other, name, weight_decay=0.1), 3, take=lambda each: each.step())
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_frozen_parameters_stay(name: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    before = weights(model)
    take_steps(model, optimizer_for(model, name, weight_decay=0.1), 2)
    moved = [not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True)]
    assert moved == [False, False, *[True] * (len(before) - 2)]


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}, {"momentum": 0.0}])
def test_sgd_steps_where_a_layer_is_skipped_at_first(options: dict[str, Any]) -> None:
    model, expected = network(), network()
    optimizer = optimizer_for(model, "sgd", **options)
    start_momentum(optimizer)
    reference = SGD(expected.parameters(), 0.01, **{"momentum": 0.9} | options)
    for step, skipped in enumerate(([0, 3], [3], [0], [])):
        for net in (model, expected):
            for place in (0, 3):
                net[place].requires_grad_(place not in skipped)  # then `take_steps` gives it no gradient
        take_steps(model, optimizer, 1, first=step)
        take_steps(expected, reference, 1, first=step)
        torch.testing.assert_close(weights(model), weights(expected))


# --- Muon -------------------------------------------------------------------------------------------


def test_muon_takes_orthogonal_steps_of_filters_and_hidden_layers() -> None:
    model = network()
    before = weights(model)
    take_steps(model, optimizer_for(model, "muon", momentum=0.0, nesterov=False), 1)
    changes = [old - new for old, new in zip(before, weights(model), strict=True)]
    hidden = [change for change in changes if change.ndim > 1][:-1]
    assert [tuple(change.shape) for change in hidden] == [(8, 3, 3, 3), (6, 8, 3, 3), (10, 24)]
    for change in hidden:
        matrix = change.flatten(1)
        scale = 0.01 * 0.2 * max(matrix.shape) ** 0.5  # Liu et al. 2025, section 2.2
        singular_values = torch.linalg.svdvals(matrix) / scale
        assert singular_values.min() > 0.5  # Newton-Schulz brings them near 1 only
        assert singular_values.max() < 1.3


def test_beside_muon_the_head_biases_and_norms_take_adamw_steps() -> None:
    model, other = network(), network()
    take_steps(model, optimizer_for(model, "muon", weight_decay=0.1), 3)
    take_steps(other, AdamW(other.parameters(), 0.01, weight_decay=0.1), 3)
    named = zip(model.named_parameters(), other.parameters(), strict=True)
    equal = {name for (name, mine), theirs in named if torch.allclose(mine, theirs, atol=1e-6)}
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert equal == expected | {"7.weight"}


def test_muon_does_not_depend_on_the_memory_order() -> None:
    model, other = network(), network(channels_last=True)
    for net in (model, other):
        take_steps(net, optimizer_for(net, "muon", weight_decay=0.1), 4)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(weights(other), weights(model), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()  # Newton-Schulz computes in bfloat16


def test_muon_reads_gradients_of_another_memory_order() -> None:
    nets = [network(channels_last=True), network(channels_last=True)]
    for net, layout in zip(nets, (torch.channels_last, torch.contiguous_format), strict=True):
        optimizer = optimizer_for(net, "muon")
        for parameter in net.parameters():
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.grad = values.contiguous(memory_format=layout) if parameter.ndim == 4 else values
        optimizer.step()
    for found, expected in zip(*map(weights, nets), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layers", [nn.Linear(24, 3), nn.Conv2d(3, 4, 3)], ids=["head", "filters"])
def test_muon_works_where_one_part_has_few_parameters(layers: nn.Module) -> None:
    before = weights(layers)
    optimizer = optimizer_for(layers, "muon")
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, weights(layers), strict=True))


def test_muon_leaves_parameters_without_gradient_alone() -> None:
    model = network()
    optimizer = optimizer_for(model, "muon", weight_decay=0.1)
    take_steps(model, optimizer, 1)
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_the_size_of_muons_updates(adjust_lr: str) -> None:
    model = network()
    before = weights(model)
    take_steps(model, optimizer_for(model, "muon", momentum=0.0, adjust_lr=adjust_lr), 1)
    for old, new in zip(before, weights(model), strict=True):
        if old.ndim == 4:
            rows, columns = old.flatten(1).shape
            factor = (
                max(1, rows / columns) ** 0.5 if adjust_lr == "original" else 0.2 * max(rows, columns) ** 0.5
            )
            size = (old - new).flatten(1).norm() / min(rows, columns) ** 0.5
            assert size.item() == pytest.approx(0.01 * factor, rel=0.3)


def test_muon_normalizes_filters_before_each_step() -> None:
    model = network()
    optimizer = optimizer_for(model, "muon", normalize_weights=True)
    set_lr(optimizer, [0.0] * len(optimizer.param_groups))
    before = weights(model)
    take_steps(model, optimizer, 1)
    for old, new in zip(before, weights(model), strict=True):
        if old.ndim == 4:
            torch.testing.assert_close(new, old * len(old) ** 0.5 / old.norm())


def test_muon_leaves_filters_without_a_gradient_as_they_are() -> None:
    model = network()
    optimizer = optimizer_for(model, "muon", normalize_weights=True, weight_decay=0.1)
    before = weights(model)
    optimizer.step()
    for old, new in zip(before, weights(model), strict=True):
        assert torch.equal(old, new)


# --- Groups -----------------------------------------------------------------------------------------


def grouped(model: nn.Module, *groups: dict[str, Any], **options: Any) -> tuple[Optimizer, list[LrSchedule]]:
    config = OptimConfig.model_validate({"name": "sgd", "lr": 0.1, "groups": list(groups)} | options)
    return build_optimizer(config, ScheduleConfig(name="linear"), model)


def test_a_group_is_trained_in_its_own_way_and_the_rest_as_before() -> None:
    model, alone, rest = network(), network(), network()
    groups = (
        {"parameters": r"\d\.bias", "lr": 0.5},
        {"parameters": "7.*", "name": "adamw", "weight_decay": 0.1},
    )
    optimizer, rates = grouped(model, *groups, momentum=0.5)
    assert [rate.peak for rate in rates] == [0.5, 0.1, 0.1]
    take_steps(model, optimizer, 3)
    take_steps(rest, SGD(rest.parameters(), 0.1, momentum=0.5), 3)
    biases = SGD([{"params": [p], "lr": 0.5} for p in alone.parameters()], 0.5, momentum=0.5)
    take_steps(alone, biases, 3)
    head = network()
    take_steps(head, AdamW(head.parameters(), 0.1, weight_decay=0.1), 3)
    for (name, found), *others in zip(
        model.named_parameters(), alone.parameters(), rest.parameters(), head.parameters(), strict=True
    ):
        which = 0 if name.endswith("bias") else 2 if name.startswith("7") else 1
        torch.testing.assert_close(found, others[which], msg=name)


def test_the_first_group_that_matches_has_the_parameter() -> None:
    optimizer, rates = grouped(
        network(), {"parameters": ".*weight", "lr": 1.0}, {"parameters": ".*", "lr": 2.0}
    )
    assert [rate.peak for rate in rates] == [1.0, 2.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights(network()))


def test_groups_of_muon_keep_its_settings_unless_they_have_another_name() -> None:
    with_muon, _ = grouped(
        network(), {"parameters": "0.*", "lr": 0.01}, name="muon", momentum=0.3, nesterov=False
    )
    momenta = [part.momentum for part in _muons(with_muon)]
    assert momenta == [0.3, 0.3]
    other, _ = grouped(network(), {"parameters": "0.*", "name": "muon"}, momentum=0.3)
    assert [part.momentum for part in _muons(other)] == [0.95]


def _muons(optimizer: Any) -> list[Any]:
    parts = [part for part in optimizer.inner if isinstance(part, ConvMuon)]
    return [SimpleNamespace(momentum=part.param_groups[0]["momentum"]) for part in parts]


def test_a_group_without_parameters_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(
        UsageError, match=r"optim.groups.1.parameters: 'nose' matches no .*: 0.weight, "
    ) as error:
        grouped(network(), {"parameters": ".*bias"}, {"parameters": "nose"})
    assert error.value.exit_code == 2
    assert "0.bias" not in str(error.value)


def test_each_group_has_a_schedule() -> None:
    schedule = {"name": "linear", "end_epoch": 3}
    _, rates = grouped(network(), {"parameters": ".*bias", "lr": 1.0, "schedule": schedule})
    assert [[rate.at(now, 8) for rate in rates] for now in (0, 1.5, 4)] == [
        [1.0, 0.1],
        [0.5, pytest.approx(0.1 * 6.5 / 8)],
        [0.0, 0.05],
    ]


def test_a_saved_state_of_groups_goes_on_bit_by_bit() -> None:
    groups = (
        {"parameters": ".*bias", "name": "adamw", "lr": 0.01},
        {"parameters": "7.*", "name": "sgd", "lr": 0.1},
    )

    def make(model: nn.Module) -> Optimizer:
        return grouped(model, *groups, name="muon", lr=0.01, normalize_weights=True)[0]

    model, other = network(), network()
    optimizer = make(model)
    take_steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    take_steps(model, optimizer, 3, first=3)
    other.load_state_dict(saved[0])
    going_on = make(other)
    going_on.load_state_dict(saved[1])
    take_steps(other, going_on, 3, first=3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(model), weights(other), strict=True))


def test_the_state_of_a_single_number_is_loaded() -> None:
    """It has as many values as Adam's step counter."""
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    optimizer, resumed = optimizer_for(model, "adam"), optimizer_for(other, "adam")
    take_steps(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    load_state(resumed, copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        take_steps(each, its, 2, first=2)
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize(
    ("older", "before", "after"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
)
def test_muon_resumes_in_any_memory_order(older: bool, before: bool, after: bool) -> None:
    """Older checkpoints have momenta as matrices, whose order is not known."""
    model, other = network(before), network(after)
    optimizer = optimizer_for(model, "muon")
    take_steps(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    if older:
        for values in saved["parts"][0]["state"].values():
            buffer = values["momentum_buffer"]
            if buffer.ndim == 4:
                values["momentum_buffer"] = (buffer.permute(0, 2, 3, 1) if before else buffer).flatten(1)
    other.load_state_dict(model.state_dict())
    resumed = optimizer_for(other, "muon")
    load_state(resumed, saved)
    take_steps(model, optimizer, 2, first=3)
    take_steps(other, resumed, 2, first=3)
    for found, expected in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- Both kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_saved_state_goes_on_bit_by_bit(name: str, channels_last: bool) -> None:
    model = network(channels_last)
    optimizer = optimizer_for(model, name, weight_decay=0.01)
    take_steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    take_steps(model, optimizer, 3, first=3)
    other = network(channels_last)
    other.load_state_dict(saved[0])
    going_on = optimizer_for(other, name, weight_decay=0.01)
    going_on.load_state_dict(saved[1])
    take_steps(other, going_on, 3, first=3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(model), weights(other), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_set_lr_reaches_every_parameter(name: str) -> None:
    model = network()
    optimizer = optimizer_for(model, name)
    before = weights(model)
    set_lr(optimizer, [0.0] * len(optimizer.param_groups))
    take_steps(model, optimizer, 1)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))
    changes = []
    for lr in (1e-3, 2e-3):
        net = network()
        optimizer = optimizer_for(net, name)
        set_lr(optimizer, [lr] * len(optimizer.param_groups))
        start = weights(net)
        take_steps(net, optimizer, 1)
        changes.append([new - old for old, new in zip(start, weights(net), strict=True)])
    for small, large in zip(*changes, strict=True):
        assert small.any()
        torch.testing.assert_close(large, 2 * small, rtol=1e-2, atol=1e-6)


# --- The learning rate ------------------------------------------------------------------------------

EVERY_SCHEDULE: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"final_ratio": 0.1},
    "linear": {"final_ratio": 0.1},
    "step": {"milestones": [4.0, 8.0]},
    "one_cycle": {"final_ratio": 0.01},
}


def schedule(name: str, **options: Any) -> ScheduleConfig:
    return ScheduleConfig(name=name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "expected"),  # by epochs done of 10
    [
        ("constant", {}, {0: 1, 5: 1, 10: 1}),
        ("constant", {"warmup_epochs": 2.0}, {0: 0, 1: 0.5, 2: 1, 10: 1}),
        ("constant", {"warmup_epochs": 10.0}, {0: 0, 5: 0.5, 10: 1}),
        ("cosine", {}, {0: 1, 2.5: 0.5 + 0.5**1.5, 5: 0.5, 10: 0}),
        ("cosine", {"warmup_epochs": 2.0, "final_ratio": 0.2}, {0: 0, 1: 0.5, 2: 1, 6: 0.6, 10: 0.2}),
        ("linear", {}, {0: 1, 2.5: 0.75, 5: 0.5, 10: 0}),
        ("linear", {"warmup_epochs": 0.5, "final_ratio": 0.1}, {0.25: 0.5, 0.5: 1, 5.25: 0.55, 10: 0.1}),
        ("step", {"milestones": [4.0, 8.0]}, {0: 1, 3.999: 1, 4: 0.1, 7.9: 0.1, 8: 0.01, 10: 0.01}),
        ("step", {"milestones": [5.0], "gamma": 0.5, "warmup_epochs": 1.0}, {0.5: 0.5, 1: 1, 5: 0.5}),
        ("one_cycle", {}, {0: 0.04, 1.5: 0.52, 3: 1, 6.5: 0.5, 10: 0}),
        ("one_cycle", {"warmup_epochs": 5.0, "final_ratio": 0.1}, {0: 0.04, 5: 1, 7.5: 0.55, 10: 0.1}),
        ("one_cycle", {"warmup_epochs": 0.0}, {0: 1, 5: 0.5, 10: 0}),
    ],
)
def test_learning_rate(name: str, options: dict[str, Any], expected: dict[float, float]) -> None:
    found = {epochs: lr_factor(schedule(name, **options), epochs, 10) for epochs in expected}
    assert found == pytest.approx(expected, abs=1e-12)


def test_one_cycle_is_that_of_torch() -> None:
    steps, warmup = 101, 30
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=(warmup + 1) / steps, cycle_momentum=False
    )
    config = schedule("one_cycle", warmup_epochs=float(warmup), final_ratio=1 / 25 / 1e4)
    for step in range(steps):
        expected = theirs.get_last_lr()[0]
        assert lr_factor(config, step, steps - 1) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


@pytest.mark.parametrize("warmup", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_the_rate_is_a_share_of_the_peak_and_has_no_jumps(name: str, warmup: float) -> None:
    config = schedule(name, warmup_epochs=warmup, **EVERY_SCHEDULE[name])
    rates = [lr_factor(config, i / 1000, 10) for i in range(10_001)]
    assert min(rates) >= 0
    assert max(rates) == pytest.approx(1, abs=1e-9)
    jumps = [i / 1000 for i in range(1, 10_001) if abs(rates[i] - rates[i - 1]) > 0.01]
    assert jumps == (config.milestones if name == "step" else [])


@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_the_rate_stays_after_the_end(name: str) -> None:
    config = schedule(name, **EVERY_SCHEDULE[name])
    assert lr_factor(config, 10.5, 10) == pytest.approx(lr_factor(config, 10, 10), abs=1e-9)
