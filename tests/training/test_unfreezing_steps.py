"""Steps with frozen parameters, and from the one on that trains them."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.models.freezing import named_by_freeze
from disttrain.training.state import Progress, TrainState
from disttrain.training.wrapping import start_parameters
from kit.training import make_state, network, run, weights_of, with_

FROZEN = {"0.weight", "0.bias", "1.weight", "1.bias"}
STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def frozen_state(unfreeze_epoch: float, **options: Any) -> TrainState:
    state = make_state(network(norm=True), samples=64, **options)
    state = with_(state, model={"freeze": r"[01]\..*", "unfreeze_epoch": unfreeze_epoch})
    start_parameters(state, named_by_freeze(state.config.model, state.bare_model), 0.0)
    return state


OPTIMIZERS = [
    {"name": "sgd", "weight_decay": 0.1, "decay_norms_and_biases": False},
    {"name": "adamw", "weight_decay": 0.1, "layer_decay": 0.5},
    {"name": "muon", "weight_decay": 0.1, "normalize_weights": True},
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim["name"])
@pytest.mark.parametrize("mode", [{}, {"reproducible": True, "virtual_ranks": 4}], ids=["", "reproducible"])
def test_frozen_parameters_and_their_norms_move_from_the_epoch_on(
    optim: dict[str, Any], mode: dict[str, Any]
) -> None:
    state = frozen_state(1.25, optim=optim, grad_clip=1.0, ema=0.5, **mode)
    before, progress, seen = weights_of(state.bare_model), Progress(), []
    flops = state.flops_per_image

    def look() -> None:  # after each step
        now = weights_of(state.bare_model)
        seen.append({name for name, value in now.items() if not value.equal(before[name])})

    with_(state, monitor={"log_every_steps": 1})
    run(state, progress, check=look)
    assert len(seen) == progress.step == 8
    assert not any(names & (FROZEN | STATISTICS) for names in seen[:5])
    assert all("6.weight" in names for names in seen)
    assert seen[5] >= FROZEN - {"0.bias"} | STATISTICS  # a bias before a norm gets almost no gradient
    assert not state.frozen
    assert flops is not None
    assert state.flops_per_image is not None
    assert state.flops_per_image > flops


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state() -> None:
    state = frozen_state(9.0, optim={"name": "adam"})
    run(state)
    frozen = list(state.frozen.values())
    assert set(state.frozen) == FROZEN
    assert all(parameter.grad is None for parameter in frozen)
    assert not any(parameter in state.optimizer.state for parameter in frozen)
    assert len(state.optimizer.state) == len(state.parameters) == 4
