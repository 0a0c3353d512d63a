"""Checkpoints: what comes back, what is noticed, and what a failure in the middle leaves."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from disttrain import files
from disttrain.config import OptimConfig, ScheduleConfig
from disttrain.errors import CheckpointError, StorageError, TrainingError
from disttrain.runs import checkpoint, manifest
from disttrain.runs.checkpoint import Writer, bytes_needed, load, snapshot, write
from disttrain.runs.manifest import latest_valid, verify, write_manifest
from disttrain.training.ema import MovingAverage
from disttrain.training.optim import build_optimizer, state_bytes
from disttrain.training.restore import restore, restore_scaler

PARTS = {"model": {"weight": torch.arange(12.0).view(3, 4)}, "optimizer": {"state": {0: {"step": 3}}}}


def save(
    folder: Path, step: int, parts: dict[str, Any], state: dict[str, Any], *, keep: int, best: bool
) -> Path:
    return write(folder, snapshot(step, parts, state), keep=keep, best=best)


def save_step(folder: Path, step: int, *, keep: int = 2, best: bool = False, value: float = 0.0) -> Path:
    parts = PARTS | {"ema": {"weight": torch.full((5,), value)}}
    return save(folder, step, parts, {"step": step}, keep=keep, best=best)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.device.type == "cpu"
        assert torch.equal(found, expected.detach())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    else:
        assert type(found) is type(expected)
        assert found == expected


# --- What comes back --------------------------------------------------------------------------------

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


# --- Damage -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_step(tmp_path / "checkpoints", 1)


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    chance = random.Random(0)
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        is_manifest = path.name == "MANIFEST.json"
        for place in range(len(whole)) if is_manifest else chance.choices(range(len(whole)), k=40):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            # A wrong format in the manifest is of the whole checkpoint.
            reason = f"{saved}.*(damaged|format)" if is_manifest else f"{path}: damaged: found"
            with pytest.raises(CheckpointError, match=reason):
                load(saved)
            with pytest.raises(CheckpointError):
                verify(saved)
        path.write_bytes(whole)
    load(saved)


@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_truncated_files_are_noticed(saved: Path, keep: float) -> None:
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        os.truncate(path, len(whole) - 1 if keep < 0 else int(keep * len(whole)))
        with pytest.raises(CheckpointError, match=path.name) as caught:
            load(saved)
        assert caught.value.exit_code == 66
        path.write_bytes(whole)


def test_missing_files_are_noticed(saved: Path) -> None:
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            verify(saved)
        path.write_bytes(whole)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000009: there is no checkpoint"):
        load(tmp_path / "step_00000009")


def test_a_checkpoint_of_another_format(saved: Path) -> None:
    manifest = saved / "MANIFEST.json"
    manifest.write_text('{"format": 1, "files": {}}')
    with pytest.raises(CheckpointError, match="checkpoint format 1; this version reads format 2: "):
        load(saved)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "weights.bin"])
def test_a_part_that_this_version_does_not_know(saved: Path, name: str) -> None:
    (saved / "MANIFEST.json").unlink()
    write_manifest(saved, {name: {"bytes": 1, "sha256": "0", "format": 1}})
    with pytest.raises(CheckpointError, match="does not know the part"):
        verify(saved)


def test_a_part_that_the_manifest_leaves_out(saved: Path) -> None:
    parts = json.loads((saved / "MANIFEST.json").read_text())["parts"]
    for name in parts:
        (saved / "MANIFEST.json").unlink()
        write_manifest(saved, {other: entry for other, entry in parts.items() if other != name})
        verify(saved)
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            load(saved)


# --- Links and rotation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [
        ([], 1, [6]),
        ([], 2, [5, 6]),
        ([1], 2, [1, 5, 6]),
        ([1, 2], 2, [2, 5, 6]),
        ([5], 2, [5, 6]),
        ([1], 10, [1, 2, 3, 4, 5, 6]),
        ([1], 1, [1, 6]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, best: list[int], keep: int, left: list[int]
) -> None:
    for step in range(1, 7):
        save_step(tmp_path, step, keep=keep, best=step in best)
        assert (tmp_path / "latest").readlink() == Path(f"step_{step:08d}")
    links = ["best", "latest"] if best else ["latest"]
    assert names(tmp_path) == [*links, *(f"step_{step:08d}" for step in left)]
    if best:
        assert load(tmp_path / "best").state == {"step": max(best)}
    assert load(tmp_path / "latest").state == {"step": 6}


def test_links_survive_moving_the_run(tmp_path: Path) -> None:
    save_step(tmp_path / "here", 3, best=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    for link in ("best", "latest"):
        assert load(tmp_path / "there" / link).path == tmp_path / "there" / "step_00000003"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_step(tmp_path, 5, value=value)
    save_step(tmp_path, 6)
    assert load(tmp_path / "step_00000005").parts["ema"]["weight"].tolist() == [2.0] * 5
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000006"]


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    for name in (".step_00000001.partial", ".step_00000001.replaced.partial", ".step_00000009.partial"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    (tmp_path / ".latest.partial").symlink_to("step_00000009")
    save_step(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step_00000001"]


# --- Failures while saving --------------------------------------------------------------------------


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, numbers: range, code: int, *, after: bool = False
) -> Callable[[], int]:
    """Makes some calls of a function of `os` fail, before or after they do their work.

    Returns:
        A function that tells how often it was called.
    """
    calls = 0
    original = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls not in numbers:
            return original(*arguments, **options)
        if after:
            original(*arguments, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, failing)
    return lambda: calls


def prepare_steps(folder: Path) -> Path:
    """Returns a folder with the checkpoints of steps 1 (the best) and 2."""
    save_step(folder, 1, best=True)
    save_step(folder, 2, value=1.0)
    return folder


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a new step"])
@pytest.mark.parametrize(
    ("name", "least"),
    [("fsync", 8), ("mkdir", 1), ("open", 5), ("write", 5), ("replace", 2), ("symlink", 1)],
)
def test_a_failure_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, name: str, least: int
) -> None:
    def save_failing(folder: Path, number: int) -> int:
        with monkeypatch.context() as patch:
            calls = fail_at(patch, name, range(number, number + 1), errno.ENOSPC)
            save_step(folder, step, keep=1, value=2.0)
        return calls()

    total = save_failing(prepare_steps(tmp_path / "sound"), 0)
    assert total >= least
    for number in range(1, total + 1):
        folder = prepare_steps(tmp_path / str(number))
        told = ""
        try:
            save_failing(folder, number)
        except StorageError as error:
            told = str(error)
        reason = rf"step_{step:08d}: .*No space left.* \([0-9,]+ bytes needed, [0-9,]+ bytes free\)"
        # Old folders can be deleted later too, if that is what failed.
        assert re.search(reason, told) or (
            name == "open" and (folder / "latest").resolve().name[-1] == str(step)
        )
        found, damages = latest_valid(folder)
        assert found is not None
        assert not damages
        assert load(found).parts["ema"]["weight"][0].item() in {1.0, 2.0}
        assert load(folder / "best").state == {"step": 1}
        for path in folder.glob("step_*"):
            load(path)
        save_step(folder, 4, value=3.0)  # and the run can go on
        assert load(folder / "latest").parts["ema"]["weight"][0].item() == 3.0
        assert not list(folder.glob(".step_*"))


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done and told late"])
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EBUSY, errno.EIO, errno.ENOENT, errno.ENOTEMPTY])
@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a new step"])
@pytest.mark.parametrize("name", ["replace", "symlink"])
def test_what_fails_in_passing_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int, code: int, after: bool
) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0, 0, 0))
    folder = prepare_steps(tmp_path)
    with monkeypatch.context() as patch:
        calls = fail_at(patch, name, range(1, 3), code, after=after)
        save_step(folder, step, keep=1, value=2.0)
        assert calls() >= (1 if after else 3)
    assert load(folder / "latest").path == folder / f"step_{step:08d}"
    assert load(folder / "latest").parts["ema"]["weight"][0].item() == 2.0
    assert names(folder) == ["best", "latest", "step_00000001", f"step_{step:08d}"]


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a new step"])
def test_a_rename_that_never_works_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0, 0.01))
    folder = prepare_steps(tmp_path)
    with monkeypatch.context() as patch:
        calls = fail_at(patch, "replace", range(1, 1000), errno.ESTALE)
        with pytest.raises(StorageError, match=f"step_{step:08d}: .*{os.strerror(errno.ESTALE)}") as caught:
            save_step(folder, step, value=2.0)
        assert caught.value.exit_code == 74
        assert calls() == 3
    assert load(folder / "latest").parts["ema"]["weight"][0].item() == 1.0


def test_the_pauses_before_another_attempt_grow_and_are_some_seconds() -> None:
    assert list(files.PAUSES_S) == sorted(files.PAUSES_S)
    assert 3 <= sum(files.PAUSES_S) <= 15


def test_a_checkpoint_that_is_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where the new name leads to the old folder for some time."""
    monkeypatch.setattr(files, "PAUSES_S", (0, 0, 0))
    looks = 0
    read_bytes = Path.read_bytes

    def lagging(path: Path) -> bytes:
        nonlocal looks
        if path == tmp_path / "step_00000001" / "MANIFEST.json":
            looks += 1
            if looks == 1:
                raise FileNotFoundError(errno.ENOENT, "not yet", str(path))
            if looks == 2:
                return b"{}"
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", lagging)
    save_step(tmp_path, 1)
    assert looks == 3
    looks = -100
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: b"" if "step_00000002/" in str(path) else lagging(path)
    )
    with pytest.raises(StorageError, match="step_00000002: "):
        save_step(tmp_path, 2)


