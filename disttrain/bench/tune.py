"""`disttrain tune`: finds a learning rate or a batch size for an experiment by short trials.

Starts the processes of the trials (`disttrain.bench.worker`) and judges their results. Nothing here imports
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config import Config
from disttrain.errors import TrainingError
from disttrain.launch.jobs import run_job
from disttrain.launch.plan import LaunchPlan
from disttrain.shards.index import Index

OUT_OF_MEMORY = "out of memory"

_SMOOTH = 0.9  # weight of the previous value in the moving average of the losses
_DIVERGED = 3.0  # times the lowest average loss
_FELL = 0.99  # times the highest average: above this, a fall of the loss may be chance
_SETTLED = 10  # steps before the average is meaningful
_NEAR_BEST = 0.95  # times the highest throughput
_GROWTH = 1.03  # speed-up that a doubled batch must give, otherwise larger ones are not tried
_SMALLEST = 16
_LARGEST = 65536


@dataclass(frozen=True)
class RateFinding:
    """The result of a learning-rate range test (Smith 2015).

    Attributes:
        rates: learning rate of each step.
        losses: loss of each step, before its update.
        smooth: exponential moving average of the losses, bias-corrected.
        suggested: the rate at which the average fell fastest, or None if it did not fall.
        most: the rate with the lowest average; training gets worse above it.
        diverged: the rate at which the loss diverged or was not finite; None if it never did.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    suggested: float | None
    most: float | None
    diverged: float | None


def find_rate(config: Config, plan: LaunchPlan, *, low: float, high: float, steps: int) -> RateFinding:
    """Trains for some steps with a learning rate that rises from `low` to `high`, or until the loss diverges.

    Parameter groups keep the ratio of their rate to optim.lr. `plan` must be for a single node.
    """
    request = {"what": "rate", "low": low, "high": high, "steps": steps, "diverged": _DIVERGED}
    found = _run(config, plan, request)
    return judge_rates(found["rates"], found["losses"])


def judge_rates(rates: Sequence[float], losses: Sequence[float]) -> RateFinding:
    """Returns the finding for a learning rate and a loss per step."""
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        smooth.append(mean / (1 - _SMOOTH**step))
    known = list(rates), list(losses), smooth
    finite = next((i for i, value in enumerate(smooth) if not math.isfinite(value)), len(smooth))
    if finite == 0:
        return RateFinding(*known, None, None, rates[0] if rates else None)
    least = min(range(finite), key=smooth.__getitem__)
    bad = (i for i in range(least, len(smooth)) if i >= finite or smooth[i] > _DIVERGED * smooth[least])
    diverged = next((rates[i] for i in bad), None)
    falls = {
        i: (smooth[i + 1] - smooth[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(max(1, min(_SETTLED, finite // 4)), min(least, finite - 1))
    }
    if not falls or smooth[least] >= _FELL * max(smooth[: least + 1]):
        return RateFinding(*known, None, None, diverged)
    return RateFinding(*known, rates[min(falls, key=falls.__getitem__)], rates[least], diverged)


@dataclass(frozen=True)
class BatchRow:
    """A batch size that was tried.

    Attributes:
        batch_size: the global batch size.
        step_s: seconds per step; None if it does not fit into memory.
        memory_gib: peak memory of a GPU; None on CPUs and if it does not fit.
    """

    batch_size: int
    step_s: float | None
    memory_gib: float | None

    @property
    def images_per_s(self) -> float | None:
        """Throughput of all processes."""
        return None if self.step_s is None else self.batch_size / self.step_s


def try_batches(
    config: Config, plan: LaunchPlan, index: Index, *, seconds: float, say: Callable[[str], None]
) -> Iterator[BatchRow]:
    """Yields measurements of doubling batch sizes, until one does not fit into memory or is not faster.

    Each measurement takes `seconds`. `plan` must be for a single node.
    """
    parts = plan.processes * config.train.accumulate
    size = parts * max(1, _SMALLEST // parts)
    speeds: list[float] = []
    while size <= min(_LARGEST, index.splits["train"].samples):
        say(f"trying train.batch_size={size}")
        tried = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size})})
        try:
            found = _run(tried, plan, {"what": "batch", "seconds": seconds})
        except TrainingError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            yield BatchRow(size, None, None)
            return
        row = BatchRow(size, found["step_s"], found["memory_gib"])
        yield row
        speeds.append(row.images_per_s or 0.0)
        if len(speeds) > 2 and speeds[-1] < _GROWTH * speeds[-2] and speeds[-2] < _GROWTH * speeds[-3]:
            return
        size *= 2


def judge_batches(rows: Sequence[BatchRow]) -> int | None:
    """Returns the smallest batch size that is nearly as fast as the fastest, or None if none fits."""
    speeds = {row.batch_size: row.images_per_s for row in rows if row.images_per_s is not None}
    best = max(speeds.values(), default=0.0)
    return min((size for size, speed in speeds.items() if speed >= _NEAR_BEST * best), default=None)


def _run(config: Config, plan: LaunchPlan, request: dict[str, Any]) -> dict[str, Any]:
    return run_job(plan, "disttrain.bench.worker", {"config": config.model_dump(mode="json"), **request})
