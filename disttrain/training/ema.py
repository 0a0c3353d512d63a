"""The exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """The exponential moving average of a model's weights and floating-point buffers.

    It starts with the values after the first step. Integers are copied. (torch's AveragedModel copies its
    counter to the device in every step, and waits for it.)

    Args:
        model: on its device, not wrapped.
        decay: weight of the old average, 0..1; the model has weight 1 - decay.

    Attributes:
        module: a copy of the model with the averages.
    """

    n_averaged: Tensor  # steps averaged so far; on the host

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.register_buffer("n_averaged", torch.tensor(0))
        self._decay = decay

    def update(self, model: nn.Module) -> None:
        """Averages in the model after a step."""
        self.average(model)
        self.n_averaged += 1

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Does the part of `update` that runs on the device; does not count the step."""
        own: list[Tensor] = []
        new: list[Tensor] = []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point() or average.is_complex():
                own.append(average)
                new.append(value)
            else:
                average.copy_(value)
        if int(self.n_averaged) == 0:
            torch._foreach_copy_(own, new)
        else:
            torch._foreach_lerp_(own, new, 1 - self._decay)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
