"""Learning rate and weight decay of each parameter: groups, layer decay, norms and biases."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from disttrain.config import OptimConfig, ScheduleConfig
from disttrain.models import build_model
from disttrain.training.optim import build_optimizer
from disttrain.training.param_groups import layer_depths, param_groups


def network() -> nn.Sequential:
    """Of four layers: two blocks, a hidden layer and the head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
        nn.Linear(4, 5),
        nn.Linear(5, 2),
    )


def table(**optim: Any) -> dict[str, tuple[float, float]]:
    """Returns the peak learning rate and the weight decay of each parameter."""
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = OptimConfig.model_validate({"lr": 0.4, "weight_decay": 0.1} | optim)
    optimizer, schedules = build_optimizer(config, ScheduleConfig(), model)
    for group, schedule in zip(optimizer.param_groups, schedules, strict=True):
        assert group["lr"] == schedule.peak
    return {
        names[id(parameter)]: (settings.lr, settings.weight_decay)
        for settings, _, parameters in param_groups(config, ScheduleConfig(), model)
        for parameter in parameters
    }


def test_without_the_keys_there_is_one_group() -> None:
    assert set(table().values()) == {(0.4, 0.1)}
    assert len(param_groups(OptimConfig(lr=0.4), ScheduleConfig(), network())) == 1


def test_norms_and_biases_without_decay_unless_their_group_says_so() -> None:
    group = {"parameters": r"4\..*", "weight_decay": 0.2}
    found = table(decay_norms_and_biases=False, groups=[group, {"parameters": r"3\..*", "lr": 1.0}])
    assert found == {
        **dict.fromkeys(("0.0.weight", "2.0.weight", "2.1.weight"), (0.4, 0.1)),
        **dict.fromkeys(("0.0.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"), (0.4, 0.0)),
        **dict.fromkeys(("2.0.bias", "2.1.bias"), (0.4, 0.0)),
        **dict.fromkeys(("4.weight", "4.bias"), (0.4, 0.2)),
        "3.weight": (1.0, 0.1),
        "3.bias": (1.0, 0.0),
    }


def test_each_layer_has_the_factor_of_its_depth() -> None:
    found = table(layer_decay=0.5, groups=[{"parameters": ".*bias", "lr": 0.8, "name": "adam"}])
    rates = {name: rate for name, (rate, _) in found.items()}
    assert rates == {
        "0.0.weight": 0.05,
        "0.0.bias": 0.1,
        "0.1.weight": 0.05,
        "0.1.bias": 0.1,
        "1.weight": 0.05,
        "1.bias": 0.1,
        "2.0.weight": 0.1,
        "2.0.bias": 0.2,
        "2.1.weight": 0.1,
        "2.1.bias": 0.2,
        "3.weight": 0.2,
        "3.bias": 0.4,
        "4.weight": 0.4,
        "4.bias": 0.8,
    }


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_layers_of_a_resnet_are_its_blocks(library: str) -> None:
    if library == "timm":
        pytest.importorskip("timm")
    shape = {"num_classes": 2, "in_channels": 3, "image_size": (32, 32)}
    depths = layer_depths(build_model(f"{library}:resnet18", args={}, **shape))  # type: ignore[arg-type]
    names = ["fc.bias", "layer4.1.bn2.bias", "layer4.0.conv1.weight", "layer1.0.conv1.weight", "bn1.bias"]
    assert [depths[name] for name in names] == [0, 1, 2, 8, 9]
    assert depths["conv1.weight"] == 9
