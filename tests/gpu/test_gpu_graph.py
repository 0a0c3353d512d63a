"""A step replayed as a CUDA graph is the step: the same weights to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from disttrain.shards.index import Index, load_index
from disttrain.training import graph
from disttrain.training.build import build
from disttrain.training.group import join
from disttrain.training.rank import Rank
from disttrain.training.state import TrainState
from kit import toy
from kit.graph_cases import CASES, config_of, train_through

pytestmark = pytest.mark.gpu

BATCH, STEPS = 16, 6


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("sets")
    # The last batch is smaller than the others.
    toy.pack("squares", train=BATCH * STEPS + 5, val=20, root=str(root), shape=(32, 32, 3))
    return load_index("squares", str(root))


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves what a run sets for its process as it was."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "no")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch.use_deterministic_algorithms(False)


def trained(index: Index, options: dict[str, Any]) -> TrainState:
    """Trains two epochs in this process."""
    fixed = {"train": {"compile": False, "reproducible": True, "cuda_graph": True}}
    config = config_of(index, BATCH, fixed, options)
    state, position, choices = build(config, Rank(0, None), join(config, "cuda"), index, None)
    assert choices["cuda_graph"].value == "true"
    train_through(state, position)
    return state


def tensors(tree: Any, name: str = "") -> dict[str, Tensor]:
    """Returns every tensor and number of a state dict by its place."""
    if isinstance(tree, Tensor | int | float | bool):
        return {name: torch.as_tensor(tree)}
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in tensors(value, f"{name}.{key}").items()}
    return {}


MORE = {
    "fp32": {"train": {"precision": "fp32"}},
    "momentum 0": {"optim": {"name": "sgd", "lr": 0.01, "momentum": 0.0}},
    "inception": {"model": {"name": "inception_small"}},
}


@pytest.mark.parametrize("options", [*CASES.values(), *MORE.values()], ids=[*CASES, *MORE])
def test_a_graph_trains_to_the_same_bits(
    options: dict[str, Any], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for recorded, warm_up in ((False, 10**6), (True, 3)):
        monkeypatch.setattr(graph, "_WARM_UP_STEPS", warm_up)
        state = trained(index, options)
        assert state.graph is not None
        assert state.graph.recorded == recorded
        state = {"model": state.bare_model.state_dict(), "optimizer": state.optimizer.state_dict()}
        if state.ema is not None:
            state["ema"] = state.ema.state_dict()
        found.append(tensors(state))
    plain, replayed = found
    assert plain.keys() == replayed.keys()
    for name, value in plain.items():
        assert torch.equal(value.cpu(), replayed[name].cpu()), name
