"""Copies of the checkpoints of a run in a folder and in an object store."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from disttrain.errors import CheckpointError, StoppedError, StorageError, UsageError
from disttrain.runs import mirror as module
from disttrain.runs.manifest import latest_valid
from disttrain.runs.mirror import Mirror
from disttrain.runs.runfolder import RunFolder
from kit.checkpoints import names, save_step
from kit.commands import wait_for
from kit.s3 import S3


@pytest.fixture(autouse=True)
def _no_line_of_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOON_S", 30)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "mirror")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An object store with an empty bucket."""
    server = S3()
    server.put("bucket")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # it would go on with the environment of another test
    yield server
    server.close()


class Run:
    """A run folder with a mirror."""

    def __init__(self, path: Path, address: str) -> None:
        self.checkpoints = path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.mirror = Mirror(address, "demo", RunFolder(path), keep=2)
        self.said: list[str] = []

    def copy(self, *steps: int, best: int | None = None) -> "Run":
        """Begins, saves some checkpoints, and copies what is left of them."""
        self.notes = self.mirror.begin(resume=True)
        for step in steps:
            save_step(self.checkpoints, step, best=step == best)
        self.go_on()
        return self

    def go_on(self) -> None:
        with self.mirror.copying(self.said.append, 20):
            self.mirror.wake()

    def there(self) -> list[str]:
        self.mirror._system.invalidate_cache()
        return sorted(Path(path).name for path in self.mirror._system.ls(self.mirror._root, detail=False))

    def put(self, name: str, content: bytes) -> None:
        self.mirror._system.pipe_file(f"{self.mirror._root}/{name}", content)


@pytest.mark.integration
def test_a_fresh_node_goes_on_from_an_object_store(bucket: S3, tmp_path: Path) -> None:
    address = "s3://bucket/mirrors"
    first = Run(tmp_path / "a/run", address).copy(10, 20, 30, 40, best=10)
    assert first.notes == first.said == []
    assert first.there() == ["run.json", "step_00000010", "step_00000030", "step_00000040"]
    second = Run(tmp_path / "b/run", address)
    notes = second.mirror.begin(resume=True)
    assert [note.rpartition(": ")[2] for note in notes] == ["fetched step_00000040", "fetched step_00000010"]
    assert names(second.checkpoints) == ["best", "latest", "step_00000010", "step_00000040"]
    assert latest_valid(second.checkpoints)[0] == second.checkpoints / "step_00000040"
    assert (second.checkpoints / "best").readlink() == Path("step_00000010")
    save_step(second.checkpoints, 50)
    second.go_on()
    assert second.there() == ["run.json", "step_00000010", "step_00000040", "step_00000050"]
    bucket.server.stop()
    third = Run(tmp_path / "c/run", address)
    (note,) = third.mirror.begin(resume=True)
    assert note.startswith("checkpoint.mirror: s3://bucket/mirrors/demo/run: Could not connect")
    assert note.endswith("; the run begins without it")


def test_a_process_that_was_taken_for_dead_writes_no_more(address: str, tmp_path: Path) -> None:
    first = Run(tmp_path / "a/run", address)
    first.mirror.begin(resume=True)
    with first.mirror.copying(first.said.append, 20):
        save_step(first.checkpoints, 10)
        first.mirror.wake()
        wait_for(lambda: (tmp_path / "mirror/demo/run/step_00000010/MANIFEST.json").exists())
        second = Run(tmp_path / "b/run", address).copy(20)
        save_step(first.checkpoints, 30)
        first.mirror.wake()
    assert "is now written by" in first.said[0]
    assert second.there() == ["run.json", "step_00000010", "step_00000020"]


def test_another_run_of_the_same_name_is_refused(address: str, tmp_path: Path) -> None:
    Run(tmp_path / "a/run", address).copy(10)
    other = Run(tmp_path / "b/run", address)
    save_step(other.checkpoints, 5)
    with pytest.raises(UsageError, match=r"has the checkpoints of another run, .*/a/run; choose another"):
        other.mirror.begin(resume=True)
    scratch = Run(tmp_path / "c/run", address)
    with pytest.raises(UsageError, match="another run"):
        scratch.mirror.begin(resume=False)
    assert Run(tmp_path / "b/elsewhere", address).mirror.begin(resume=True) == []


