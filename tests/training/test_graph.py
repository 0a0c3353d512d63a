"""Steps as a CUDA graph, on a CPU: a stand-in records the operations of a step and repeats them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from disttrain.config import Config
from disttrain.errors import UsageError
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.shards.index import Index, load_index
from disttrain.training import graph as module
from disttrain.training.autotune import Settings
from disttrain.training.build import build
from disttrain.training.graph import StepGraph, graph_choice
from disttrain.training.group import join
from disttrain.training.rank import Rank
from disttrain.training.state import TrainState
from kit import toy
from kit.graph_cases import CASES, config_of, train_through

BATCH, STEPS = 16, 6
_WRITES_UNTOLD = {
    torch.ops.aten.native_batch_norm.default: (3, 4)
}  # arguments that its schema says nothing of


class Graph(TorchDispatchMode):
    """What is asked of a CUDAGraph: repeats what was done inside, on the same tensors.

    What a recording changes is put back at its end: a GPU does nothing while it is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The only number of the host that a step reads is the counter of the average, an integer.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64:
            raise RuntimeError("the host waits for the GPU")
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        writes = {
            a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        }
        writes |= {names[place] for place in _WRITES_UNTOLD.get(func, ())}
        given = dict(zip(names, args, strict=False)) | kwargs
        for tensor in tree_leaves([given.get(name) for name in writes]):
            if isinstance(tensor, Tensor) and _memory(tensor) not in self._made:
                self._saved.setdefault(_memory(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        taken = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._made |= {_memory(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)} - taken
        self.calls.append((func, args, kwargs, result))
        return result

    def put_back(self) -> None:
        """Undoes what was done while recording."""
        for tensor, before in self._saved.values():
            tensor.detach().copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Does it once more."""
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def recording(graph: Graph, **_: Any) -> Iterator[None]:
    before = torch.get_rng_state()
    with graph:
        yield
    graph.put_back()
    torch.set_rng_state(before)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has graphs."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "no")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("sets")
    # The last batch is smaller than the others.
    toy.pack("squares", train=BATCH * STEPS + 5, val=20, root=str(root), shape=(32, 32, 3))
    return load_index("squares", str(root))


def trained(
    index: Index, options: dict[str, Any], *, graph: bool = True
) -> tuple[TrainState, list[TrainRecord | EvalRecord]]:
    """Trains two epochs in this process; returns the records too."""
    fixed = {"train": {"precision": "fp32", "channels_last": True}, "monitor": {"log_every_steps": 4}}
    config = config_of(index, BATCH, fixed, options)
    state, position, _ = build(config, Rank(0, None), join(config, "cpu"), index, None)
    if graph:
        state.graph = StepGraph(state.optimizer, state.accelerator.device)
    return state, train_through(state, position)


@pytest.mark.integration
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_replayed_steps_are_the_same_to_the_last_bit(
    options: dict[str, Any], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, records = trained(index, options)
    graph: Any = replayed.graph
    assert graph.recorded
    assert graph._graph.replays == 2 * STEPS - 3  # all whole batches but those that warm up
    monkeypatch.setattr(module, "_WARM_UP_STEPS", 10**6)
    taken, taken_records = trained(index, options)
    for key in ("loss", "accuracy", "lr", "samples", "correct"):
        assert [getattr(record, key, None) for record in records] == [
            getattr(record, key, None) for record in taken_records
        ]
    for one, other in zip(tree_leaves(weights_of(taken)), tree_leaves(weights_of(replayed)), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def weights_of(state: TrainState) -> list[Any]:
    found = [state.bare_model.state_dict(), state.optimizer.state_dict()]
    return found if state.ema is None else [*found, state.ema.state_dict()]


@pytest.mark.integration
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", ["batch norm", "adam, average, clipping", "augmented"])
def test_a_run_with_a_graph_learns_as_one_without(case: str, index: Index) -> None:
    plain, plain_records = trained(index, CASES[case], graph=False)
    replayed, records = trained(index, CASES[case])
    for key in ("loss", "lr"):
        found = [
            [getattr(record, key) for record in one if hasattr(record, key)]
            for one in (plain_records, records)
        ]
        assert found[1] == pytest.approx(found[0], rel=1e-3)
    # No rate is left on the device: a checkpoint is the same with a graph and without.
    states = [state.optimizer.state_dict() for state in (plain, replayed)]
    kinds = [[type(leaf) for leaf in tree_leaves(state)] for state in states]
    assert kinds[0] == kinds[1]
    if plain.ema is not None and replayed.ema is not None:
        assert int(plain.ema.n_averaged) == int(replayed.ema.n_averaged) == 2 * (STEPS + 1)


@pytest.mark.integration
@pytest.mark.usefixtures("gpu")
def test_no_rate_of_an_inner_optimizer_is_left_on_the_device(index: Index) -> None:
    state, _ = trained(index, CASES["muon and groups"])
    groups = state.optimizer.param_groups
    assert len(groups) == 3  # of Muon, SGD and AdamW
    assert [type(group["lr"]) for group in groups] == [float] * len(groups)


@pytest.mark.usefixtures("gpu")
def test_without_memory_for_its_activations_nothing_is_recorded(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**20))
    state, records = trained(index, {}, graph=True)
    assert state.graph is not None
    assert not state.graph.recorded
    assert records[-1].total == 20


OTHER = {"model": {"name": "torchvision:resnet18"}}
ON = {"train": {"cuda_graph": True}}


@pytest.mark.parametrize(
    ("options", "device", "ranks", "precision", "expected"),
    [
        ({}, "cuda", 1, "bf16", "true: a single GPU"),
        (OTHER, "cuda", 1, "bf16", "false: your own network; train.cuda_graph=true tries it"),
        (OTHER | ON, "cuda", 1, "bf16", "true: train.cuda_graph"),
        ({"train": {"compile": True}}, "cuda", 1, "bf16", "false: compiled; train.cuda_graph=true does both"),
        ({"train": {"cuda_graph": False}}, "cuda", 1, "bf16", "false: train.cuda_graph"),
        (ON, "cpu", 1, "fp32", "false: there is no GPU"),
        (ON, "cuda", 2, "bf16", "false: several ranks reduce their gradients"),
        ({"train": {"accumulate": 2}}, "cuda", 1, "bf16", "false: train.accumulate"),
        ({}, "cuda", 1, "fp16", "false: fp16 scales the loss"),
        ({"augment": {"mixup": 0.2}}, "cuda", 1, "bf16", "false: mixed images differ from step to step"),
    ],
)  # fmt: skip
def test_what_runs_as_a_graph(
    options: dict[str, Any], device: str, ranks: int, precision: Any, expected: str
) -> None:
    tree: dict[str, Any] = {
        "name": "graph",
        "data": {"name": "cifar10"},
        "model": {"name": "lenet_bn"},
        "train": {"epochs": 1, "batch_size": 4},
        "optim": {"name": "sgd", "lr": 0.1},
    }
    for section, values in options.items():
        tree[section] = tree.get(section, {}) | values
    config = Config.model_validate(tree)
    settings = Settings(precision, True, config.train.compile is True, 1)
    assert str(graph_choice(config, torch.device(device), ranks, settings)) == expected


class Impatient(nn.Linear):
    """Waits for the GPU in every pass."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        assert float(images.flatten(1).abs().max()) >= 0
        return super().forward(images.flatten(1))


@pytest.mark.usefixtures("gpu")
def test_what_cannot_be_recorded_ends_the_run_with_a_remedy(index: Index) -> None:
    with pytest.raises(UsageError, match=r"the host waits for the GPU\); set train.cuda_graph=false"):
        trained(index, {"model": {"name": "test_graph:Impatient"}})


def test_a_step_that_waits_for_the_gpu_is_not_recorded_as_if_it_did_not() -> None:
    value = torch.zeros(())
    with pytest.raises(RuntimeError, match="the host waits"), Graph():
        float(value)
