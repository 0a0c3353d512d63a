"""The random number generators of a process: torch's, NumPy's and Python's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from disttrain import counter_rng

_USER_CODE = 24  # the stream of random numbers that seeds Python's and NumPy's generators


def seed_user_code(seed: int, rank: int) -> None:
    """Seeds Python's and NumPy's generators: our loops do not use them, but a user's model may."""
    _seed_python(counter_rng.derive(seed, _USER_CODE, rank))


def seed_all(key: int, device: torch.device) -> None:
    """Seeds every random number generator that a model on this device may use; `key` has 64 bits."""
    torch.default_generator.manual_seed(key >> 1)
    if device.type != "cpu":
        make_seed_fn(device)(key >> 1)
    _seed_python(key)


def make_seed_fn(device: torch.device) -> Callable[[int], object]:
    """Returns a function that seeds torch's random number generator of a device.

    torch.manual_seed takes a tenth of a millisecond, because it seeds every kind of device.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].manual_seed
    return torch.default_generator.manual_seed


def _seed_python(key: int) -> None:
    random.seed(key)
    np.random.seed(key >> 32)


@contextlib.contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restores this rank's random number generators on exit, also after an error.

    A user's network may draw random numbers in an evaluation. Its draws in training do not depend on how
    often it is evaluated, and an evaluation that is repeated draws the same numbers.
    """
    before = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(before, device)


def generator_states(device: torch.device) -> dict[str, Tensor]:
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


def set_generator_states(state: dict[str, Tensor], device: torch.device) -> None:
    """Restores the state that `_generators` returned."""
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    place, has_gauss, numpy_gauss = state["numpy_rest"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(place), int(has_gauss), numpy_gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
