"""Going on from a checkpoint on one rank."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from disttrain.config import OptimConfig, ScheduleConfig
from disttrain.errors import CheckpointError, TrainingError
from disttrain.runs import checkpoint
from disttrain.runs.checkpoint import bytes_needed, load, snapshot, write
from disttrain.training.ema import MovingAverage
from disttrain.training.optim import build_optimizer, state_bytes
from disttrain.training.restore import restore, restore_scaler
from kit.checkpoints import PARTS, assert_same, names, save, save_step

# --- What comes back ------------------------------------------------------------------------------

SHARED = torch.arange(6.0)

NESTED: dict[str, Any] = {
    "scalars": {
        "none": None,
        "yes": True,
        "one": 1,
        "real": 0.1,
        "text": "naïve \n",
        "step": torch.tensor(7.5),
    },
    "integer keys": {0: {"exp_avg": torch.ones(2)}, 10: {"exp_avg": torch.zeros(2)}},
    "like names": {0: torch.zeros(1), "0": torch.ones(1), "a": {"b": torch.ones(2)}, "a.b": torch.zeros(3)},
    "sequences": {"betas": (0.9, 0.999), "groups": [{"params": [0, 1]}, {"params": []}], "nothing": ()},
    "dtypes": {
        str(dtype): torch.tensor([[0, 1], [2, 100]]).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
    },
    "bool": torch.tensor([True, False]),
    "shapes": [torch.zeros(0), torch.zeros(3, 0), torch.arange(24).view(2, 3, 4).transpose(0, 2)],
    "tied": {"first": SHARED, "second": SHARED, "view": SHARED[2:]},
    "parameter": nn.Parameter(torch.ones(2)),
    "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "empty": {},
}


@pytest.mark.parametrize("name", NESTED)
def test_everything_comes_back(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "checkpoints", 1, {"model": NESTED[name]}, {"step": 1}, keep=1, best=False)
    loaded = load(path)
    assert_same(loaded.parts, {"model": NESTED[name]})
    assert loaded.state == {"step": 1}
    assert loaded.path == path


def test_saved_tensors_do_not_change_with_the_live_ones(tmp_path: Path) -> None:
    live = torch.zeros(4)
    path = save(tmp_path, 1, {"model": {"w": live}}, {}, keep=1, best=False)
    live += 1
    loaded = load(path).parts["model"]["w"]
    assert not loaded.any()
    loaded += 1
    assert not load(path).parts["model"]["w"].any()


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [save_step(tmp_path / name, 5) for name in ("a", "b")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
        "MANIFEST.json",
    }


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_the_bytes_needed_are_known_before_the_first_step(tmp_path: Path, name: str) -> None:
    model = network(64)
    optimizer, _ = build_optimizer(OptimConfig(name=name, lr=0.1), ScheduleConfig(), model)

    def parts() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    before = bytes_needed(parts()) + state_bytes(optimizer)
    take_step(model, optimizer, 0)
    assert state_bytes(optimizer) == 0
    path = save(tmp_path, 1, parts(), {"step": 1}, keep=1, best=False)
    taken = sum(file.stat().st_size for file in path.iterdir())
    for needed in (before, bytes_needed(parts())):
        assert taken <= needed <= taken + 2**15


def test_no_pickle() -> None:
    tree = ast.parse(Path(checkpoint.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {f"torch.{name}" for name in ("load", "save")} & {
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    assert "loads" in called  # of JSON: the names above are really looked at


# --- Numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, part: str, value: float) -> None:
    save_step(tmp_path, 1)
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    tensor[2] = value
    taken = snapshot(2, PARTS | {part: {"state": {0: {"weight": tensor}}}}, {})
    with pytest.raises(TrainingError) as caught:
        write(tmp_path, taken, keep=1, best=True)
    assert caught.value.exit_code == 70
    assert str(caught.value).startswith(f"{part}: 1 of 4 values of state.0.weight are not finite at step 2; ")
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert load(tmp_path / "latest").state == {"step": 1}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_finite_weights_whose_sum_is_not_are_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    weights = torch.full((100,), most, dtype=dtype)
    path = save(tmp_path, 1, {"model": {"weight": weights}}, {}, keep=1, best=False)
    assert_same(load(path).parts, {"model": {"weight": weights}})
    weights[50] = -math.inf  # the sum with the others is no number
    with pytest.raises(TrainingError, match="model: 1 of 100 values of weight"):
        save(tmp_path, 2, {"model": {"weight": weights}}, {}, keep=1, best=False)


def test_buffers_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    buffers = {"model": [name for name, _ in model.named_buffers()]}
    model[1].running_var[0] = float("inf")  # type: ignore[index, operator]
    path = write(tmp_path, snapshot(1, {"model": model.state_dict()}, {}, buffers), keep=1, best=False)
    assert load(path).parts["model"]["1.running_var"].tolist() == [float("inf"), 1.0]
    with pytest.raises(TrainingError, match=r"model: 1 of 2 values of 1\.running_var are not"):
        write(tmp_path, snapshot(2, {"model": model.state_dict()}, {}), keep=1, best=False)
    model[1].running_var[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(TrainingError, match=r"1\.running_var"):
        write(tmp_path, snapshot(3, {"model": model.state_dict()}, {}, buffers), keep=1, best=False)


# --- Restoring ------------------------------------------------------------------------------------


def network(width: int = 4, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(4 * width, 2))
    return layers.to(memory_format=torch.channels_last) if channels_last else layers


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    model(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_run(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **parts: nn.Module) -> Path:
    states = {name: part.state_dict() for name, part in parts.items()}
    parts_to_save = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **states}
    return save(folder, 1, parts_to_save, {}, keep=1, best=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.01, momentum=0.9, fused=True), lambda p: Adam(p, 0.01, fused=True)]
)
def test_a_restored_run_goes_on_bit_by_bit(tmp_path: Path, make: Any, channels_last: bool) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model.parameters())
    for seed in range(3):
        take_step(model, optimizer, seed)
    path = save_run(tmp_path, model, optimizer)
    take_step(model, optimizer, 3)
    other = network(channels_last=channels_last)
    going_on = make(other.parameters())
    restore(load(path), other, going_on)
    take_step(other, going_on, 3)
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_the_moving_average_is_restored(tmp_path: Path) -> None:
    model = network()
    average = MovingAverage(model, 0.9)
    average.update(model)
    optimizer = SGD(model.parameters(), 0.1)
    path = save_run(tmp_path, model, optimizer, ema=average)
    other = MovingAverage(network(), 0.9)
    nn.init.zeros_(other.module.get_parameter("0.weight"))
    restore(load(path), model, optimizer, other)
    assert torch.equal(other.module.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert other.n_averaged == 1


@pytest.mark.parametrize(
    ("model", "make", "reason"),
    [
        (
            network(5),
            lambda p: Adam(p, 0.1),
            r"model does not match the config: .*size mismatch for 0\.weight",
        ),
        (nn.Linear(3, 2), lambda p: Adam(p, 0.1), r"model does not match the config: .*Missing key"),
        (network(), lambda p: Adam([next(p)], 0.1), r"optimizer does not match the config: .*size of optim"),
    ],
)
def test_a_checkpoint_of_another_network(tmp_path: Path, model: nn.Module, make: Any, reason: str) -> None:
    saved = network()
    path = save_run(tmp_path, saved, Adam(saved.parameters(), 0.1))
    with pytest.raises(CheckpointError, match=reason) as caught:
        restore(load(path), model, make(model.parameters()))
    assert str(path) in str(caught.value)
    assert "resume with the config it was saved with" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_that_the_config_does_not_use(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    path = save_run(tmp_path, model, optimizer, ema=MovingAverage(model, 0.9))
    with pytest.raises(
        CheckpointError, match=r"average of the weights, but the config has train\.ema = null; .*--force"
    ):
        restore(load(path), model, optimizer)
    restore(load(path), model, optimizer, force=True)


@pytest.mark.parametrize("saved_with", [True, False])
def test_the_gradient_scaler_is_restored_where_there_was_one(tmp_path: Path, saved_with: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    state = {"scaler": scaler.state_dict() if saved_with else None}
    loaded = load(save(tmp_path, 1, PARTS, state, keep=1, best=False))
    other = torch.amp.GradScaler("cpu")
    if saved_with:
        restore_scaler(loaded, other, force=False)
        assert other.get_scale() == 2.0**7
        with pytest.raises(CheckpointError, match=r"has a gradient scaler, but only .* --force"):
            restore_scaler(loaded, None, force=False)
        restore_scaler(loaded, None, force=True)
    else:
        restore_scaler(loaded, None, force=False)
        with pytest.raises(CheckpointError, match=r"has no gradient scaler, but train\.precision = fp16"):
            restore_scaler(loaded, other, force=True)


def test_a_value_that_was_not_saved(saved: Path) -> None:
    loaded = load(saved)
    assert loaded.value("step") == 1
    with pytest.raises(CheckpointError, match=r"state\.json: has no epoch"):
        loaded.value("epoch")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    path = save_run(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match="has no ema; it was saved by a run without one"):
        restore(load(path), model, optimizer, MovingAverage(model, 0.9))
