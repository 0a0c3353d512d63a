"""Optimizers from torch, and the learning rate as a pure function of the progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from disttrain.config import OptimConfig, ScheduleConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Returns the configured optimizer over the trainable parameters of a model on its device.

    The fused kernels of torch are used; the learning rate is `config.lr` until `set_lr` is called.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = config.betas or (0.9, 0.999)
    match config.name:
        case "sgd":
            return SGD(
                parameters,
                lr=config.lr,
                momentum=0.9 if config.momentum is None else config.momentum,
                nesterov=bool(config.nesterov),
                weight_decay=config.weight_decay,
                fused=True,
            )
        case "adam":
            return Adam(parameters, config.lr, betas, weight_decay=config.weight_decay, fused=True)
        case "adamw":
            return AdamW(parameters, config.lr, betas, weight_decay=config.weight_decay, fused=True)
        case "muon":
            return MuonWithAdamW(
                model,
                lr=config.lr,
                momentum=0.95 if config.momentum is None else config.momentum,
                nesterov=True if config.nesterov is None else config.nesterov,
                betas=betas,
                weight_decay=config.weight_decay,
            )


class MuonWithAdamW(Optimizer):
    """torch's Muon for filters and hidden matrices, AdamW for everything else, as one optimizer.

    torch's Muon takes matrices only. A filter [O, I, H, W] is given to it as the matrix [O, H*W*I] that
    shares its memory; the order of the columns does not matter to an orthogonalisation. The last linear
    layer, biases and norms are AdamW's (Jordan et al. 2024, "Muon: An optimizer for hidden layers"). The
    update is scaled to the size of AdamW's (Liu et al. 2025, section 2.2): both take the same learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        head = {id(linear[-1].weight)} if linear else set()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        filters = [p for p in parameters if p.ndim in {2, 4} and id(p) not in head]
        others = [p for p in parameters if p.ndim not in {2, 4} or id(p) in head]
        self._matrices = [nn.Parameter(_matrix(p.detach(), p)) for p in filters]
        self._parts: list[Optimizer] = []
        groups = []
        if filters:
            self._parts.append(
                Muon(
                    self._matrices,
                    lr=lr,
                    momentum=momentum,
                    nesterov=nesterov,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
            groups.append({"params": filters})
        if others:
            self._parts.append(AdamW(others, lr, betas, weight_decay=weight_decay, fused=True))
            groups.append({"params": others})
        self._filters = filters
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step of both parts; a parameter without gradient is left alone."""
        assert closure is None
        for matrix, parameter in zip(self._matrices, self._filters, strict=True):
            matrix.grad = None if parameter.grad is None else _matrix(parameter.grad, parameter)
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the states of the parts."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            load_state(part, state)


def _matrix(values: Tensor, filters: Tensor) -> Tensor:
    """Returns [O, ...] as [O, columns] in the memory order of `filters`, without a copy if it is the same."""
    if filters.ndim == 4 and filters.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)


def lr_factor(schedule: ScheduleConfig, epochs_done: float, epochs: int) -> float:
    """Returns the learning rate at a point of the run, as a share of the peak.

    Args:
        schedule: shape and warm-up.
        epochs_done: samples seen so far divided by the samples of an epoch.
        epochs: length of the run.
    """
    warmup = schedule.warmup_epochs
    if warmup is None:
        warmup = 0.3 * epochs if schedule.name == "one_cycle" else 0.0
    if epochs_done < warmup:
        rise = epochs_done / warmup
        if schedule.name == "one_cycle":  # Smith & Topin 2018, with the start and shape of torch's OneCycleLR
            return 1 / 25 + (1 - 1 / 25) * _cosine(1 - rise)
        return rise
    rest = (epochs_done - warmup) / max(epochs - warmup, 1e-12)
    match schedule.name:
        case "constant":
            return 1.0
        case "cosine" | "one_cycle":
            return schedule.final_ratio + (1 - schedule.final_ratio) * _cosine(rest)
        case "linear":
            return schedule.final_ratio + (1 - schedule.final_ratio) * max(1 - rest, 0.0)
        case "step":
            return schedule.gamma ** sum(epochs_done >= milestone for milestone in schedule.milestones)


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Takes over the state of an optimizer of the same kind; its settings stay those of the config."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():  # NCHW as on disk; torch's fused kernels do not look at strides
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _cosine(position: float) -> float:
    """Falls from 1 at position 0 to 0 at position 1 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))
