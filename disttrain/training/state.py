"""What one rank trains and evaluates with, how far it is, and what it sums up between log points."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from disttrain.config import Config
from disttrain.data.batches import Loader
from disttrain.data.epoch_plan import Ids, Plan
from disttrain.preflight import split_batch
from disttrain.training.augment import Augment
from disttrain.training.autotune import Settings
from disttrain.training.collectives import Group
from disttrain.training.ema import MovingAverage
from disttrain.training.graph import StepGraph
from disttrain.training.optim import Rate

_LOOK_S = 1.0  # between two looks for a wish to stop, unless a step takes longer
_COUNTED_AT_ONCE = 16  # forward passes whose hits are counted together


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint.

    Attributes:
        epoch: epochs whose training is completed.
        samples: samples of the current epoch trained on, over all ranks.
        step: optimizer steps taken.
        samples_seen: samples trained on in the whole run, over all ranks.
        best_accuracy: best validation accuracy so far, 0..1.
        evaluation_due: whether the last completed epoch has still to be evaluated.
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    samples_seen: int = 0
    best_accuracy: float | None = None
    evaluation_due: bool = False


@dataclass
class MeterState:
    """What a run that is stopped between two log points needs to go on: sums of one rank since the last one.

    Attributes:
        loss: of the samples.
        correct: samples that were predicted right.
        samples: that were trained on.
        steps: that were taken.
        wait_s: seconds in which the host waited for data.
        elapsed_s: seconds of training.
    """

    loss: float
    correct: float
    samples: float
    steps: float
    wait_s: float
    elapsed_s: float


class Meter:
    """Sums since the last log point: loss and hits on the device, times on the host.

    Args:
        device: where the losses are.

    Attributes:
        samples: that this rank has trained on.
        steps: that were taken.
        wait_s: seconds in which the host waited for data.
        step_time_s: seconds of a step as all ranks have agreed on at the last log point, or None.
        scale: of the gradient scaler at the last log point, or None.
        skipped_steps: that it has skipped in a row.
        grad_norm: the norm of the last gradient before it was clipped, float32 [], NaN if it was not.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self.grad_norm = torch.full((), math.nan, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._losses: list[tuple[int, Tensor]] = []
        self.step_time_s: float | None = None
        self.scale: float | None = None
        self.skipped_steps = 0
        self.restart()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds the loss and the hits of a part of a batch, without a synchronisation.

        Most are only noted, and counted some steps at once.

        Args:
            loss: float32 [], summed over the part.
            logits: [B, classes].
            labels: int64 [B].
        """
        loss = loss.detach()
        self._pending.append((loss, logits.detach(), labels))
        self._losses.append((self.steps, loss))
        self.samples += len(labels)
        if len(self._pending) == _COUNTED_AT_ONCE:
            self._count()

    def totals(self) -> list[float]:
        """Returns the sum of the losses and the hits; waits for the device."""
        self._count()
        totals: list[float] = self._sums.tolist()
        return totals

    def _count(self) -> None:
        if self._pending:
            losses, logits, labels = zip(*self._pending, strict=True)
            hits = (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
            self._sums += torch.stack([torch.stack(losses).sum(dtype=torch.float64), hits])
            self._pending.clear()

    def first_nonfinite_step(self) -> int | None:
        """Returns how many steps were complete before the first one whose loss is not finite, if one is."""
        for step, loss in self._losses:
            if not torch.isfinite(loss):
                return step
        return None

    def start(self) -> None:
        """Starts the clock, when training begins or goes on."""
        self._began = time.perf_counter() - self._before_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training since the last log point."""
        return time.perf_counter() - self._began

    def restart(self) -> None:
        """Begins a new interval."""
        self._pending.clear()
        self._losses.clear()
        self._sums.zero_()
        self.samples, self.steps, self.wait_s, self._before_s = 0, 0, 0.0, 0.0
        self.start()

    def state(self) -> MeterState:
        """Returns the sums of this rank; waits for the device."""
        loss, correct = self.totals()
        return MeterState(loss, correct, self.samples, self.steps, self.wait_s, self.elapsed_s)

    def load(self, state: MeterState) -> None:
        """Goes on with an interval."""
        self.restart()
        self._sums.copy_(torch.tensor([state.loss, state.correct], dtype=torch.float64))
        self.samples, self.steps = int(state.samples), int(state.steps)
        self.wait_s, self._before_s = state.wait_s, state.elapsed_s


class Validation(NamedTuple):
    """A split to evaluate on, as one rank sees it.

    Attributes:
        data: serves the samples to this rank.
        ids: those that all ranks together evaluate, int64 [samples].
        classes: their names, in the order of the scores.
        skipped: how many more samples there are, which cannot be used.
    """

    data: Loader
    ids: Ids
    classes: tuple[str, ...]
    skipped: int = 0


@dataclass
class TrainState:
    """What one rank trains with, built by the worker.

    Attributes:
        model: computes in its precision; wrapped in DDP when there are several ranks.
        ema: moving average of the bare model, or None.
        rates: the learning rate of each of its parameter groups.
        plan: the order of the training samples.
        train_data: the training split, served to this rank.
        val: the validation split.
        image_size: height and width in pixels.
        settings: how the forward and backward pass is computed.
        flops_per_image: of training, or None if that is not known.
        peak_flops_per_s: the most that the device does, or None if that is not known.
        graph: takes the steps with a whole batch as a CUDA graph, or None.
        meter: sums since the last log point.
        compiled_batch: images in the forward pass that the model is compiled for, or None if it is not.
        parameters: those that the optimizer changes.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    ema: MovingAverage | None
    optimizer: Optimizer
    rates: Sequence[Rate]
    plan: Plan
    augment: Augment
    train_data: Loader
    val: Validation
    image_size: tuple[int, int]
    settings: Settings
    flops_per_image: int | None = None
    peak_flops_per_s: float | None = None
    graph: StepGraph | None = None
    rank: int = field(init=False)
    world_size: int = field(init=False)
    meter: Meter = field(init=False)
    compiled_batch: int | None = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.meter = Meter(self.accelerator.device)
        compiled = self.settings.compiled
        self.compiled_batch = split_batch(self.config, self.world_size) if compiled else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def drop_gradients(self) -> None:
        """Forgets the gradients; the bookkeeping around Optimizer.zero_grad takes longer than this loop."""
        for parameter in self.parameters:
            parameter.grad = None

    def should_poll_stop(self, number: int) -> bool:
        """Tells whether the ranks ask one another after so many steps if one is to stop; the same on all."""
        step_time_s = self.meter.step_time_s
        if self.world_size == 1 or step_time_s is None:
            return True
        return number % max(1, int(_LOOK_S / step_time_s)) == 0

    @property
    def group(self) -> Group:
        """The ranks, for collectives."""
        return Group(self.rank, self.world_size, self.accelerator.device)

    @property
    def bare_model(self) -> nn.Module:
        """The model without DDP."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        assert isinstance(model, nn.Module)
        return model

    @property
    def networks(self) -> list[nn.Module]:
        """The model without DDP and, if there is one, its moving average, which is evaluated then."""
        return [self.bare_model, *([] if self.ema is None else [self.ema.module])]


@contextmanager
def cudnn_heuristics() -> Iterator[None]:
    """Lets cuDNN choose its kernels by rule, not by trying them.

    For a size of batch that comes once an epoch: trying takes seconds (docs/benchmarks.md).
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def eager(state: TrainState) -> Iterator[None]:
    """Runs a model that is compiled for one size of batch without its compilation."""
    if state.compiled_batch is None:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
