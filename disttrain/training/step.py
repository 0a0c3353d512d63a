"""One optimizer step: for each micro-batch forward, loss and backward; then clip, step, moving average."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain import counter_rng
from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids
from disttrain.errors import UsageError
from disttrain.heartbeat import Phase
from disttrain.models.pretrained import some_names
from disttrain.training.loss import loss_and_scores
from disttrain.training.microbatch import MicroBatch, next_inputs
from disttrain.training.optim import take_step
from disttrain.training.phases import Phases
from disttrain.training.state import TrainState, cudnn_heuristics, eager

_NOISE = 16  # the stream of random numbers that seeds dropout


def train_step(
    state: TrainState,
    batches: Iterator[tuple[MicroBatch, Batch]],
    step: int,
    global_batch: int,
    phases: Phases,
) -> Ids:
    """Takes one optimizer step. Every rank calls this.

    The loss is the mean over the global batch, even if the ranks have different numbers of samples. So the
    weight of a rank's summed loss is world size / global batch: DDP averages over the ranks. The backward
    pass starts from that weight, which costs no extra operation.

    Args:
        state: what to train with.
        batches: yields this rank's micro-batches of the step.
        step: number of the step, from 1.
        global_batch: samples of the step over all ranks.
        phases: times the phases.

    Returns:
        The ids that this rank trained on, int64 [B].
    """
    # Dropout depends only on the step and the rank, so that a resumed run draws the same masks.
    state.seed(counter_rng.derive(state.config.seed, _NOISE, step - 1, state.rank) >> 1)
    # Plain torch, because Accelerate's wrappers inspect packages and signatures in every step.
    config = state.config.train
    ids: list[Ids] = []
    for number in itertools.count():
        [(micro, images, labels, partners, own_ids)] = next_inputs(state, batches, step, number, phases)
        phases.enter(Phase.COMPUTE, step, 2 * number)
        graph = state.graph if micro.samples == config.batch_size else None
        if graph is not None:
            loss, scores = graph(partial(full_batch_step, state), images, labels)
        else:
            with micro_batch_context(state, micro, global_batch):
                loss, scores = forward(state, micro, images, labels, partners)
                phases.enter(Phase.COMPUTE, step, 2 * number + 1)  # the ranks wait for each other from here
                backward(state, loss, state.world_size / global_batch if micro.counts else 0.0)
        if micro.counts:
            state.meter.add(loss, scores, labels)
            ids.append(own_ids)
        if micro.last:
            break
    check_reduced(state, step)
    phases.enter(Phase.OPTIMIZE, step)
    if graph is None:
        update(state)
    return end_step(state, ids)


def forward(
    state: TrainState, micro: MicroBatch, images: Tensor, labels: Tensor, partners: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the loss summed over a micro-batch, float32 [], and the scores [B, classes].

    For the arguments see `Inputs`.
    """
    output, config = state.model(images), state.config.train
    return loss_and_scores(output, labels, partners, micro.mix, config, state.class_weights)


def backward(state: TrainState, loss: Tensor, weight: float) -> None:
    """Adds the gradients of a loss with a weight; for fp16 both are scaled."""
    scaler = state.accelerator.scaler
    (loss if scaler is None else scaler.scale(loss)).backward(torch.full_like(loss, weight))


def end_step(state: TrainState, ids: list[Ids]) -> Ids:
    """Counts a step after its update; returns the ids of all its micro-batches, int64 [B]."""
    if state.ema is not None:
        state.ema.n_averaged += 1
    state.meter.steps += 1
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


@contextlib.contextmanager
def micro_batch_context(state: TrainState, micro: MicroBatch, global_batch: int) -> Iterator[None]:
    """Context of the forward and backward pass of a micro-batch.

    Gradients are reduced only in the last micro-batch of a step. A batch of an unusual size runs in eager
    mode, and cuDNN does not benchmark kernels for it.
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
    """Accumulates gradients without an all-reduce; a later pass reduces them."""
    model = state.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def check_reduced(state: TrainState, step: int) -> None:
    """Checks on each rank alone that the backward pass of a step has reduced all gradients.

    Without this, the other ranks would wait in the reduction for one that is already in the next collective.
    (A layer that is skipped at random is mostly found before the start, and then DDP allows for it.)

    Raises:
        UsageError: a parameter got no gradient on this rank.
    """
    if not isinstance(state.model, DistributedDataParallel):
        return
    try:
        state.model._check_reducer_finalized()
    except RuntimeError as error:
        names = [
            name
            for name, parameter in state.bare_model.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if not names:
            raise
        raise UsageError(
            f"model {state.config.model.name}: no gradient for {some_names(names)} in step {step:,} on rank "
            f"{state.rank}; skip a layer by multiplying its output by 0, as torchvision.ops.stochastic_depth "
            "does"
        ) from error


def full_batch_step(state: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the step of `train_step` on a full batch, with effects only on the device.

    Args:
        state: of a run with a single rank.
        images: float32 [B, C, H, W].
        labels: see `Batch`.

    Returns:
        The loss summed over the batch, float32 [], and the scores [B, classes].
    """
    output, config = state.model(images), state.config.train
    loss, scores = loss_and_scores(output, labels, None, None, config, state.class_weights)
    loss.backward(torch.full_like(loss, 1 / len(labels)))
    update(state)
    return loss, scores


def update(state: TrainState) -> None:
    """Updates the weights, drops the gradients, and updates the moving average."""
    clip, scaler = state.config.train.grad_clip, state.accelerator.scaler
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        state.meter.grad_norm.copy_(norm)
    if scaler is None:
        take_step(state.optimizer)
    else:
        scaler.step(state.optimizer)
        scaler.update()
    state.drop_gradients()
    if state.ema is not None:
        state.ema.average(state.bare_model)
