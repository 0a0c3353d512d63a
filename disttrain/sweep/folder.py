"""The folder of a sweep: its plan, a copy of its config, its runs, and a table of how they ended."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from disttrain.config import Config
from disttrain.errors import BusyError, DisttrainError, StoppedError, StorageError, UsageError, reason
from disttrain.files import file_lock, write_atomically
from disttrain.runs.eval_metrics import result_text
from disttrain.runs.records import read_metrics
from disttrain.runs.resume import is_finished
from disttrain.runs.runfolder import STOPPED_EARLY, RunFolder
from disttrain.sweep.plan import Plan, PlannedRun
from disttrain.urls import without_secrets

_ROOT = re.compile(r".*\broot:.*")
"""A line with `data.root`, which may have a login. Commands in `monitor.on_end` keep theirs."""


class Row(NamedTuple):
    """How a run of a sweep ended, or how far it is.

    Attributes:
        state: as in status.json, or `not started`.
        exit_code: None if unknown.
        epoch: epochs completed; None if unknown.
        accuracy: of the last evaluation, 0..1.
        best_accuracy: the highest, 0..1.
        outcome: in one line.
    """

    state: str
    exit_code: int | None
    epoch: int | None
    accuracy: float | None
    best_accuracy: float | None
    outcome: str


class SweepFolder:
    """The folder of one sweep.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "experiment.yaml"  # a copy, because the file may be edited meanwhile
        self.plan = path / "sweep.json"
        self.table = path / "runs.csv"
        self.report = path / "report.html"

    def is_sweep(self) -> bool:
        """Returns whether the folder has a sweep."""
        return self.plan.is_file()

    def run(self, name: str) -> RunFolder:
        """Returns the folder of a run."""
        return RunFolder(self.path / name)

    def log(self, name: str) -> Path:
        """Returns the file with what `disttrain run` prints."""
        return self.path / "logs" / f"{name}.log"

    def read(self) -> Plan:
        """Returns the plan.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            document = json.loads(self.plan.read_bytes())
            runs = [PlannedRun(**run | {"overrides": tuple(run["overrides"])}) for run in document["runs"]]
            return Plan(**document | {"runs": tuple(runs), "overrides": tuple(document["overrides"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.plan}: cannot be read: {reason(error)}") from None

    def check_free(self) -> None:
        """Raises BusyError if the path holds something else than a sweep."""
        try:
            names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:
            raise self._not_writable(error) from None
        other = next((name for name in names if not name.startswith(".")), None)  # .* is our own lock
        if other is not None and not self.is_sweep():
            raise BusyError(f"{self.path}: is not a sweep (it holds {other}); choose another --sweep-dir")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder, and lets only one process at a time train the sweep.

        Raises:
            BusyError: another process does, or the folder cannot be written.
        """

        def refuse() -> None:
            raise BusyError(f"{self.path}: another process trains this sweep; wait for it or stop it")

        with contextlib.ExitStack() as stack:
            try:
                (self.path / "logs").mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self.plan, on_wait=refuse))
            except OSError as error:
                raise self._not_writable(error) from None
            yield

    def _not_writable(self, error: OSError) -> BusyError:
        return BusyError(f"{self.path}: {reason(error)}; choose another --sweep-dir")

    def write(self, plan: Plan, text: str) -> None:
        """Writes the plan and the text of its config.

        Raises:
            StorageError: a file cannot be written.
        """
        public = _ROOT.sub(lambda line: without_secrets(line[0]), text)  # the runs get the login another way
        write_atomically(self.config, public)
        document = asdict(plan) | {"runs": [run._asdict() for run in plan.runs]}
        write_atomically(self.plan, json.dumps(document, indent=1) + "\n")

    def is_finished(self, name: str, config: Config) -> bool:
        """Returns whether a run has finished with this config."""
        try:
            return is_finished(self.run(name), {"config": config.model_dump(mode="json"), "data": {}})
        except DisttrainError:  # `disttrain run` says what is wrong
            return False

    def row(self, name: str, exit_code: int | None = None) -> Row:
        """Returns how a run ended; `exit_code` is that of its process, None if it is unknown."""
        folder = self.run(name)
        status = folder.status()
        state, why = str(status.get("state") or "not started"), str(status.get("reason") or "")
        recorded = status.get("exit_code")
        if (exit_code or recorded) != recorded or not status:  # it ended without a status
            why = self._last_words(name)
            if exit_code or why:
                state = "stopped" if exit_code == StoppedError.exit_code else "failed"
        _, evals, _ = read_metrics(folder.metrics)
        last = evals[-1] if evals else None
        if state == "finished" and last is not None:
            early = f"; {why}" if why.startswith(STOPPED_EARLY) else ""
            why = result_text(last) + early
        return Row(
            state,
            recorded if exit_code is None else exit_code,
            status.get("epoch"),
            last.accuracy if last else None,
            max((record.accuracy for record in evals), default=None),
            ": ".join([*([] if why.startswith(state) else [state]), *why.splitlines()[:1]]),
        )

    def _last_words(self, name: str) -> str:
        """Returns the last line that `disttrain run` printed."""
        try:
            lines = self.log(name).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return lines[-1].removeprefix("disttrain: ") if lines else ""

    def write_table(self, rows: Mapping[str, Row]) -> None:
        """Writes a line for each run of the plan: its settings and how it ended; not on a full disk."""
        runs = self.read().runs
        text = io.StringIO(newline="")
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["run", *runs[0].values, *Row._fields])
        lines.writerows([run.name, *run.values.values(), *rows[run.name]] for run in runs)
        with contextlib.suppress(StorageError):  # the runs go on, and have their own records
            write_atomically(self.table, text.getvalue(), durable=False)

    def unfinished(self, rows: Mapping[str, Row]) -> list[str]:
        """Returns a line for each run that has not finished, and one for all that have not started."""
        lines = []
        for name, row in rows.items():
            if row.state not in {"finished", "not started"}:
                code = f" (exit code {row.exit_code})" if row.exit_code else ""
                log = self.log(name) if self.log(name).exists() else self.run(name).log(0)
                lines.append(f"{name}: {row.outcome}{code}; see {log}")
        if waiting := sum(row.state == "not started" for row in rows.values()):
            lines.append(f"{waiting:,} of {len(rows):,} runs not started")
        return lines


def run_folders(path: Path) -> list[Path]:
    """Returns the run folders of a sweep that have begun; of a run, itself.

    Raises:
        UsageError: no run of the sweep has begun.
    """
    sweep = SweepFolder(path)
    if not sweep.is_sweep():
        return [path]
    folders = [sweep.run(run.name) for run in sweep.read().runs]
    begun = [folder.path for folder in folders if folder.status()]
    if not begun:
        raise UsageError(f"{path}: none of its {len(folders)} runs has begun; look into {path / 'logs'}")
    return begun
