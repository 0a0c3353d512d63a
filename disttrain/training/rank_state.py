"""The state that differs between ranks, in checkpoints so that a resumed run equals an uninterrupted one.

Every rank calls every function here.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import torch
from torch import Tensor

from disttrain.training.collectives import fill, float_buffers, gather, packed
from disttrain.training.rng import generator_states, set_generator_states
from disttrain.training.state import MeterState, TrainState


def gather_rank_states(state: TrainState, *, with_buffers: bool) -> dict[str, Tensor]:
    """Returns the state that differs between ranks.

    Args:
        state: of this rank.
        with_buffers: whether to include each rank's batch-norm statistics.

    Returns:
        Tensors [ranks, ...]: random number generators, sums since the last log point, batch-norm statistics.
    """
    own = generator_states(state.accelerator.device)
    own["meter"] = torch.tensor(astuple(state.meter.state()), dtype=torch.float64)
    buffers = _statistics(state)
    if with_buffers and buffers:
        own["buffers"] = packed(buffers).cpu()
    states = gather(state.group, own)
    return {name: torch.stack([one[name] for one in states]) for name in own}


def restore_rank_state(state: TrainState, states: dict[str, Tensor]) -> None:
    """Restores what `gather_rank_states` returned; with another world size, only the sums."""
    meters = states["meter"]
    if len(meters) == state.world_size:
        own = {name: value[state.rank].clone() for name, value in states.items()}  # aligned in memory
        set_generator_states(own, state.accelerator.device)
        if "buffers" in own:
            fill(_statistics(state), own["buffers"])
        state.meter.load(MeterState(*own["meter"].tolist()))
    else:
        total, mean = (MeterState(*values.tolist()) for values in (meters.sum(0), meters.mean(0)))
        if state.rank:  # rank 0 gets all the sums
            total = MeterState(0, 0, 0, 0, 0, 0)
        state.meter.load(replace(mean, loss=total.loss, correct=total.correct, samples=total.samples))


def _statistics(state: TrainState) -> list[Tensor]:
    """Returns the batch-norm statistics of the model and its moving average."""
    return [buffer for network in state.networks for buffer in float_buffers(network)]
