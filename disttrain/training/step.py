"""One optimizer step: micro-batches in order, forward, loss, backward, clip, step, moving average."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids
from disttrain.heartbeat import Phase
from disttrain.training.augment import Mix
from disttrain.training.microbatch import MicroBatch, next_inputs
from disttrain.training.phases import Phases
from disttrain.training.state import TrainState, cudnn_heuristics, eager


def train_step(
    state: TrainState,
    batches: Iterator[tuple[MicroBatch, Batch]],
    step: int,
    global_batch: int,
    phases: Phases,
) -> Ids:
    """Takes one optimizer step. Every rank calls this.

    The gradient is that of the mean over the global batch, whatever the shares: the sum of a rank's losses is
    weighted with the world size, because DDP takes the mean over ranks, divided by the size of the batch. The
    backward pass begins with that weight, which is no operation of its own.

    Args:
        state: what to train with.
        batches: gives this rank's micro-batches of the step.
        step: its number, from 1.
        global_batch: samples of the step over all ranks.
        phases: told of what begins.

    Returns:
        The ids that this rank trained on, int64 [B].
    """
    # In plain torch: the wrappers of Accelerate look for packages and signatures in every step.
    config, scaler, meter = state.config.train, state.accelerator.scaler, state.meter
    ids: list[Ids] = []
    for number in itertools.count():
        micro, images, labels, partners, own_ids = next_inputs(state, batches, step, number, phases)
        phases.enter(Phase.COMPUTE, step, 2 * number)
        graph = state.graph if micro.samples == config.batch_size else None
        if graph is not None:
            loss, scores = graph(partial(whole_step, state), images, labels)
        else:
            with passes(state, micro, global_batch):
                scores = state.model(images)
                loss = loss_sum(scores, labels, partners, micro.mix, config.label_smoothing)
                phases.enter(Phase.COMPUTE, step, 2 * number + 1)  # here the ranks wait for one another
                weight = state.world_size / global_batch if micro.counts else 0.0
                (loss if scaler is None else scaler.scale(loss)).backward(torch.full_like(loss, weight))
        if micro.counts:
            meter.add(loss, scores, labels)
            ids.append(own_ids)
        if micro.last:
            break
    phases.enter(Phase.OPTIMIZE, step)
    if graph is None:
        update(state)
    if state.ema is not None:
        state.ema.n_averaged += 1
    meter.steps += 1
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


@contextlib.contextmanager
def passes(state: TrainState, micro: MicroBatch, global_batch: int) -> Iterator[None]:
    """What holds around the passes of a micro-batch.

    The gradients stay on this rank until its last one. A batch of another size than the others is neither
    compiled, nor does cuDNN try its kernels for it.
    """
    with contextlib.ExitStack() as stack:
        if not micro.last:
            stack.enter_context(no_sync(state))
        if micro.samples != state.compiled_batch:
            stack.enter_context(eager(state))
        if global_batch < state.config.train.batch_size:
            stack.enter_context(cudnn_heuristics())
        yield


def no_sync(state: TrainState) -> contextlib.AbstractContextManager[None]:
    """Leaves gradients on this rank, to be reduced with those of a later pass."""
    if state.world_size == 1:
        return contextlib.nullcontext()
    assert isinstance(state.model, DistributedDataParallel)
    return state.model.no_sync()


def whole_step(state: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Takes a step on a whole batch, as `train_step` does; all its effects are on the device.

    Args:
        state: of a single rank.
        images: float32 [B, C, H, W].
        labels: int64 [B].

    Returns:
        The summed loss, float32 [], and the scores [B, classes].
    """
    logits = state.model(images)
    loss = loss_sum(logits, labels, None, None, state.config.train.label_smoothing)
    loss.backward(torch.full_like(loss, 1 / len(labels)))
    update(state)
    return loss, logits


def update(state: TrainState) -> None:
    """Changes the weights by their gradients, which it drops, and the moving average by the weights."""
    clip, scaler = state.config.train.grad_clip, state.accelerator.scaler
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        state.meter.grad_norm.copy_(norm)
    if scaler is None:
        state.optimizer.step()
    else:
        scaler.step(state.optimizer)
        scaler.update()
    state.drop_gradients()
    if state.ema is not None:
        state.ema.average(state.bare_model)


def loss_sum(
    logits: Tensor, labels: Tensor, partners: Tensor | None, mix: Mix | None, label_smoothing: float
) -> Tensor:
    """Returns the cross entropy summed over a batch.

    Args:
        logits: [B, classes].
        labels: int64 [B].
        partners: labels of the images mixed in, int64 [B], or None.
        mix: the weights of the two labels, or None.
        label_smoothing: share of the target spread over all classes.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    if mix is None or partners is None:
        return loss
    other = F.cross_entropy(logits.float(), partners, reduction="sum", label_smoothing=label_smoothing)
    return mix.lam * loss + (1 - mix.lam) * other
