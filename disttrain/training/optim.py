"""The optimizers, and the learning rate as a pure function of the progress."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from disttrain.config import OptimConfig, ScheduleConfig
from disttrain.training.param_groups import param_groups


class LrSchedule(NamedTuple):
    """The learning rate of a parameter group over the run."""

    peak: float
    """The learning rate at a factor of 1."""
    schedule: ScheduleConfig
    """The factor over the run; see `lr_factor`."""

    def at(self, epochs_done: float, epochs: int) -> float:
        """Returns the learning rate; for the arguments see `lr_factor`."""
        return self.peak * lr_factor(self.schedule, epochs_done, epochs)


def build_optimizer(
    config: OptimConfig, schedule: ScheduleConfig, model: nn.Module
) -> tuple[Optimizer, list[LrSchedule]]:
    """Returns the configured optimizer and the learning rate of each of its parameter groups.

    Uses torch's fused kernels. The optimizer has the peak learning rates until `set_lr` is called. Frozen
    parameters are left out.

    Raises:
        UsageError: a group of the config matches no parameter.
    """
    _keep_compiler_out()
    parts: list[Optimizer] = []
    rates: list[LrSchedule] = []
    for settings, shape, parameters in param_groups(config, schedule, model):
        rate = LrSchedule(settings.lr, shape)
        if settings.name == "muon":
            filters = [p for p in parameters if p.ndim in {2, 4} and p is not _head(model)]
            if filters:
                parts.append(ConvMuon(filters, settings))
                rates.append(rate)
            parameters = [p for p in parameters if p.ndim not in {2, 4} or p is _head(model)]
        if parameters:
            parts.append(_torch_optimizer(settings, parameters))
            rates.append(rate)
    return (parts[0] if len(parts) == 1 else CombinedOptimizer(parts)), rates


def _torch_optimizer(settings: OptimConfig, parameters: list[nn.Parameter]) -> Optimizer:
    betas, decay = settings.betas or (0.9, 0.999), settings.weight_decay
    if settings.name == "sgd":
        return SGD(
            parameters,
            lr=settings.lr,
            momentum=0.9 if settings.momentum is None else settings.momentum,
            nesterov=bool(settings.nesterov),
            weight_decay=decay,
            fused=True,
        )
    if settings.name == "adam":
        return Adam(parameters, settings.lr, betas, weight_decay=decay, fused=True)
    return AdamW(parameters, settings.lr, betas, weight_decay=decay, fused=True)  # adamw, or the rest of muon


def _head(model: nn.Module) -> Tensor | None:
    """Returns the weight of the last linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].weight if linear else None