def test_bytes_that_change_on_their_way_to_the_disk_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    write_new = files.write_new

    def flipping(path: Path, *pieces: bytes | memoryview) -> None:
        data = b"".join(pieces)
        write_new(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name == changed else data)

    monkeypatch.setattr(checkpoint, "write_new", flipping)
    monkeypatch.setattr(manifest, "write_new", flipping)
    for changed in ("model.safetensors", "state.json", "MANIFEST.json"):
        with pytest.raises(StorageError, match=rf"step_00000002: was not written .*{changed}: damaged"):
            save_step(tmp_path, 2)
        assert names(tmp_path) == ["latest", "step_00000001"]


# --- Numbers that are not finite --------------------------------------------------------------------


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


# --- Restoring --------------------------------------------------------------------------------------


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
        (network(5), lambda p: Adam(p, 0.1), r"model does not fit the config: .*size mismatch for 0\.weight"),
        (nn.Linear(3, 2), lambda p: Adam(p, 0.1), r"model does not fit the config: .*Missing key"),
        (network(), lambda p: Adam([next(p)], 0.1), r"optimizer does not fit the config: .*size of optim"),
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
    with pytest.raises(CheckpointError, match=r"\(ema\), the config has train\.ema = null; .*--force"):
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
        with pytest.raises(CheckpointError, match=r"has a gradient scaler, which is for .* --force"):
            restore_scaler(loaded, None, force=False)
        restore_scaler(loaded, None, force=True)
    else:
        restore_scaler(loaded, None, force=False)
        with pytest.raises(CheckpointError, match=r"has no gradient scaler, which train\.precision = fp16"):
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


