"""What a rank asks of a GPU, where there is none: nothing mixes devices, and no step waits for the GPU.

The tensors have a device, a type and a shape, but no content. torch refuses to compute with tensors of two
devices and to tell a number that would have to come from a GPU. All is what a run is made of, except what
torch does not do without a driver or without content: the backward pass, which gives gradients of 0 here,
fused SGD, events, the generator of the GPU, modules that are moved to it, and copies of modules. So a model
is not tried before the start.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.config import Config
from disttrain.models import pretrained
from disttrain.runs import checkpoint
from disttrain.shards.index import Index, load_index
from disttrain.training import build as building
from disttrain.training import ema, wrapping
from disttrain.training.collectives import Group
from disttrain.training.evaluation import EvalTask, score
from disttrain.training.metrics import EvalMetrics
from disttrain.training.microbatch import prefetch
from disttrain.training.phases import Phases
from disttrain.training.saver import saved_parts
from disttrain.training.state import TrainState
from disttrain.training.step import train_step
from kit import toy
from kit.marks import nightly

GPU = torch.device("cuda", 0)
BATCH, STEPS = 16, 3
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to)


class OneGpu:
    """What is asked of an Accelerator."""

    device, num_processes, process_index, scaler = GPU, 1, 0, None

    def __init__(self, **settings: Any) -> None:
        pass

    def prepare_model(self, model: nn.Module, *, device_placement: bool, evaluation_mode: bool) -> nn.Module:
        return model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Event:
    """What is asked of a torch.cuda.Event."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU without content."""
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")  # the build sets it
    monkeypatch.setattr(building, "Accelerator", OneGpu)
    monkeypatch.setattr(building, "unused_parameters", lambda *_: [])
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("sets")
    toy.pack("squares", train=BATCH * STEPS, val=20, root=str(root), shape=(32, 32, 3))
    return load_index("squares", str(root))