def test_half_and_damaged_copies_are_not_taken_for_whole(address: str, tmp_path: Path) -> None:
    first = Run(tmp_path / "a/run", address).copy(10, 20)
    first.put("step_00000030/model.safetensors", b"the copy ended here")
    first.put("step_00000020/model.safetensors", b"half an obj")
    second = Run(tmp_path / "b/run", address)
    notes = second.mirror.begin(resume=True)
    assert "step_00000030 is not whole: it has no manifest" in notes[0]
    assert "model.safetensors: damaged" in notes[1]
    assert names(second.checkpoints) == ["latest", "step_00000010"]
    first.put("step_00000010/state.json", b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole; choose another --run-dir"):
        Run(tmp_path / "c/run", address).mirror.begin(resume=True)


def test_a_checkpoint_that_was_saved_again_replaces_its_copy(address: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "a/run", address).copy(10)
    save_step(run.checkpoints, 10, value=1.0)
    run.mirror._copy()
    second = Run(tmp_path / "b/run", address)
    second.mirror.begin(resume=True)
    parts = [path / "step_00000010/ema.safetensors" for path in (run.checkpoints, second.checkpoints)]
    assert parts[0].read_bytes() == parts[1].read_bytes()


class Broken:
    """A file system that refuses some operations."""

    def __init__(self, system: Any, *broken: str) -> None:
        self.system = system
        self.broken = set(broken)

    def __getattr__(self, name: str) -> Any:
        if name in self.broken:
            raise OSError(f"no {name}")
        return getattr(self.system, name)


def test_a_mirror_that_is_gone_is_said_once_and_catches_up(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)
    run = Run(tmp_path / "run", address)
    broken = Broken(run.mirror._system, "put_file")
    run.mirror._system = broken
    run.mirror.begin(resume=True)
    with run.mirror.copying(run.said.append, 20):
        for step in (10, 20, 30):
            save_step(run.checkpoints, step)
            run.mirror.wake()
        wait_for(lambda: run.said)
        assert run.said[0].endswith("no put_file; training goes on, and copying is tried again")
        assert run.there() == ["run.json"]
        broken.broken.clear()
        wait_for(lambda: len(run.said) > 1)
    assert [line.rpartition(": ")[2] for line in run.said[1:]] == ["works again"]
    assert run.there() == ["run.json", "step_00000020", "step_00000030"]


def test_a_mirror_that_is_too_slow_keeps_what_it_has(address: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", address).copy(10)
    save_step(run.checkpoints, 20)
    (run.checkpoints / "step_00000020/state.json").unlink()  # as if deleted during the copy
    run.mirror._thread = threading.Thread(target=run.mirror._run)
    run.mirror.wake()
    run.go_on()
    assert "too slow: step_00000020 was deleted before its copy was complete" in run.said[0]
    assert run.said[1].endswith("not complete; the run folder has every checkpoint")
    second = Run(tmp_path / "b/run", address)
    assert any("fetched step_00000010" in note for note in second.mirror.begin(resume=True))


def test_a_mirror_that_is_gone_at_the_start(address: str, tmp_path: Path) -> None:
    before = Run(tmp_path / "a/run", address).copy(10)
    run = Run(tmp_path / "b/run", address)
    broken = Broken(run.mirror._system, "get_file")
    run.mirror._system = broken
    with pytest.raises(StorageError, match="no get_file; start again when it answers"):
        run.mirror.begin(resume=True)
    run = Run(tmp_path / "c/run", address)
    broken = Broken(run.mirror._system, "cat_file")
    run.mirror._system = broken
    (note,) = run.mirror.begin(resume=True)
    assert note.endswith("no cat_file; the run begins without it")
    broken.broken.clear()
    save_step(run.checkpoints, 5)
    run.go_on()
    assert "has the checkpoints of another run" in run.said[0], "what is there is left alone"
    assert before.there() == ["run.json", "step_00000010"]


def test_the_end_waits_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOON_S", 0.01)
    stuck = threading.Event()
    run = Run(tmp_path / "run", str(tmp_path / "mirror"))
    run.mirror.begin(resume=True)
    monkeypatch.setattr(run.mirror, "_upload", lambda path: stuck.wait())
    save_step(run.checkpoints, 10)
    with contextlib.suppress(StoppedError), run.mirror.copying(run.said.append, 0.05):
        run.mirror.wake()
        raise StoppedError("stopped")
    assert [line.rpartition(": ")[2] for line in run.said] == [
        "copying the last checkpoint, for at most 0.05 s",
        "not complete; the run folder has every checkpoint",
    ]
    stuck.set()
    run.mirror._thread.join()


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for address in ("hf://datasets/me/x", "https://host/x", "s3://", "s3://key:secret@bucket/x"):
        with pytest.raises(UsageError) as caught:
            Run(tmp_path / "run", address)
        assert "secret" not in str(caught.value)


def test_the_names_in_a_manifest_stay_in_their_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "a/run", str(tmp_path / "mirror")).copy(10)
    manifest = tmp_path / "mirror/demo/run/step_00000010/MANIFEST.json"
    document = json.loads(manifest.read_text())
    document["parts"]["../../x.json"] = document["parts"].pop("state.json")
    manifest.write_text(json.dumps(document))
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        Run(tmp_path / "a/run", str(tmp_path / "mirror")).mirror.begin(resume=True)
