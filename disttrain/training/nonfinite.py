"""Errors for losses and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from disttrain.data.epoch_plan import Ids
from disttrain.errors import TrainingError
from disttrain.heartbeat import Phase
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import gather, reduce_sum
from disttrain.training.state import Progress, TrainState

_MOST_SKIPPED_STEPS = 20  # in a row, by a gradient scaler that always finds an overflow


def check_loss(state: TrainState, progress: Progress, seen: Sequence[Ids], callbacks: Callbacks) -> None:
    """Checks the losses since the last log point without reporting them. Every rank calls this.

    Raises:
        TrainingError: a loss is not finite.
    """
    loss, _ = state.meter.totals()
    if not math.isfinite(reduce_sum(state.group, Phase.REPORT, progress.step, [loss])[0]):
        raise nonfinite_error(state, progress, seen, callbacks)


def nonfinite_error(
    state: TrainState, progress: Progress, seen: Sequence[Ids], callbacks: Callbacks
) -> TrainingError:
    """Finds the first step with a non-finite loss, and records its batch. Every rank calls this.

    Returns:
        The error to raise.
    """
    steps = state.meter.steps
    own = state.meter.first_nonfinite_step()
    first, rank = min(
        (steps if found is None else found, rank) for rank, found in enumerate(gather(state.group, own))
    )
    back = steps - first  # steps back from the end of the interval
    if not 0 < back <= len(seen):
        return TrainingError(
            f"the sum of the losses up to step {progress.step:,} is not finite; lower optim.lr, "
            "and continue this run with --force"
        )
    step = progress.step - back + 1
    ids = np.concatenate(gather(state.group, seen[-back]))
    where = callbacks.observer.bad_batch(progress.epoch + 1, step, ids.tolist())
    # The first rank that fails ends the others, so all wait until rank 0 has recorded the batch.
    gather(state.group, None)
    return TrainingError(
        f"the loss is not finite at step {step:,} (epoch {progress.epoch + 1}, first on rank {rank}); "
        f"its batch is in {where}; lower optim.lr, set train.grad_clip, or use train.precision=fp32, "
        "and continue this run with --force"
    )


def check_scaler(state: TrainState) -> None:
    """Checks that the gradient scaler of fp16 does not skip every step. Waits for the device.

    Raises:
        TrainingError: it skipped many steps in a row, because the gradients overflow at any scale.
    """
    scaler, meter = state.accelerator.scaler, state.meter
    if scaler is None:
        return
    scale = scaler.get_scale()
    halvings = math.log2(meter.scale / scale) if meter.scale else 0
    meter.scale = scale
    meter.skipped_steps = meter.skipped_steps + meter.steps if halvings >= meter.steps else 0
    if meter.skipped_steps >= _MOST_SKIPPED_STEPS:
        raise TrainingError(
            f"the gradients were not finite in the last {meter.skipped_steps} steps, at any loss scale "
            f"down to {scale:.3g}; lower optim.lr, or use train.precision=bf16 or fp32, "
            "and continue this run with --force"
        )