def build(index: Index, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> TrainState:
    """Builds what a run with these options trains with."""
    tree: dict[str, Any] = {
        "name": "fake",
        "data": {"name": index.name, "root": str(index.folder.parent)},
        "model": {"name": "lenet_bn"},
        "train": {
            "epochs": 1,
            "batch_size": BATCH,
            "precision": "fp32",
            "compile": False,
            "cuda_graph": False,
        },
        "optim": {"name": "sgd", "lr": 0.1},
    }
    for section, values in options.items():
        tree[section] = tree.get(section, {}) | values
    config = Config.model_validate(tree)
    build_for = pretrained.build_for

    def build_there(*arguments: Any) -> nn.Module:
        with GPU:
            return build_for(*arguments)

    monkeypatch.setattr(pretrained, "build_for", build_there)
    # deepcopy reads memory, which such tensors do not have.
    again = SimpleNamespace(deepcopy=lambda model: build_there(config.model, index))
    monkeypatch.setattr(ema, "copy", again)
    group = SimpleNamespace(device=GPU, num_processes=1, process_index=0)
    state, _, choices = building.build(config, SimpleNamespace(number=0), group, index, None)  # type: ignore[arg-type]
    assert choices["cache"].value == tree["data"].get("cache", "device")

    def backward(loss: Tensor, weight: Tensor) -> None:
        assert (loss.device, weight.device, weight.shape) == (GPU, GPU, loss.shape)
        for parameter in state.bare_model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    return state


class Copies(TorchDispatchMode):
    """Notes the copies from device to device: from where, to where, and whether the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in _COPIES and result.device != args[0].device:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            self.seen.add((args[0].device.type, result.device.type, not given["non_blocking"]))
        return result


MUON = {"name": "muon", "groups": [{"parameters": ".*bias", "name": "sgd", "lr": 1.0}]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"data": {"cache": "host"}},
    "augmented": {
        "augment": {"crop_padding": 2, "flip": True, "cutout": 8, "mixup": 0.2, "cutmix": 1.0},
        "optim": {"name": "adamw"},
    },
    "augmented, from the host": {
        "data": {"cache": "host"},
        "augment": {"resized_crop": 0.3, "flip": "alternating", "mixup": 0.2},
        "train": {"accumulate": 2, "ema": 0.99, "grad_clip": 1.0, "label_smoothing": 0.1},
    },
    "speednet": {"model": {"name": "speednet"}, "optim": MUON, "augment": {"flip": "alternating"}},
}


@pytest.mark.integration
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", [*(name for name in CASES if name != "speednet"), *nightly("speednet")])
def test_a_step_neither_mixes_devices_nor_waits(
    name: str, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build(index, monkeypatch, CASES[name])
    order = state.plan.order(0)
    state.augment.start_epoch(0, order, *state.image_size)
    state.model.train()
    phases = Phases(device=GPU)
    copies = Copies()
    with contextlib.closing(prefetch(state, 0, range(STEPS), order)) as batches:
        train_step(state, batches, 1, BATCH, phases)  # the order goes to the device first
        with copies:
            for step in range(2, STEPS + 1):
                assert len(train_step(state, batches, step, BATCH, phases)) == BATCH
    mixed = {"mixup", "cutmix"} & CASES[name].get("augment", {}).keys()
    expected = {("cpu", "cuda", False)} if mixed or state.config.data.cache == "host" else set()
    assert copies.seen == expected
    with pytest.raises(DataDependentOutputException):  # a log point is where the host waits
        state.meter.totals()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tta", ["none", "flip", "multi_view"])
def test_an_evaluation_and_a_snapshot_stay_on_the_device(
    tta: Any, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build(index, monkeypatch, {"data": {"cache": "host"}, "train": {"ema": 0.9}})
    tally, copies = EvalMetrics(GPU, len(index.classes)), Copies()
    group = Group(0, 1, GPU)
    subject = EvalTask(state.bare_model, state.augment.normalize, state.val, group, 8, OneGpu().autocast)
    with copies:
        assert score(subject, tta, tally.add, lambda number: True)
    assert copies.seen == {("cpu", "cuda", False)}
    copies.seen.clear()
    with copies:
        taken = checkpoint.snapshot(1, saved_parts(state), {})
    assert copies.seen == set()
    assert taken.ready is not None
    assert all(tensor.device == GPU for tensor in taken.tensors["model"].values())


class Wrapped:
    """What is asked of DDP."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.settings = settings

    def _set_ddp_runtime_logging_sample_rate(self, steps: int) -> None:
        self.timed_every = steps


def test_the_second_task_that_sees_one_gpu_computes_on_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(wrapping, "DistributedDataParallel", Wrapped)
    wrapped: Any
    wrapped, reason = wrapping.wrap_ddp(nn.Linear(2, 2), GPU, timed_every=7)
    assert (wrapped.settings["device_ids"], wrapped.timed_every, wrapped.broadcast_buffers) == ([0], 7, False)
    assert str(reason).startswith("1 MiB: one bucket")
    wrapped, _ = wrapping.wrap_ddp(nn.Linear(2, 2), torch.device("cpu"), timed_every=7)
    assert wrapped.settings["device_ids"] is None


@pytest.mark.nightly
def test_a_single_process_names_its_gpu(tmp_path: Path) -> None:
    """Accelerate says `cuda` there, which is no place in torch's list of generators."""
    program = """
import accelerate.state, torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
accelerate.state.check_cuda_p2p_ib_support = lambda: True
from disttrain.config import Config
from disttrain.training.group import join
tree = {"name": "x", "data": {"name": "x"}, "model": {"name": "x"}, "train": {"epochs": 1, "batch_size": 1}}
print(join(Config.model_validate(tree | {"optim": {"name": "sgd", "lr": 1}}), "cuda").device)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.stdout, done.returncode) == ("cuda:0\n", 0), done.stderr
