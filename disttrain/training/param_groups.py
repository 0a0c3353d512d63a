"""Which optimizer settings each parameter has: by groups, weight decay and the depth of its layer."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import accumulate
from typing import Any, NamedTuple, cast

from torch import nn

from disttrain.config import GroupConfig, OptimConfig, OptimizerFields, ScheduleConfig
from disttrain.errors import UsageError


class ParamGroup(NamedTuple):
    """Parameters with the same settings; `settings.lr` has the factor of their layer."""

    settings: OptimConfig
    schedule: ScheduleConfig
    parameters: list[nn.Parameter]


def param_groups(config: OptimConfig, schedule: ScheduleConfig, model: nn.Module) -> list[ParamGroup]:
    """Returns the groups of trainable parameters: those of `optim.groups` in order, and last the rest.

    With layer decay, a group has a part for each layer, and where norms and biases are not decayed, two.

    Raises:
        UsageError: a group of the config matches no parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = None if config.layer_decay is None else layer_depths(model)
    found: list[ParamGroup] = []
    for i, group in enumerate(config.groups):
        names = [name for name in named if re.fullmatch(group.parameters, name)]
        if not names:
            raise UsageError(
                f"optim.groups.{i}.parameters: {group.parameters!r} matches no trainable parameter outside "
                f"the earlier groups: {', '.join(named) or 'there are none left'}"
            )
        settings = _settings(config, group)
        decayed = config.decay_norms_and_biases or group.weight_decay is not None
        parameters = {name: named.pop(name) for name in names}
        found += _parts(ParamGroup(settings, group.schedule or schedule, []), parameters, layers, decayed)
    return found + _parts(ParamGroup(config, schedule, []), named, layers, config.decay_norms_and_biases)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Returns how many layers are between the network's end and each parameter, by its name.

    A network of timm says itself which parameters are one layer. Of others, a block counts as one, such as
    layer1.0, and otherwise each module with weights, in the order in which the network creates them. A norm
    belongs to the layer before it.
    """
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        matcher = cast(Any, model).group_matcher(coarse=False)
        layers: dict[str, int] = group_parameters(model, matcher, reverse=True)
    else:
        blocks = {name: _block(name) for name, _ in model.named_parameters()}
        wide = {blocks[name] for name, value in model.named_parameters() if value.ndim > 1}
        order = list(dict.fromkeys(blocks.values()))
        numbers = dict(zip(order, accumulate(block in wide for block in order), strict=True))
        layers = {name: numbers[block] for name, block in blocks.items()}
    last = max(layers.values())
    return {name: last - layer for name, layer in layers.items()}


def _block(parameter: str) -> str:
    """Returns the block that a parameter is in, or its module if its name has no number of a block."""
    block = re.match(r"(?:.*?[._])??\d+(?=\.)", parameter)
    return block[0] if block else parameter.rpartition(".")[0]


def _parts(
    group: ParamGroup, named: dict[str, nn.Parameter], layers: dict[str, int] | None, decayed: bool
) -> list[ParamGroup]:
    """Returns the parts of a group whose parameters differ in learning rate or weight decay, in order."""
    found: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    lr, decay = group.settings.lr, group.settings.weight_decay
    for name, parameter in named.items():
        factor = 1.0 if layers is None else (group.settings.layer_decay or 1.0) ** layers[name]
        found[lr * factor, decay if decayed or parameter.ndim > 1 else 0.0].append(parameter)
    return [
        group._replace(
            settings=group.settings.model_copy(update={"lr": rate, "weight_decay": own}),
            parameters=parameters,
        )
        for (rate, own), parameters in found.items()
    ]


def _settings(config: OptimConfig, group: GroupConfig) -> OptimConfig:
    """Returns the optimizer settings of a group: its own, and those of `optim` for the rest."""
    own = {field: getattr(group, field) for field in OptimizerFields.model_fields}
    own = {field: value for field, value in own.items() if value is not None}
    if group.name not in (None, config.name):  # optional settings of `optim` are for another optimizer
        fields = OptimizerFields.model_fields
        own = {name: None for name in fields if OptimConfig.model_fields[name].default is None} | own
    return config.model_copy(update=own)
