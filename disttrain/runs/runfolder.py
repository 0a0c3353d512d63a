"""The run folder: paths, lock, status and errors.

Only rank 0 writes here, except for the log and error file of each rank. JSON documents are replaced
atomically; JSONL files are appended line by line.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain.errors import BusyError, DisttrainError, StorageError, TrainingError
from disttrain.files import storage_error, write_atomically, write_new

COMMAND = "DISTTRAIN_COMMAND"
"""Environment variable with the user's command line, set by the launcher."""

CONFIG = "DISTTRAIN_CONFIG"
"""Environment variable with the config as YAML, set by the launcher, which reads the file once."""

LOCKED_BY_LAUNCHER = "DISTTRAIN_RUN_LOCKED"
"""Environment variable with the run folder whose lock the launcher holds, for its rank 0."""

CLEAN = dict.fromkeys(("exit_code", "reason", "rank", "host"))
"""The keys of status.json about the end of a run, before it has ended."""

ALL_EPOCHS, STOPPED_EARLY = "all epochs done", "stopped early"
"""The reasons in status.json why a run has finished; after the second, more is said."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of flock on file systems without locks, such as some mounts of Lustre and NFS."""

_FRESH_S, _SILENT_S = 10.0, 600.0  # status.json is written every second, except in long evaluations and saves
_FULL = {errno.ENOSPC, errno.EDQUOT}
_RESERVE_BYTES = 2**16


