"""The training state of one rank, its progress, and the metrics that it sums between log points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from disttrain.models.pretrained import Loaded
from disttrain.preflight import split_batch
from disttrain.training.augment import Augment
from disttrain.training.autotune import Settings
from disttrain.training.collectives import Group
from disttrain.training.ema import MovingAverage
from disttrain.training.graph import StepGraph
from disttrain.training.loss import is_correct
from disttrain.training.optim import LrSchedule, trained_parameters
from disttrain.training.rng import make_seed_fn

_POLL_S = 1.0  # between two polls for a stop request, unless a step takes longer
_COUNTED_AT_ONCE = 16  # forward passes whose correct predictions are counted together


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        epoch: epochs whose training is complete.
        samples: samples of the current epoch trained on, over all ranks.
        step: optimizer steps taken.
        samples_seen: samples trained on in the whole run, over all ranks.
        best: best value of `eval.best` so far.
        evaluation_due: whether the evaluation of the last complete epoch is still to come.
        stop_best: value of `train.stop_early.metric` when it last improved.
        improved_epoch: epoch of that evaluation.
        stopped_early: whether `train.stop_early` has ended the run.
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    samples_seen: int = 0
    best: float | None = None
    evaluation_due: bool = False
    stop_best: float | None = None
    improved_epoch: int = 0
    stopped_early: bool = False


@dataclass
class MeterState:
    """The sums of one rank since the last log point, for a run that is stopped between two log points.

    Attributes:
        loss: sum over the samples.
        correct: samples predicted correctly.
        samples: samples trained on.
        steps: optimizer steps.
        wait_s: seconds that the host waited for data.
        elapsed_s: seconds of training.
    """

    loss: float
    correct: float
    samples: float
    steps: float
    wait_s: float
    elapsed_s: float


class Meter:
    """Sums since the last log point: loss and correct predictions on the device, times on the host.

    Args:
        device: where the losses are.

    Attributes:
        samples: samples that this rank trained on.
        steps: optimizer steps.
        wait_s: seconds that the host waited for data.
        step_time_s: seconds of a step at the last log point, the same on all ranks, or None before the first.
        scale: the gradient scaler's scale at the last log point, or None.
        skipped_steps: steps in a row that the gradient scaler skipped.
        grad_norm: norm of the last gradient before clipping, float32 []; NaN without clipping.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self.grad_norm = torch.full((), math.nan, device=device)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_losses: list[Tensor] = []
        self._losses: list[tuple[int, Tensor]] = []
        self.step_time_s: float | None = None
        self.scale: float | None = None
        self.skipped_steps = 0
        self.restart()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds the loss and the correct predictions of a micro-batch, without a synchronisation.

        Correct predictions are counted for several micro-batches at once.

        Args:
            loss: float32 [], summed over the micro-batch.
            logits: [B, classes].
            labels: see `Batch`.
        """
        self._pending_losses.append(loss.detach())
        self.note(loss, logits, labels)

    def note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch as `add` does, but not its loss to the sum of the losses."""
        self._losses.append((self.steps, loss.detach()))
        self._pending.append((logits.detach(), labels))
        self.samples += len(labels)
        if len(self._pending) == _COUNTED_AT_ONCE:
            self._count()

    def add_loss(self, loss: Tensor) -> None:
        """Adds to the sum of the losses, float64 []."""
        self._sums[0] += loss

    def totals(self) -> list[float]:
        """Returns the sum of the losses and the number of correct predictions; waits for the device."""
        self._count()
        totals: list[float] = self._sums.tolist()
        return totals

    def _count(self) -> None:
        if self._pending:
            logits, labels = zip(*self._pending, strict=True)
            self._sums[1] += is_correct(torch.cat(logits), torch.cat(labels)).sum()
            self._pending.clear()
        if self._pending_losses:
            self._sums[0] += torch.stack(self._pending_losses).sum(dtype=torch.float64)
            self._pending_losses.clear()

    def first_nonfinite_step(self) -> int | None:
        """Returns the steps taken before the first non-finite loss, or None if all losses are finite."""
        for step, loss in self._losses:
            if not torch.isfinite(loss):
                return step
        return None

    def start(self) -> None:
        """Starts the clock when training begins or resumes."""
        self._began = time.perf_counter() - self._before_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training since the last log point."""
        return time.perf_counter() - self._began

    def restart(self) -> None:
        """Starts a new interval."""
        self._pending.clear()
        self._pending_losses.clear()
        self._losses.clear()
        self._sums.zero_()
        self.samples, self.steps, self.wait_s, self._before_s = 0, 0, 0.0, 0.0
        self.start()

    def state(self) -> MeterState:
        """Returns the sums of this rank; waits for the device."""
        loss, correct = self.totals()
        return MeterState(loss, correct, self.samples, self.steps, self.wait_s, self.elapsed_s)

    def load(self, state: MeterState) -> None:
        """Continues a saved interval."""
        self.restart()
        self._sums.copy_(torch.tensor([state.loss, state.correct], dtype=torch.float64))
        self.samples, self.steps = int(state.samples), int(state.steps)
        self.wait_s, self._before_s = state.wait_s, state.elapsed_s


class Validation(NamedTuple):
    """A split to evaluate on, as one rank sees it.

    Attributes:
        data: loads the samples for this rank.
        ids: the samples that all ranks evaluate together, int64 [samples].
        classes: names of the classes, in the order of the scores.
        skipped: bad samples of the split, which are not in `ids`.
        multi_label: whether a sample has any number of labels.
    """

    data: Loader
    ids: Ids
    classes: tuple[str, ...]
    skipped: int = 0
    multi_label: bool = False


@dataclass
class TrainState:
    """What one rank trains with, built by the worker.

    Attributes:
        model: computes in its precision; wrapped in DDP if there are several ranks.
        ema: moving average of the bare model, or None.
        lr_schedules: the learning rate of each parameter group of the optimizer.
        plan: the order of the training samples.
        train_data: loads the training split for this rank.
        val: the validation split.
        image_size: height and width in pixels.
        settings: how the forward and backward pass is computed.
        flops_per_image: floating-point operations of training on one image, or None if unknown.
        peak_flops_per_s: the device's peak, or None if unknown.
        graph: runs the steps with a full batch as a CUDA graph, or None.
        class_weights: weight of each class in the loss, float32 [classes], or None.
        meter: sums since the last log point.
        seed: seeds torch's random number generator of the device.
        compiled_batch: the batch size that the model is compiled for, or None without compilation.
        parameters: the parameters that the optimizer updates now.
        initial_weights: what the run began with, or None if all weights were random.
        frozen: parameters by name that `model.unfreeze_epoch` has yet to unfreeze.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    ema: MovingAverage | None
    optimizer: Optimizer
    lr_schedules: Sequence[LrSchedule]
    plan: Plan
    augment: Augment
    train_data: Loader
    val: Validation
    image_size: tuple[int, int]
    settings: Settings
    flops_per_image: int | None = None
    peak_flops_per_s: float | None = None
    initial_weights: Loaded | None = None
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    graph: StepGraph | None = None
    class_weights: Tensor | None = None
    rank: int = field(init=False)
    world_size: int = field(init=False)
    meter: Meter = field(init=False)
    seed: Callable[[int], object] = field(init=False)
    compiled_batch: int | None = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.meter = Meter(self.accelerator.device)
        self.seed = make_seed_fn(self.accelerator.device)
        compiled = self.settings.compiled
        self.compiled_batch = split_batch(self.config, self.world_size) if compiled else None
        self.parameters = trained_parameters(self.optimizer)

    def drop_gradients(self) -> None:
        """Sets the gradients to None, in less time than the bookkeeping of Optimizer.zero_grad takes."""
        for parameter in self.parameters:
            parameter.grad = None

    def should_poll_stop(self, number: int) -> bool:
        """Returns whether the ranks poll for a stop request at step `number`; the same on all ranks."""
        step_time_s = self.meter.step_time_s
        if self.world_size == 1 or step_time_s is None:
            return True
        return number % max(1, int(_POLL_S / step_time_s)) == 0

    @property
    def group(self) -> Group:
        """The ranks, for collectives."""
        return Group(self.rank, self.world_size, self.accelerator.device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input."""
        height, width = self.image_size
        return len(self.augment.normalize.offset) // width, height, width

    @property
    def bare_model(self) -> nn.Module:
        """The model without DDP."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        assert isinstance(model, nn.Module)
        return model

    @property
    def networks(self) -> list[nn.Module]:
        """The model without DDP and, if there is one, its moving average. The last one is evaluated."""
        return [self.bare_model, *([] if self.ema is None else [self.ema.module])]


@contextmanager
def cudnn_heuristics() -> Iterator[None]:
    """Lets cuDNN choose its kernels by heuristics instead of benchmarking them.

    For a batch size that occurs once an epoch: the benchmark takes seconds (docs/benchmarks.md).
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def eager(state: TrainState) -> Iterator[None]:
    """Runs a compiled model in eager mode, for batches of a size that it is not compiled for."""
    if state.compiled_batch is None:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
