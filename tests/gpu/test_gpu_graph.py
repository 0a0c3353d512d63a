"""A step replayed as a CUDA graph, and one of virtual ranks, give the same bits each time."""

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


def trained(index: Index, options: dict[str, Any], *, reproducible: bool = False) -> dict[str, Tensor]:
    """Trains two epochs in this process with deterministic kernels; returns the state."""
    fixed = {"train": {"compile": False, "cuda_graph": True, "reproducible": reproducible}}
    if reproducible:
        fixed["train"]["virtual_ranks"] = 4
    config = config_of(index, BATCH, fixed, options)
    group = join(config, "cuda")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    state, position, choices = build(config, Rank(0, None), group, index, None)
    assert choices["cuda_graph"].value == ("false" if reproducible else "true")
    train_through(state, position)
    if not reproducible:
        assert state.graph is not None
        assert state.graph.recorded == (graph._WARM_UP_STEPS < STEPS)
    parts = {"model": state.bare_model.state_dict(), "optimizer": state.optimizer.state_dict()}
    if state.ema is not None:
        parts["ema"] = state.ema.state_dict()
    return tensors(parts)


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
    for warm_up in (10**6, 3):
        monkeypatch.setattr(graph, "_WARM_UP_STEPS", warm_up)
        found.append(trained(index, options))
    assert_same_bits(*found)


@pytest.mark.parametrize("options", [*CASES.values(), *MORE.values()], ids=[*CASES, *MORE])
def test_virtual_ranks_give_the_same_bits_again(options: dict[str, Any], index: Index) -> None:
    assert_same_bits(*(trained(index, options, reproducible=True) for _ in range(2)))


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.cpu(), other[name].cpu()), name
