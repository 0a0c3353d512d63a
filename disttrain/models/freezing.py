"""Frozen parameters (`model.freeze`): which they are, and what keeps them as they are."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.config import ModelConfig, frozen_patterns
from disttrain.errors import UsageError


def named_by_freeze(config: ModelConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters that `model.freeze` names.

    Raises:
        UsageError: a pattern matches no parameter, or none would be left to train.
    """
    named = dict(model.named_parameters())
    found: set[str] = set()
    for pattern in frozen_patterns(config):
        names = [name for name in named if re.fullmatch(pattern, name)]
        if not names:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in named))
            raise UsageError(
                f"model.freeze: {pattern!r} matches no full name of a parameter, such as "
                f"{next(iter(named))}; the parts of {config.name} are {parts}"
            )
        found.update(names)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if found and not trained.keys() - found:
        raise UsageError(
            f"model.freeze: leaves nothing to train, because it freezes all {len(trained)} parameters of "
            f"{config.name}; leave out those of the last layer, such as {next(reversed(named))}"
        )
    return {name: parameter for name, parameter in trained.items() if name in found}


def freeze_for_good(config: ModelConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """Freezes what `model.freeze` names if nothing unfreezes it later; returns it in any case.

    Raises:
        UsageError: see `named_by_freeze`.
    """
    named = named_by_freeze(config, model)
    if config.unfreeze_epoch is None:
        freeze(model, named.values())
    return named


def freeze(model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """Freezes parameters. A batch norm with only frozen ones stays in evaluation mode, whatever `train` says.

    Otherwise its statistics would follow the new images, although its weights and the layers before it stay.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    for norm in _norms_of(model, parameters):
        norm.eval()
        norm.__dict__["train"] = partial(_stay, norm)


def unfreeze(model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """Undoes `freeze`."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    for norm in _norms_of(model, parameters):
        del norm.__dict__["train"]
        norm.train(model.training)


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def _norms_of(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[nn.Module]:
    """Returns the batch norms that have parameters, all of them among these."""
    known = {id(parameter) for parameter in parameters}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    return [norm for norm in norms if all(id(parameter) in known for parameter in norm.parameters())]
