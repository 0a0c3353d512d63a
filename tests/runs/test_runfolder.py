"""The run folder: its lock, its documents and its lines."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from disttrain.errors import BusyError, DataError, StorageError
from disttrain.files import write_atomically
from disttrain.runs.jsonl import encoded
from disttrain.runs.runfolder import (
    LOCKED_BY_LAUNCHER,
    RunFolder,
    new_run_path,
    utc_now,
)

_HOLDER = """
import sys
from pathlib import Path
from disttrain.runs.runfolder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.create()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(path):
    """Another process that holds the lock of a run folder."""
    command = [sys.executable, "-c", _HOLDER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def error_at(time, rank, folder):
    folder.write_error(rank, ValueError(f"of rank {rank}"))
    document = json.loads(folder.error(rank).read_text()) | {"time": time}
    folder.error(rank).write_text(json.dumps(document))


MADE = [".lock", ".reserve", "checkpoints", "errors", "logs"]


# --- Making and locking -----------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.create()
    assert sorted(entry.name for entry in folder.path.iterdir()) == MADE


def test_an_empty_folder_is_taken(folder):
    folder.path.mkdir()
    folder.create()
    assert sorted(entry.name for entry in folder.path.iterdir()) == MADE


def test_the_folder_of_an_earlier_run_is_taken_as_it_is(folder):
    with holder(folder.path):
        folder.metrics.write_text("kept\n")
    folder.create()
    assert folder.metrics.read_text() == "kept\n"


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BusyError) as caught:
        RunFolder(tmp_path).create()
    assert str(caught.value) == (
        f"{tmp_path}: is not a run folder (it holds thesis.tex); choose another --run-dir"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_other_launchers_made_may_be_there_first(folder):
    folder.launch_log(1).parent.mkdir(parents=True)
    folder.launch_log(1).write_text("from node 1")
    folder.secret.write_text("left by a launcher that was killed")
    folder.create()
    assert folder.launch_log(1).read_text() == "from node 1"
    assert folder.checkpoints.is_dir()


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_in_the_way(tmp_path, inside):
    file = tmp_path / "file"
    file.touch()
    path = file / inside
    with pytest.raises(BusyError) as caught:
        RunFolder(path).create()
    assert str(caught.value) == f"{path}: is not a folder; choose another --run-dir"


def test_a_folder_that_cannot_be_written():
    with pytest.raises(BusyError, match=r"^/proc/run: cannot be written: .*; choose another --run-dir$"):
        RunFolder(Path("/proc/run")).create()


def test_a_second_process_is_told_who_runs_here(folder):
    with holder(folder.path) as process:
        with pytest.raises(BusyError) as caught:
            folder.create()
        assert str(caught.value) == (
            f"{folder.path}: process {process.pid} on {socket.gethostname()} is running here; "
            "choose another --run-dir"
        )
    folder.create()


def test_the_lock_is_free_once_its_holder_was_killed(folder):
    with holder(folder.path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        (folder.path / ".lock").write_text("a holder with a longer name " * 10)
        folder.create()
        now = json.loads((folder.path / ".lock").read_text())
        assert (now["pid"], now["host"]) == (os.getpid(), socket.gethostname())


def test_a_silent_run_has_died_if_its_process_has_or_after_long(folder):
    ages = (1.0, 60.0, 601.0, math.nan)

    def died():
        return [folder.has_died(silent_s) for silent_s in ages]

    assert died() == [False, False, True, False]
    with holder(folder.path) as process:
        assert died() == [False, False, False, False]
        process.kill()
        process.wait()
        assert died() == [False, True, True, True]
    (folder.path / ".lock").write_text(json.dumps({"host": "another", "pid": process.pid, "start": 1}))
    assert died() == [False, False, True, False]


def test_a_worker_enters_the_folder_that_its_launcher_has_locked(folder, monkeypatch):
    with holder(folder.path):
        monkeypatch.setenv(LOCKED_BY_LAUNCHER, str(folder.path.resolve()))
        assert folder.locked_by_launcher()
        folder.create()
        assert not RunFolder(folder.path.parent / "other").locked_by_launcher()


_WITHOUT_LOCKS = """
import errno, fcntl, os, socket
def flock(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def without_locks(request, monkeypatch):
    """A file system without locks, in this process and in the `holder`."""

    def flock(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(sys.modules[__name__], "_HOLDER", _WITHOUT_LOCKS + _HOLDER)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_holder_is_named_and_a_dead_one_replaced(folder):
    with holder(folder.path) as process:
        with pytest.raises(
            BusyError, match=f"process {process.pid} on {socket.gethostname()} is running here"
        ):
            folder.create()
        process.send_signal(signal.SIGKILL)
        process.wait()
        RunFolder(folder.path).create()
        assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    with pytest.raises(BusyError, match=f"process {os.getpid()} on "):
        RunFolder(folder.path).create()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_holder_that_ends_gives_the_lock_back(folder):
    with holder(folder.path) as process:
        process.communicate("", timeout=60)
    assert (folder.path / ".lock").read_text() == ""


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("field", ["start", "host"])
def test_without_locks_the_number_of_a_process_alone_says_nothing(folder, field):
    with holder(folder.path):
        lock = folder.path / ".lock"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {field: 1}))
        if field == "start":  # another process that has the same number
            folder.create()
        else:
            with pytest.raises(BusyError, match=r"on 1 is running here \(cannot check .* remove .*/\.lock\)"):
                folder.create()


def test_a_folder_of_somebody_else(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (tmp_path / "run").mkdir(mode=0o700)
    program = (
        "import os, sys; from pathlib import Path\n"
        "from disttrain.errors import BusyError; from disttrain.runs.runfolder import RunFolder\n"
        "os.chdir(sys.argv[1]); os.seteuid(65534)\n"
        "for attempt in (RunFolder(Path('run')).is_run, RunFolder(Path('run')).create):\n"
        "    try: attempt()\n"
        "    except BusyError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "run: cannot be written: Permission denied; choose another --run-dir\n" * 2, (
        done.stderr
    )


def read_only(path):
    """Binds a folder to itself, read-only; returns how to undo that."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    if subprocess.run(["mount", "--bind", path, path], capture_output=True).returncode:
        pytest.skip("needs a system that lets root mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)
    return lambda: subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("inside", ["", "logs", "checkpoints", "errors"])
def test_no_run_begins_where_a_folder_is_read_only(folder, inside):
    with holder(folder.path):
        pass
    unmount = read_only(folder.path / inside)
    try:
        with pytest.raises(BusyError) as caught:
            folder.create()
        path = folder.path / inside
        assert str(caught.value) == (
            f"{path}: cannot be written: Read-only file system; choose another --run-dir"
        )
    finally:
        unmount()
    folder.create()


# --- Documents --------------------------------------------------------------------------------------


def test_the_status_keeps_what_is_not_changed(folder):
    folder.create()
    assert folder.status() == {}
    folder.update_status(state="running", step=1)
    folder.update_status(step=2)
    status = folder.status()
    assert (status["state"], status["step"]) == ("running", 2)
    assert datetime.fromisoformat(status["updated_at"]) <= datetime.now(UTC)


def test_a_torn_status_reads_as_none(folder):
    folder.create()
    (folder.path / "status.json").write_text('{"state": "runn')
    assert folder.status() == {}


def test_a_reader_never_sees_half_a_status(folder):
    folder.create()
    folder.update_status(text="0" * 100_000)
    done = threading.Event()

    def write():
        for i in range(200):
            folder.update_status(text=str(i % 10) * 100_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        text = folder.status()["text"]  # {} for a torn file
        assert len(text) == 100_000
        seen.add(text[0])
    writer.join()
    assert len(seen) > 1


def full_disk(monkeypatch, times):
    """Lets this many calls of os.write fail."""
    real = os.write

    def write(descriptor, data):
        nonlocal times
        times -= 1
        if times >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    full_disk(monkeypatch, 1)
    with pytest.raises(StorageError) as caught:
        write_atomically(path, "new")
    assert caught.value.exit_code == 74
    assert re.fullmatch(
        rf"{path}: cannot be written: No space left on device \(3 bytes needed, [0-9,]+ bytes free\); "
        "free some space, then try again",
        str(caught.value),
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_how_a_run_ended_is_written_down_on_a_full_disk(folder, monkeypatch):
    folder.create()
    reserve = folder.path / ".reserve"
    assert reserve.stat().st_blocks * 512 >= 2**16, "really taken"
    full_disk(monkeypatch, 1)
    folder.write_error(0, StorageError("full"))
    assert not reserve.exists()
    assert folder.first_error()["message"] == "full"
    full_disk(monkeypatch, 2)
    with pytest.raises(StorageError):
        folder.update_status(state="failed")
    monkeypatch.undo()
    folder.create()
    assert reserve.exists(), "there for the next attempt"


def test_what_was_forced_is_kept(folder):
    folder.create()
    folder.record_forced(10, ["optim.lr: 0.1 -> 0.2"])
    folder.update_status(state="running")
    folder.record_forced(20, ["seed: 0 -> 1"])
    assert [(entry["step"], entry["changes"]) for entry in folder.status()["forced"]] == [
        (10, ["optim.lr: 0.1 -> 0.2"]),
        (20, ["seed: 0 -> 1"]),
    ]


def test_the_first_error_is_the_earliest_not_that_of_the_lowest_rank(folder):
    folder.create()
    assert folder.first_error() is None
    error_at("2026-11-21T00:00:02.000000Z", 0, folder)
    error_at("2026-11-21T00:00:01.900000Z", 1, folder)
    error_at("2026-11-21T00:00:10.000000Z", 2, folder)
    folder.error(3).write_text('{"rank": 3')  # being written
    first = folder.first_error()
    assert first is not None
    assert (first["rank"], first["message"]) == (1, "of rank 1")
    for options, rank in (({"since": "2026-11-21T00:00:02.000000Z"}, 0), ({"ranks": [2, 3]}, 2)):
        found = folder.first_error(**options)
        assert found is not None
        assert found["rank"] == rank
    folder.clear_errors([1, 3])
    assert folder.first_error([1, 3]) is None
    assert folder.first_error() is not None
    folder.clear_errors(range(4))
    assert folder.first_error() is None


def test_an_error_of_ours_carries_its_traceback(folder):
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        folder.write_error(2, error)
    document = json.loads(folder.error(2).read_text())
    assert (document["rank"], document["host"], document["exit_code"]) == (2, socket.gethostname(), 70)
    assert (document["type"], document["message"]) == ("ZeroDivisionError", "division by zero")
    assert "test_an_error_of_ours" in document["traceback"]


def test_an_error_of_the_user_has_its_exit_code_and_no_traceback(folder):
    folder.write_error(0, DataError("no such data"))
    document = json.loads(folder.error(0).read_text())
    assert (document["exit_code"], document["message"], document["traceback"]) == (65, "no such data", None)


def test_times_are_utc_and_sort_as_text():
    times = [utc_now() for _ in range(100)]
    assert times == sorted(times)
    assert {len(time) for time in times} == {len("2026-11-21T00:45:12.123456Z")}
    age = datetime.now(UTC) - datetime.fromisoformat(times[0])
    assert 0 <= age.total_seconds() < 60


# --- Lines ------------------------------------------------------------------------------------------


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(encoded, records)))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(folder):
    folder.create()
    write_lines(folder.metrics, [{"step": 10}, {"step": 20}, {"step": 30}])
    write_lines(folder.trace(0), [{"step": 20, "ids": [1]}, {"step": 21, "ids": [2]}])
    write_lines(folder.trace(3), [{"step": 21, "ids": [3]}])
    folder.forget_after(20, 1)
    assert read_lines(folder.metrics) == [{"step": 10}, {"step": 20}]
    assert read_lines(folder.trace(0)) == [{"step": 20, "ids": [1]}]
    assert read_lines(folder.trace(3)) == []


@pytest.mark.parametrize(("epoch", "stays"), [(2, True), (1, False)])
def test_an_evaluation_stays_if_its_epoch_is_complete_in_the_checkpoint(folder, epoch, stays):
    folder.create()
    train, evaluation = {"kind": "train", "step": 20, "epoch": 2}, {"kind": "eval", "step": 20, "epoch": 2}
    write_lines(folder.metrics, [{"kind": "eval", "step": 10, "epoch": 1}, train, evaluation])
    folder.forget_after(20, epoch)
    assert read_lines(folder.metrics)[1:] == [train, evaluation][: 1 + stays]


def test_what_is_no_record_is_forgotten(folder):
    folder.create()
    folder.metrics.write_bytes(b'{"step": 10}\n' + bytes(100) + b'\n[]\n"text"\n{"loss": 1}\n{"step": 11}\n')
    folder.forget_after(99, 9)
    assert read_lines(folder.metrics) == [{"step": 10}, {"step": 11}]


def test_a_line_that_was_torn_by_a_crash_is_forgotten(folder):
    folder.create()
    folder.metrics.write_text('{"step": 10}\n{"step": 1')
    folder.forget_after(99, 9)
    assert folder.metrics.read_text() == '{"step": 10}\n'


def test_there_may_be_nothing_to_forget(folder):
    folder.create()
    folder.forget_after(0, 0)
    assert not folder.metrics.exists()


# --- New paths --------------------------------------------------------------------------------------


def test_runs_that_begin_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: new_run_path("tiny"), range(40)))
    assert len(set(paths)) == 40
    assert all(path.is_dir() and path.parent == Path("runs/tiny") for path in paths)
    for path in paths:
        stamp = datetime.strptime(path.name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        assert abs((datetime.now(UTC) - stamp).total_seconds()) < 120


def test_no_path_where_a_file_is_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with pytest.raises(BusyError, match=r"^runs/tiny/.*: cannot be made: .*; give --run-dir$"):
        new_run_path("tiny")
