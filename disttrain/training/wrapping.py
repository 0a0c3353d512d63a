"""Wraps the model of a run for several ranks, and anew when its frozen parameters are unfrozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.models.freezing import freeze, unfreeze
from disttrain.models.pretrained import some_names
from disttrain.training.autotune import Choice, bucket_mib
from disttrain.training.collectives import Group
from disttrain.training.flops import flops_per_image
from disttrain.training.graph import StepGraph
from disttrain.training.loss import all_scores
from disttrain.training.optim import start_momentum, trained_parameters
from disttrain.training.rng import preserve_rng_state
from disttrain.training.state import TrainState, eager

log = logging.getLogger("disttrain")


def wrap_ddp(
    model: nn.Module, device: torch.device, *, timed_every: int, unused: bool = False
) -> tuple[nn.Module, Choice]:
    """Returns a model wrapped in DDP, and the size of its gradient buckets. Every rank calls this.

    DDP times one step in `timed_every`. With `unused`, parameters may get no gradient.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    bucket, reason = bucket_mib(trained, device)
    wrapped = DistributedDataParallel(
        model,
        # Accelerate would use the local rank as the GPU's number. A task that sees only one GPU does not
        # have a GPU with that number.
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket,
        find_unused_parameters=unused,
    )
    # Batch-norm statistics are averaged before they are used; no broadcast in every step. Set here because
    # the constructor's argument has a new name in each torch.
    wrapped.broadcast_buffers = False
    wrapped._set_ddp_runtime_logging_sample_rate(timed_every)
    return wrapped, Choice(f"{bucket:.3g} MiB", reason)


def warm_up_ddp_buckets(state: TrainState) -> None:
    """Makes DDP rebuild its gradient buckets, as it does after the first step. Every rank calls this.

    With more than two ranks, the position of a gradient in its bucket decides the order of summation. Without
    this, the first step of a resumed run would differ in the last bit from a run that was never stopped.
    Only the random number generators change.
    """
    if state.world_size <= 2 or not isinstance(state.model, DistributedDataParallel):
        return
    buffers = [(buffer, buffer.clone()) for buffer in state.bare_model.buffers()]
    with eager(state):
        output = state.model(torch.zeros(2, *state.image_shape, device=state.accelerator.device))
        torch.stack([scores.sum() for scores in all_scores(output)]).sum().backward()
    state.drop_gradients()
    for buffer, saved in buffers:
        buffer.copy_(saved)


def copy_from_rank_0(group: Group, networks: Sequence[nn.Module]) -> None:
    """Copies weights and buffers from rank 0, as DDP does. Every rank calls this."""
    if group.world_size > 1:
        for network in networks:
            for tensor in chain(network.parameters(), network.buffers()):
                copied = tensor.detach().contiguous()
                dist.broadcast(copied, 0)
                tensor.detach().copy_(copied)


def start_parameters(state: TrainState, parameters: dict[str, nn.Parameter], epochs_done: float) -> None:
    """Freezes parameters if `model.unfreeze_epoch` is still to come, and starts the momentum of the others.

    The model is not wrapped yet.

    Args:
        state: of this rank, after a resume with the optimizer's state of the checkpoint.
        parameters: those that `model.freeze` names, by name.
        epochs_done: see `unfreeze_if_due`, which ends the freeze.
    """
    until = state.config.model.unfreeze_epoch
    if until is not None and epochs_done < until:
        state.frozen = parameters
        freeze(state.bare_model, parameters.values())
        _count_trained(state)
    start_momentum(state.optimizer)


def unfreeze_if_due(state: TrainState, epochs_done: float) -> None:
    """Trains all parameters from `model.unfreeze_epoch` on. Every rank calls this before each step.

    What has been made for fewer parameters is made anew, as at a resume: DDP with its buckets, and the CUDA
    graph. The optimizer has had all parameters from the start, and no state of the frozen ones.

    Args:
        state: of this rank.
        epochs_done: samples seen so far divided by the samples of an epoch.
    """
    if not state.frozen or epochs_done < (state.config.model.unfreeze_epoch or math.inf):
        return
    log.info("%s are trained from here on", some_names(list(state.frozen)))
    device = state.group.device
    with preserve_rng_state(device):  # the passes of a blank image may draw random numbers
        _unfreeze(state)
    if state.graph is not None:
        state.graph = StepGraph(state.optimizer, device)


def _unfreeze(state: TrainState) -> None:
    wrapped = state.model
    state.model = state.bare_model
    unfreeze(state.model, state.frozen.values())
    state.frozen = {}
    start_momentum(state.optimizer)
    _count_trained(state)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped._remove_autograd_hooks()
        every, unused = state.config.monitor.log_every_steps, wrapped.find_unused_parameters
        buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
        state.model, _ = wrap_ddp(state.model, state.group.device, timed_every=every, unused=unused)
        for buffer, own in buffers:  # DDP has copied those of rank 0
            buffer.copy_(own)
        warm_up_ddp_buckets(state)


def _count_trained(state: TrainState) -> None:
    """Updates what depends on which parameters are trained."""
    state.parameters = trained_parameters(state.optimizer)
    with eager(state):
        state.flops_per_image = flops_per_image(state.bare_model, state.image_shape)
