"""Checkpoints: what comes back, what is noticed, and what a failure in the middle leaves."""

from __future__ import annotations

import errno
import json
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

from disttrain import files
from disttrain.errors import CheckpointError, StorageError
from disttrain.runs import checkpoint, manifest
from disttrain.runs.checkpoint import Writer, load, snapshot, write
from disttrain.runs.manifest import latest_valid, pointed_to, verify_checkpoint, write_manifest
from kit.checkpoints import PARTS, assert_same, names, save_step

# --- Damage ---------------------------------------------------------------------------------------


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
                verify_checkpoint(saved)
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
            verify_checkpoint(saved)
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
        verify_checkpoint(saved)


def test_a_part_that_the_manifest_leaves_out(saved: Path) -> None:
    parts = json.loads((saved / "MANIFEST.json").read_text())["parts"]
    for name in parts:
        (saved / "MANIFEST.json").unlink()
        write_manifest(saved, {other: entry for other, entry in parts.items() if other != name})
        verify_checkpoint(saved)
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            load(saved)


# --- Links and rotation ---------------------------------------------------------------------------


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


def test_copies_in_the_place_of_links_give_way_to_links(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path / "run", step, best=step == 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows links, as cp -L does
    latest, best = tmp_path / "copy/latest", tmp_path / "copy/best"
    assert latest.is_dir()
    assert not latest.is_symlink()
    assert (pointed_to(latest).name, pointed_to(best).name) == ("step_00000002", "step_00000001")
    save_step(tmp_path / "copy", 3, best=True)
    assert names(tmp_path / "copy") == ["best", "latest", "step_00000002", "step_00000003"]
    assert latest.readlink() == best.readlink() == Path("step_00000003")


def test_a_copy_that_is_the_only_one_is_kept(tmp_path: Path) -> None:
    save_step(tmp_path / "run", 1, best=True)
    (tmp_path / "run/best").unlink()
    (tmp_path / "run/step_00000001").rename(tmp_path / "run/best")
    save_step(tmp_path / "run", 2, best=True)
    assert names(tmp_path / "run") == ["best", "copied_best", "latest", "step_00000002"]
    verify_checkpoint(tmp_path / "run/copied_best")


def test_text_files_point_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, best=step == 1)
    assert names(tmp_path) == ["best", "latest", "step_00000001", "step_00000003", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert pointed_to(tmp_path / "best") == tmp_path / "step_00000001"
    shutil.rmtree(tmp_path / "step_00000004")
    shutil.rmtree(tmp_path / "step_00000003")
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match=r"latest: leads to step_00000004, which is missing"):
        latest_valid(tmp_path)


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


# --- Failures while saving ------------------------------------------------------------------------


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


# --- Beside the training --------------------------------------------------------------------------


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
