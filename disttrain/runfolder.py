"""The run folder: paths, the lock, and the files that tell a run's story.

Rank 0 alone writes here, but for each rank's own log and error file. JSON documents are replaced
atomically; JSONL files are appended line by line.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
import traceback
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain.errors import BusyError, DisttrainError, TrainingError
from disttrain.files import write_atomically

COMMAND = "DISTTRAIN_COMMAND"
"""Environment variable by which a launcher passes on the command line that the user typed."""

LOCKED_BY_LAUNCHER = "DISTTRAIN_RUN_LOCKED"
"""Environment variable by which a launcher that holds the lock tells its rank 0."""


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

    def log(self, rank: int) -> Path:
        """Returns the log file of a rank."""
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def launch_log(self, node_rank: int) -> Path:
        """Returns the file that takes what the processes of a node print on standard error."""
        return self.path / "logs" / f"launch_{node_rank:05d}.log"

    def error(self, rank: int) -> Path:
        """Returns the error file of a rank."""
        return self.path / "errors" / f"rank_{rank:05d}.json"

    def trace(self, rank: int) -> Path:
        """Returns the file with the ids of the samples that a rank trained on."""
        return self.path / "trace" / f"rank_{rank:05d}.jsonl"

    def create(self) -> None:
        """Makes the folder, or accepts one that is empty or holds a run, and takes its lock.

        Raises:
            BusyError: it holds something else, cannot be written, or another process runs in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            theirs = {"logs", "errors"}  # another node's launcher may have come first
            foreign = next((entry.name for entry in self.path.iterdir() if entry.name not in theirs), None)
            if foreign and not (self.path / ".lock").exists():
                raise BusyError(
                    f"{self.path}: is not a run folder (it holds {foreign}); choose another --run-dir"
                )
            self._take_lock()
            for name in ("logs", "errors", "checkpoints"):
                (self.path / name).mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise BusyError(f"{self.path}: is not a folder; choose another --run-dir") from None
        except OSError as error:
            raise BusyError(
                f"{self.path}: cannot be written: {error.strerror}; choose another --run-dir"
            ) from None

    def status(self) -> dict[str, Any]:
        """Returns the content of status.json, or an empty dict."""
        try:
            status: dict[str, Any] = json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return status

    def update_status(self, **changes: Any) -> None:
        """Changes some keys of status.json and its time."""
        status = self.status() | changes | {"updated_at": utc_now()}
        write_atomically(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the metrics and traces after a step, so that a resumed run leaves no duplicates."""
        for path in (self.metrics, *self.trace(0).parent.glob("rank_*.jsonl")):
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if len(kept) < len(lines):
                write_atomically(path, "".join(kept))

    def write_error(self, rank: int, error: BaseException) -> None:
        """Writes down the exception that ended a rank."""
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
        write_atomically(self.error(rank), json.dumps(document, indent=1) + "\n")

    def clear_errors(self, ranks: Iterable[int]) -> None:
        """Removes the errors that an earlier attempt has left of these ranks."""
        for rank in ranks:
            self.error(rank).unlink(missing_ok=True)

    def first_error(self, ranks: Iterable[int] | None = None, since: str = "") -> dict[str, Any] | None:
        """Returns the earliest error that a rank wrote down: the cause, not its victims.

        Args:
            ranks: whose; None means all.
            since: as `utc_now` has it; what is older is of an earlier attempt.
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
        """Tells whether the launcher that started this process has prepared the folder and holds its lock."""
        return os.environ.get(LOCKED_BY_LAUNCHER) == str(self.path.resolve())

    def _take_lock(self) -> None:
        if self.locked_by_launcher():
            return
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(lock, 4096).decode(errors="replace") or "another process"
            os.close(lock)
            raise BusyError(f"{self.path}: {holder} is running here; choose another --run-dir") from None
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())


def new_run_path(name: str) -> Path:
    """Returns a fresh path under runs/<name>/, named by the time and made unique by making it."""
    parent = Path("runs") / name
    base = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = parent / (base + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise BusyError(f"{path}: cannot be made: {error.strerror}; give --run-dir") from None
        return path
    raise BusyError(f"{parent}: a thousand runs began in this second")


class JsonLines:
    """Appends records to a JSONL file; each line is written whole and at once.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; a value that is not finite is written as null."""
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps(_without_nan(record), allow_nan=False)
        self._file.write(line + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def utc_now() -> str:
    """Returns the time in UTC, ISO 8601 with microseconds: 2026-11-21T00:45:12.123456Z."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="microseconds")[:-6] + "Z"