def orthogonalized(matrices: Tensor) -> Tensor:
    """Returns nearly orthogonal matrices close to these, by five Newton-Schulz steps (Jordan et al. 2024).

    Args:
        matrices: float [N, rows, columns].

    Returns:
        bfloat16 [N, rows, columns], with singular values between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class ConvMuon(Optimizer):
    """Muon for convolution filters and hidden matrices (Jordan et al. 2024).

    It takes a filter [O, I, H, W] as a matrix [O, H*W*I] in the same memory; the order of the columns does
    not matter for the orthogonalisation. All matrices of a shape are orthogonalised together, because a
    single one is too small to use a whole GPU.

    Args:
        filters: parameters of 2 or 4 dimensions.
        settings: its lr, momentum, nesterov, weight_decay, adjust_lr and normalize_weights are used.
    """

    def __init__(self, filters: list[nn.Parameter], settings: OptimConfig) -> None:
        defaults = {
            "lr": settings.lr,
            "momentum": 0.95 if settings.momentum is None else settings.momentum,
            "nesterov": True if settings.nesterov is None else settings.nesterov,
            "weight_decay": settings.weight_decay,
            "adjust_lr": settings.adjust_lr or "match_rms_adamw",
            "normalize_weights": bool(settings.normalize_weights),
        }
        super().__init__(filters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step; a parameter without gradient does not change."""
        assert closure is None
        (group,) = self.param_groups
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not trained:
            return
        lr, momentum = group["lr"], group["momentum"]
        matrices = [_matrix(parameter, parameter) for parameter in trained]
        grads = [_matrix(parameter.grad, parameter) for parameter in trained]
        buffers = [_matrix(self._momentum(parameter), parameter) for parameter in trained]
        if group["normalize_weights"]:
            factors = torch._foreach_reciprocal(torch._foreach_norm(matrices))
            torch._foreach_mul_(factors, [len(matrix) ** 0.5 for matrix in matrices])
            torch._foreach_mul_(matrices, factors)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(i)
        for shape, places in by_shape.items():
            stacked = orthogonalized(torch.stack([updates[i] for i in places])).float()
            rows, columns = shape
            ratio = max(1.0, math.sqrt(rows / columns))
            if group["adjust_lr"] == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(rows, columns))
            stacked *= lr * ratio
            torch._foreach_sub_([matrices[i] for i in places], list(stacked.unbind()))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Returns the momentum of a parameter, in its shape and memory order; 0 at first."""
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


class CombinedOptimizer(Optimizer):
    """Several optimizers as one, each with its own parameter group.

    Args:
        parts: optimizers of one parameter group.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.inner = parts
        super().__init__([{"params": part.param_groups[0]["params"]} for part in parts], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Makes the parameter groups those of the optimizers."""
        self.param_groups = [part.param_groups[0] for part in self.inner]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step of every optimizer."""
        assert closure is None
        for part in self.inner:
            take_step(part)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the optimizers, in order."""
        return {"parts": [part.state_dict() for part in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of the optimizers."""
        for part, state in zip(self.inner, state_dict["parts"], strict=True):
            load_state(part, state)
        self._share_groups()


@torch.no_grad()
def take_step(optimizer: Optimizer) -> None:
    """Takes a step without what torch wraps around it: hooks, and an import of the compiler.

    That import takes a second and 100 MB; see `_keep_compiler_out`.
    """
    inspect.unwrap(type(optimizer).step)(optimizer)


def _keep_compiler_out() -> None:
    """Lets torch's optimizers work without importing the compiler, which they only tell not to trace them."""
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        untraced = inspect.unwrap(method)
        untraced.__dynamo_disable = untraced  # see torch._compile


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters of an optimizer that are not frozen."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def start_momentum(optimizer: Optimizer) -> None:
    """Gives trained parameters the momentum that SGD starts with, which is 0, if they have none yet.

    torch would do it in the first step with a gradient. But its fused kernel accepts a step in which all
    parameters have momentum, or none, but not a mixture, as after unfreezing or with a skipped layer.
    """
    for part in getattr(optimizer, "inner", []):
        start_momentum(part)
    if isinstance(optimizer, SGD) and optimizer.defaults["momentum"]:
        for parameter in trained_parameters(optimizer):
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _matrix(values: Tensor, filters: Tensor) -> Tensor:
    """Returns [O, ...] as [O, columns] in the memory order of `filters`; copies only if the order differs."""
    if filters.ndim == 4 and filters.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)


def _unfolded(matrix: Tensor, filters: Tensor) -> Tensor:
    """Returns what `_matrix` has made of filters, [O, columns], in their shape: [O, I, H, W].

    Older checkpoints have the momentum of Muon as such matrices.
    """
    outputs, inputs, height, width = filters.shape
    if filters.is_contiguous(memory_format=torch.channels_last):
        return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return matrix.view(filters.shape)


def lr_factor(schedule: ScheduleConfig, epochs_done: float, epochs: int) -> float:
    """Returns the learning rate at a point of the run, as a fraction of the peak.

    Args:
        schedule: its shape and warm-up.
        epochs_done: samples seen so far divided by the samples of an epoch.
        epochs: number of epochs of the run.
    """
    warmup = schedule.warmup_epochs
    if warmup is None:
        warmup = 0.3 * (schedule.end_epoch or epochs) if schedule.name == "one_cycle" else 0.0
    if epochs_done < warmup:
        rise = epochs_done / warmup
        if schedule.name == "one_cycle":  # Smith & Topin 2018, with the start and shape of torch's OneCycleLR
            return 1 / 25 + (1 - 1 / 25) * _cosine(1 - rise)
        return rise
    end = epochs if schedule.end_epoch is None else schedule.end_epoch
    rest = (epochs_done - warmup) / max(end - warmup, 1e-12)
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
    """Loads the state of an optimizer of the same kind, and keeps the settings of the config."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if (value.ndim, parameter.ndim) == (2, 4):
                value = _unfolded(value, parameter)
            if value.shape == parameter.shape:  # NCHW on disk; torch's fused kernels ignore strides
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def state_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes that an optimizer will still allocate for its state."""
    if inner := getattr(optimizer, "inner", []):
        return sum(map(state_bytes, inner))
    total = 0
    for group in optimizer.param_groups:
        averages = 2 if isinstance(optimizer, Adam) else int(group["momentum"] > 0)  # AdamW is an Adam
        new = [parameter for parameter in group["params"] if parameter not in optimizer.state]
        total += sum(averages * parameter.nbytes + 4 for parameter in new)  # 4 for the step counter
    return total


def set_lr(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _cosine(position: float) -> float:
    """Returns a half cosine: 1 at position 0, 0 from position 1 on."""
    return 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))
