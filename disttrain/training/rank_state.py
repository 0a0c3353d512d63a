"""The state that differs between ranks, in checkpoints so that a resumed run equals an uninterrupted one.

Every rank calls every function here.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import astuple, replace

import numpy as np
import torch
from torch import Tensor

from disttrain import counter_rng
from disttrain.training.collectives import fill, float_buffers, gather
from disttrain.training.state import MeterState, TrainState

_USER_CODE = 24  # the stream of random numbers that seeds Python's and NumPy's generators


def seed_user_code(seed: int, rank: int) -> None:
    """Seeds Python's and NumPy's generators: our loops do not use them, but a user's model may."""
    _seed_python(counter_rng.derive(seed, _USER_CODE, rank))


def seed_all(key: int, device: torch.device) -> None:
    """Seeds every random number generator that a model on this device may use; `key` has 64 bits.

    torch.manual_seed takes a tenth of a millisecond, because it seeds every kind of device.
    """
    torch.default_generator.manual_seed(key >> 1)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(key >> 1)
    _seed_python(key)


def _seed_python(key: int) -> None:
    random.seed(key)
    np.random.seed(key >> 32)


@contextlib.contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restores this rank's random number generators on exit, also after an error.

    A user's network may draw random numbers in an evaluation. Its draws in training do not depend on how
    often it is evaluated, and an evaluation that is repeated draws the same numbers.
    """
    before = _generators(device)
    try:
        yield
    finally:
        _set_generators(before, device)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """Returns the state of all random number generators of this rank."""
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": torch.tensor(
            [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]], dtype=torch.float64
        ),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_generators(state: dict[str, Tensor], device: torch.device) -> None:
    """Restores the state that `_generators` returned."""
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    place, has_gauss, numpy_gauss = state["numpy_rest"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(place), int(has_gauss), numpy_gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather_rank_states(state: TrainState, *, with_buffers: bool) -> dict[str, Tensor]:
    """Returns the state that differs between ranks.

    Args:
        state: of this rank.
        with_buffers: whether to include each rank's batch-norm statistics.

    Returns:
        Tensors [ranks, ...]: random number generators, sums since the last log point, batch-norm statistics.
    """
    own = _generators(state.accelerator.device)
    own["meter"] = torch.tensor(astuple(state.meter.state()), dtype=torch.float64)
    buffers = _statistics(state)
    if with_buffers and buffers:
        own["buffers"] = torch.cat([buffer.reshape(-1).double() for buffer in buffers]).cpu()
    states = gather(state.group, own)
    return {name: torch.stack([one[name] for one in states]) for name in own}


def restore_rank_state(state: TrainState, states: dict[str, Tensor]) -> None:
    """Restores what `gather_rank_states` returned; with another world size, only the sums."""
    meters = states["meter"]
    if len(meters) == state.world_size:
        own = {name: value[state.rank].clone() for name, value in states.items()}  # aligned in memory
        _set_generators(own, state.accelerator.device)
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
