"""What `model.freeze` freezes, and what it says about patterns that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from disttrain.config import ModelConfig
from disttrain.errors import UsageError
from disttrain.models.freezing import freeze, freeze_for_good, named_by_freeze, unfreeze
from kit.configs import mistake


def network() -> nn.Sequential:
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Flatten(), nn.Linear(4, 2))


def config(freeze: str | list[str], unfreeze_epoch: float | None = None) -> ModelConfig:
    return ModelConfig(name="net", freeze=freeze, unfreeze_epoch=unfreeze_epoch)


def test_patterns_are_of_full_names() -> None:
    assert list(named_by_freeze(config(r"[0-2]\..*"), network())) == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    ]
    assert list(named_by_freeze(config([r"0\.bias", r".*weight"]), network())) == [
        *("0.weight", "0.bias", "1.weight", "2.weight", "5.weight")
    ]
    assert named_by_freeze(ModelConfig(name="net"), network()) == {}


def test_only_norms_with_all_parameters_frozen_stay_in_evaluation_mode() -> None:
    model = network().train()
    named = named_by_freeze(config([r"1\..*", r"2\.bias"]), model)
    freeze(model, named.values())
    for one in (model, copy.deepcopy(model)):
        for training in (True, False, True):
            one.train(training)
            assert [one[i].training for i in range(4)] == [training, False, training, training]
        assert [p.requires_grad for p in one.parameters()] == [
            *(True, True), *(False, False), *(True, False), *(True, True),
        ]  # fmt: skip
    unfreeze(model, named.values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[1].training
    assert not model.eval()[1].training


def test_what_is_unfrozen_later_is_not_frozen_for_good() -> None:
    for until, frozen in [(None, True), (0.5, False)]:
        model = network()
        named = freeze_for_good(config(r"0\..*", until), model)
        assert list(named) == ["0.weight", "0.bias"]
        assert [not parameter.requires_grad for parameter in named.values()] == [frozen] * 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "0",
            r"'0' matches no full name of a parameter, such as 0\.weight; the parts .* are 0, 1, 2, 5$",
        ),
        ([r"0\..*", "head"], r"'head' matches no full name"),
        (".*", r"leaves nothing to train, because it freezes all 8 .*; leave out .* such as 5\.bias$"),
    ],
)
def test_patterns_that_do_not_fit_are_named(pattern: str | list[str], message: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.freeze: {message}"):
        named_by_freeze(config(pattern), network())


def test_mistakes_in_the_config(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    assert "model.freeze: not a regular expression" in mistake(file, "model.freeze=[a, '(']")
    assert "model.unfreeze_epoch: model.freeze names no parameters" in mistake(
        file, "model.unfreeze_epoch=2.0"
    )
    assert "model.freeze: expected" in mistake(file, "model.freeze=3")
