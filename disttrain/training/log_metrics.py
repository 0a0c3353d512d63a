"""Log points: all ranks reduce their metrics in one collective, and rank 0 writes a record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from disttrain.data.epoch_plan import Ids
from disttrain.errors import TrainingError
from disttrain.heartbeat import Phase
from disttrain.runs.records import StepTimes, TrainRecord
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import reduce_record
from disttrain.training.flops import device_flops
from disttrain.training.nonfinite import check_scaler, nonfinite_error
from disttrain.training.state import Progress, TrainState
from disttrain.training.virtual_ranks import weight_digests


@dataclass
class Interval:
    """What is summed over the ranks at a log point.

    Attributes:
        loss: sum over the samples since the last log point.
        correct: samples predicted correctly.
        samples: samples trained on.
        wait_s: seconds of waiting for data.
        elapsed_s: seconds since the last log point.
        stops: number of ranks that were asked to stop.
        weights: with train.reproducible a digest of the weights, of 40 bits; otherwise 0.
        times_ms: phase times of a step: the first field of StepTimes for every rank, then the next field.
        readings: of the gauges.
    """

    loss: float
    correct: float
    samples: float
    wait_s: float
    elapsed_s: float
    stops: float
    weights: float
    times_ms: list[float]
    readings: list[float]


def log_metrics(
    state: TrainState, progress: Progress, seen: Sequence[Ids], lr: float, callbacks: Callbacks
) -> bool:
    """Reduces the sums of all ranks in one collective and reports them. Every rank calls this.

    Args:
        state: what is trained.
        progress: how far the run is.
        seen: ids that this rank trained on in each step, oldest first.
        lr: learning rate of the last step.
        callbacks: what to call.

    Returns:
        Whether any rank was asked to stop.

    Raises:
        TrainingError: the loss or the gradients are not finite, or the ranks have different weights.
    """
    meter = state.meter
    own = _rank_sums(state, callbacks)
    digests = weight_digests(state) if state.config.train.reproducible else UNSET
    own.weights = _digest(digests)
    norm = meter.grad_norm.item()
    total = reduce_record(state.group, Phase.REPORT, progress.step, own)
    if not math.isfinite(total.loss):
        raise nonfinite_error(state, progress, seen, callbacks)
    if total.weights != own.weights * state.world_size:
        raise _different_weights(progress.step)
    check_scaler(state)
    mean_s = total.elapsed_s / state.world_size
    meter.step_time_s = mean_s / meter.steps
    images_per_s = total.samples / mean_s
    phases_ms, ranks_ms = step_times(total.times_ms, state.world_size)
    flops_per_s, mfu_pct = device_flops(
        state.flops_per_image, images_per_s / state.world_size, peak_per_s=state.peak_flops_per_s
    )
    record = TrainRecord(
        step=progress.step,
        epoch=progress.epoch + 1,
        samples=progress.samples_seen,
        loss=total.loss / total.samples,
        accuracy=total.correct / total.samples,
        lr=lr,
        images_per_s=images_per_s,
        step_time_s=meter.step_time_s,
        data_wait_pct=100 * total.wait_s / total.elapsed_s,
        phases_ms=phases_ms,
        ranks_ms=ranks_ms,
        device_flops_per_s=flops_per_s,
        mfu_pct=mfu_pct,
        grad_norm=norm if math.isfinite(norm) else None,
        skipped=len(state.plan.skipped),
        weights=digests,
        **callbacks.gauges.rows(total.readings),
    )
    callbacks.observer.train(record)
    meter.restart()
    return total.stops > 0


def _different_weights(step: int) -> TrainingError:
    return TrainingError(
        f"the ranks have different weights at step {step:,}, although train.reproducible gives all the same; "
        "a GPU or its memory may be faulty: run `disttrain doctor`, then start this run again, which goes on "
        "from its last checkpoint"
    )


def _digest(digests: Mapping[str, str] | UnsetType) -> float:
    """Returns the digest of all digests as a number that can be summed over ranks without rounding."""
    if isinstance(digests, UnsetType):
        return 0.0
    return float(int(hashlib.blake2b("".join(digests.values()).encode(), digest_size=5).hexdigest(), 16))


def _rank_sums(state: TrainState, callbacks: Callbacks) -> Interval:
    """Returns this rank's sums since the last log point."""
    meter = state.meter
    loss, correct = meter.totals()  # Device synchronisation.
    callbacks.phases.synchronized()
    times = callbacks.phases.take(meter.steps, state.model)
    elapsed_s, wait_s = meter.elapsed_s, meter.wait_s
    if state.accelerator.device.type == "cuda":
        # The host runs ahead of the GPU, so the GPU may have work while the host waits for data.
        wait_s = min(elapsed_s, times.data / 1000 * meter.steps)
    times_ms = [0.0] * (len(StepTimes.__struct_fields__) * state.world_size)
    times_ms[state.rank :: state.world_size] = msgspec.structs.astuple(times)
    stops = float(callbacks.stop_requested())
    readings = list(callbacks.gauges.read())
    return Interval(loss, correct, meter.samples, wait_s, elapsed_s, stops, 0.0, times_ms, readings)


def step_times(
    times_ms: Sequence[float], ranks: int
) -> tuple[StepTimes[float], StepTimes[tuple[float, ...]]]:
    """Returns the milliseconds of each phase of a step: the mean over the ranks, and the value of each rank.

    Args:
        times_ms: the first field of StepTimes for every rank, then the next field for every rank, and so on.
        ranks: number of ranks.
    """
    rows = [
        tuple(round(value, 4) for value in times_ms[first : first + ranks])
        for first in range(0, len(times_ms), ranks)
    ]
    return StepTimes(*(round(sum(row) / ranks, 4) for row in rows)), StepTimes(*rows)