# --- Beside the training ----------------------------------------------------------------------------


def test_a_snapshot_keeps_the_state_of_its_moment(tmp_path: Path) -> None:
    live = torch.zeros(1000)
    taken = snapshot(7, {"model": {"w": live}}, {"step": 7})
    live += 1
    path = write(tmp_path, taken, keep=1, best=False)
    assert path.name == "step_00000007"
    assert_same(load(path).parts["model"]["w"], torch.zeros(1000))


def test_a_writer_writes_in_order_and_reports_in_the_thread_that_asks(tmp_path: Path) -> None:
    done: list[tuple[str, bool, int]] = []
    writer = Writer(tmp_path, 2, lambda path, best: done.append((path.name, best, threading.get_ident())))
    for step in (1, 2, 3):
        writer.begin(snapshot(step, PARTS, {"step": step}), best=step == 2)
    writer.wait()
    here = threading.get_ident()
    assert done == [
        ("step_00000001", False, here),
        ("step_00000002", True, here),
        ("step_00000003", False, here),
    ]
    assert names(tmp_path) == ["best", "latest", "step_00000002", "step_00000003"]
    writer.wait()
    writer.check()
    assert len(done) == 3


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    real = checkpoint.sync_folder

    def slow(folder: Path) -> None:
        assert may_end.wait(30)
        real(folder)

    monkeypatch.setattr(checkpoint, "sync_folder", slow)
    done: list[Path] = []
    writer = Writer(tmp_path, 2, lambda path, best: done.append(path))
    writer.begin(snapshot(1, PARTS, {}), best=False)
    writer.check()
    assert done == []
    assert not (tmp_path / "latest").exists()
    may_end.set()
    writer.wait()
    assert done == [tmp_path / "step_00000001"]


def test_a_failure_to_write_is_told_at_the_next_look(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = Writer(tmp_path / "file" / "checkpoints", 2, lambda path, best: None)
    writer.begin(snapshot(1, PARTS, {}), best=False)
    with pytest.raises(StorageError, match="step_00000001: cannot be written"):
        writer.wait()
