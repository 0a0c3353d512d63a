"""Checkpoints: what comes back, what is noticed, and what a failure in the middle leaves."""

from __future__ import annotations

import ast
import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel

from disttrain import checkpoint
from disttrain.checkpoint import Writer, load, restore, snapshot, verify, write
from disttrain.errors import CheckpointError, StorageError

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


def test_size_counts_the_tensors() -> None:
    parts = {"model": {"a": torch.zeros(10), "b": [torch.zeros(3, dtype=torch.int64)]}, "other": {"x": 1}}
    assert checkpoint.size(parts) == 64


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
            reason = None if is_manifest else f"{path}: damaged"  # a wrong manifest may blame another file
            with pytest.raises(CheckpointError, match=reason):
                load(saved)
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
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="checkpoint format 2; this version reads format 1"):
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


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> Callable[[], int]:
    """Makes one call of a function fail, once; returns how to ask for the number of calls."""
    calls = 0
    original = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return lambda: calls


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a new step"])
@pytest.mark.parametrize(
    ("owner", "name", "least"),
    [
        (os, "fsync", 7),  # five files, the folder, its parent; the link
        (Path, "mkdir", 1),
        (Path, "open", 5),
        (Path, "rename", 1),
        (Path, "symlink_to", 1),
        (Path, "replace", 1),
    ],
)
def test_a_failure_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, owner: Any, name: str, least: int
) -> None:
    def prepare(folder: Path) -> Path:
        save_step(folder, 1, best=True)
        save_step(folder, 2, value=1.0)
        return folder

    def save_failing(folder: Path, number: int) -> int:
        with monkeypatch.context() as patch:
            calls = fail_at(patch, owner, name, number)
            save_step(folder, step, keep=1, value=2.0)
        return calls()

    total = save_failing(prepare(tmp_path / "sound"), 0)
    assert total >= least
    for number in range(1, total + 1):
        folder = prepare(tmp_path / str(number))
        with pytest.raises(
            (StorageError, CheckpointError), match=r"No space left|missing or damaged"
        ) as caught:
            save_failing(folder, number)
        assert f"step_{step:08d}" in str(caught.value)
        assert load(folder / "best").state == {"step": 1}
        assert load(folder / "latest").parts["ema"]["weight"][0].item() in {1.0, 2.0}
        for path in folder.glob("step_*"):
            load(path)
        assert not [path for path in folder.glob(".*") if path.is_dir() and not path.is_symlink()]
        save_step(folder, 4, value=3.0)  # and the run can go on
        assert load(folder / "latest").parts["ema"]["weight"][0].item() == 3.0


def test_bytes_that_change_on_their_way_to_the_disk_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    write = checkpoint._write

    def flipping(path: Path, data: bytes) -> dict[str, Any]:
        entry = write(path, data)
        if path.name == "model.safetensors":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return entry

    monkeypatch.setattr(checkpoint, "_write", flipping)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        save_step(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001"]


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
    average = AveragedModel(network())
    average.update_parameters(model)
    optimizer = SGD(model.parameters(), 0.1)
    path = save_run(tmp_path, model, optimizer, ema=average)
    other = AveragedModel(network())
    nn.init.zeros_(other.module[0].weight)
    restore(load(path), model, optimizer, other)
    assert torch.equal(other.module[0].weight, model[0].weight)  # type: ignore[index]
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


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    path = save_run(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match="has no ema; it was saved by a run without one"):
        restore(load(path), model, optimizer, AveragedModel(model))


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
    with pytest.raises(StorageError, match="step_00000001: the checkpoint cannot be written"):
        writer.wait()