class RunFolder:
    """The folder of one run.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.env = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.gpu = path / "gpu.jsonl"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self.secret = path / ".secret"  # exists while the launchers of several nodes connect
        self._lock = path / ".lock"
        self._locked = False
        self._reserve = path / ".reserve"  # freed to write the final status on a full disk

    def log(self, rank: int) -> Path:
        """Returns the log file of a rank."""
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def launch_log(self, node_rank: int) -> Path:
        """Returns the file for the standard error of the processes of a node."""
        return self.path / "logs" / f"launch_{node_rank:05d}.log"

    def error(self, rank: int) -> Path:
        """Returns the error file of a rank."""
        return self.path / "errors" / f"rank_{rank:05d}.json"

    def bad_batch(self, step: int) -> Path:
        """Returns the file with the samples of a global batch whose loss was not finite."""
        return self.path / "errors" / f"batch_{step:08d}.json"

    def trace(self, rank: int) -> Path:
        """Returns the file with the ids of the samples that a rank trained on."""
        return self.path / "trace" / f"rank_{rank:05d}.jsonl"

    def is_run(self) -> bool:
        """Returns whether a run has started here before.

        Raises:
            BusyError: the folder cannot be accessed.
        """
        try:
            return self._lock.exists()
        except OSError as error:
            raise self._not_writable(self.path, error) from None

    def create(self) -> None:
        """Creates the folder, or accepts an empty one or one with a run, and takes its lock.

        Raises:
            BusyError: it holds something else, cannot be written, or another process runs in it.
            StorageError: the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Another node's launcher may have come first, or have been killed.
            theirs = {"logs", "errors", self.secret.name}
            foreign = next((entry.name for entry in self.path.iterdir() if entry.name not in theirs), None)
            if foreign and not self.is_run():
                raise BusyError(
                    f"{self.path}: is not a run folder (it holds {foreign}); choose another --run-dir"
                )
            if not (self._locked or self.locked_by_launcher()):
                self._take_lock()
                self._locked = True
            self.check_writable("", "logs", "errors", "checkpoints")
            if not self._reserve.exists():
                write_new(self._reserve, os.urandom(_RESERVE_BYTES))  # random: it cannot be compressed
        except (FileExistsError, NotADirectoryError):
            raise BusyError(f"{self.path}: is not a folder; choose another --run-dir") from None
        except OSError as error:
            raise self._not_writable(self.path, error) from None

    def check_writable(self, *names: str) -> None:
        """Creates missing subfolders, and checks that a file can be written in each.

        Raises:
            BusyError: one cannot be written.
            StorageError: the disk is full.
        """
        for path in map(self.path.joinpath, names):
            try:
                path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path) as file:
                    file.write(b"x")
            except OSError as error:
                raise self._not_writable(path, error) from None

    @staticmethod
    def _not_writable(path: Path, error: OSError) -> DisttrainError:
        if error.errno in _FULL:
            return storage_error(path, error)
        return BusyError(f"{path}: cannot be written: {error.strerror}; choose another --run-dir")

    def status(self) -> dict[str, Any]:
        """Returns the content of status.json, or an empty dict."""
        try:
            status: dict[str, Any] = json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return status

    def update_status(self, **changes: Any) -> None:
        """Changes some keys of status.json and its time.

        Raises:
            StorageError: it cannot be written.
        """
        path, text = self.path / "status.json", self.status() | changes | {"updated_at": utc_now()}
        if "state" in changes:
            self._write(path, text)
        else:  # progress, updated every second: not worth waiting for the disk
            write_atomically(path, _text(text), durable=False)

    def has_died(self, silent_s: float) -> bool:
        """Returns whether a run that says it is running was most likely killed.

        On the host of the run, the process that holds the lock is looked up. Elsewhere, silence decides.

        Args:
            silent_s: seconds since the last update of status.json; NaN if unknown.
        """
        if silent_s < _FRESH_S:
            return False
        holder = self._holder()
        if holder is not None and holder["host"] == socket.gethostname():
            return bool(_start_of(holder["pid"]) != holder["start"])
        return silent_s > _SILENT_S

    def record_forced(self, step: int, changes: Sequence[str]) -> None:
        """Adds the changes allowed by `--force` to status.json, as lines `key: old -> new`."""
        forced = [*self.status().get("forced", []), {"time": utc_now(), "step": step, "changes": changes}]
        self.update_status(forced=forced)

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        """Replaces a JSON document. On a full disk, frees the reserve to make room."""
        text = _text(document)
        try:
            write_atomically(path, text)
        except StorageError:
            self._reserve.unlink(missing_ok=True)
            write_atomically(path, text)

    def forget_after(self, step: int, epoch: int) -> None:
        """Drops the metrics and traces after a checkpoint, so that a resumed run leaves no duplicates.

        Records of the checkpoint's own step were written before it and stay, except an evaluation that the
        resumed run repeats: one of an epoch that the checkpoint does not count as completed.

        Args:
            step: optimizer steps taken at the checkpoint.
            epoch: epochs completed at the checkpoint, with their evaluation.

        Raises:
            StorageError: a file cannot be written.
        """

        def belongs(line: str) -> bool:
            try:
                record = json.loads(line)
                if record["step"] == step and record.get("kind") == "eval":
                    return bool(record["epoch"] <= epoch)
                return bool(record["step"] <= step)
            except (ValueError, KeyError, TypeError):  # torn, or zeros after a loss of power
                return False

        for path in (self.metrics, *self.trace(0).parent.glob("rank_*.jsonl")):
            text = path.read_text(errors="replace") if path.exists() else ""
            lines = text.splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and belongs(line)]
            if len(kept) < len(lines):
                write_atomically(path, "".join(kept))

    def write_error(self, rank: int, error: BaseException) -> None:
        """Writes the exception that ended a rank to its error file."""
        exit_code = error.exit_code if isinstance(error, DisttrainError) else TrainingError.exit_code
        document = {
            "rank": rank,
            "host": socket.gethostname(),
            "time": utc_now(),
            "exit_code": exit_code,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": None
            if isinstance(error, DisttrainError)
            else "".join(traceback.format_exception(error)),
        }
        self.error(rank).parent.mkdir(parents=True, exist_ok=True)
        self._write(self.error(rank), document)

    def clear_errors(self, ranks: Iterable[int]) -> None:
        """Removes the errors of these ranks from an earlier attempt."""
        for rank in ranks:
            self.error(rank).unlink(missing_ok=True)

    def first_error(self, ranks: Iterable[int] | None = None, since: str = "") -> dict[str, Any] | None:
        """Returns the earliest error of the given ranks, or of all: it is the cause of the later ones.

        Errors before `since`, a time from `utc_now`, belong to an earlier attempt and are ignored.
        """
        errors = []
        for path in self.error(0).parent.glob("rank_*.json") if ranks is None else map(self.error, ranks):
            try:
                errors.append(json.loads(path.read_bytes()))
            except (OSError, ValueError):
                continue
        errors = [error for error in errors if str(error["time"]) >= since]
        return min(errors, key=lambda error: str(error["time"]), default=None)

    def locked_by_launcher(self) -> bool:
        """Returns whether the launcher of this process has prepared the folder and holds its lock."""
        return os.environ.get(LOCKED_BY_LAUNCHER) == str(self.path.resolve())

    def _take_lock(self) -> None:
        # Not filelock: the error names the host and process of the holder, even without flock.
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in _NO_LOCKS:
                raise self._taken(self._holder()) from None
            self._take_lock_by_name()
            return
        os.ftruncate(lock, 0)  # the lock is held until the process ends
        os.write(lock, json.dumps(_this_process()).encode())

    def _take_lock_by_name(self) -> None:
        """Takes the lock without flock: .lock is valid while the process that it names lives."""
        holder = self._holder()
        if holder is not None:
            if holder["host"] != socket.gethostname():
                raise self._taken(
                    holder, f" (cannot check from this host; if it has ended, remove {self._lock})"
                )
            if _start_of(holder["pid"]) == holder["start"]:
                raise self._taken(holder)
        own = json.dumps(_this_process())
        write_atomically(self._lock, own)
        if self._holder() != _this_process():  # another process overwrote it a moment later
            raise self._taken(self._holder())

        def give_back() -> None:
            if self._holder() == _this_process():  # not in a child
                self._lock.write_text("")

        atexit.register(give_back)

    def _holder(self) -> dict[str, Any] | None:
        """Returns host, pid and start of the process that .lock names, or None."""
        try:
            holder = json.loads(self._lock.read_text())
            return {key: holder[key] for key in ("host", "pid", "start")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _taken(self, holder: Mapping[str, Any] | None, more: str = "") -> BusyError:
        who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
        return BusyError(f"{self.path}: {who} is running here{more}; choose another --run-dir")


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> int | None:
    """Returns the start of a process in clock ticks since boot, or None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19])  # field 22 of proc(5), starttime; the first two are cut off


def new_run_path(name: str, prefix: str = "") -> Path:
    """Creates and returns a new folder under runs/<name>/, named by the prefix and the time in UTC."""
    parent = Path("runs") / name
    base = prefix + datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = parent / (base + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise BusyError(f"{path}: cannot be made: {error.strerror}; give --run-dir") from None
        return path
    raise BusyError(f"{parent}: a thousand runs started in this second; give --run-dir")


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def utc_now() -> str:
    """Returns the time in UTC, ISO 8601 with microseconds: 2026-11-21T00:45:12.123456Z."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="microseconds")[:-6] + "Z"
