"""Reads a run folder for the report, as columns of numbers instead of records.

A run may still be running, have failed or have lost files. Lines that cannot be read are skipped and counted.
This module imports neither torch nor the plotting library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from disttrain.config import Config, load_config
from disttrain.errors import UsageError
from disttrain.report.columns import Array, columns, parse_times
from disttrain.report.devices import Device, processes
from disttrain.runs.eval_metrics import EVAL_METRICS, Metric, best_of
from disttrain.runs.jsonl import parts
from disttrain.runs.records import METRICS, EvalRecord, StepTimes, TrainRecord, read_metrics
from disttrain.runs.runfolder import RunFolder
from disttrain.units import percent

_TAIL_BYTES = 2**21  # of metrics.jsonl, read for the times of each rank
_STALL_FACTOR = 5.0  # a stall is a step this much slower than the median
_STALL_S = 10.0  # and costs at least this long
_LOGGED = re.compile(
    r"(?P<time>\S+Z) INFO (?:(?P<start>rank 0, process )|saved .*step_(?P<step>\d+)(?P<best>, the best.*)?$)"
)
_TRAIN_COLUMNS = (
    "step", "epoch", "samples", "loss", "accuracy", "lr", "images_per_s", "step_time_s", "data_wait_pct",
    "device_flops_per_s", "mfu_pct",
    *(f"phases_ms.{name}" for name in StepTimes.__struct_fields__),
)  # fmt: skip


class Event(NamedTuple):
    """An event of a run, to mark on the time axis.

    Attributes:
        time_s: UTC, seconds since 1970.
        seconds: how long it took, or None.
        text: one line of description.
    """

    kind: Literal["start", "evaluation", "checkpoint", "stall"]
    time_s: float
    seconds: float | None
    text: str


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        folder: the run folder.
        config: None if config.yaml is missing or not valid; `config_problem` says why.
        env: the content of env.json, or {}.
        status: the content of status.json, or {}.
        train: name of a column -> float64 [train records], NaN if unknown; also time_s, UTC.
        evals: the evaluations.
        processes: processes of a CPU run.
        events: in order of time.
        skipped: number of skipped training samples, or None.
        unread: number of unreadable lines, without a last line that is still being written.
    """

    folder: RunFolder
    config: Config | None
    config_problem: str
    env: dict[str, Any]
    status: dict[str, Any]
    train: dict[str, Array]
    evals: list[EvalRecord]
    processes: list[Device]
    events: list[Event]
    skipped: int | None
    unread: int

    @property
    def name(self) -> str:
        """The name of the experiment, or of the folder if the config cannot be read."""
        return self.config.name if self.config else self.folder.path.resolve().name

    @property
    def best(self) -> EvalRecord | None:
        """The first evaluation that is the best by `metric`."""
        return best_of(self.evals, self.metric)

    @property
    def metric(self) -> Metric:
        """That of eval.best."""
        return EVAL_METRICS[self.config.eval.best if self.config else "accuracy"]

    @property
    def training_s(self) -> Array:
        """Seconds of training up to each train record, without evaluations and pauses; float64 [records]."""
        steps = np.diff(self.train["step"], prepend=0.0)
        return np.nancumsum(steps * self.train["step_time_s"])


def read_run(path: Path) -> Run:
    """Reads a run folder, except gpu.jsonl.

    Raises:
        UsageError: `path` is not a run folder.
    """
    folder = RunFolder(path)
    if not (path / "status.json").exists() and not folder.config.exists() and not folder.metrics.exists():
        raise UsageError(f"{path}: is not a run folder (no status.json, config.yaml or metrics.jsonl)")
    config, problem = None, ""
    try:
        config = load_config(folder.config)
    except UsageError as error:
        problem = str(error)
    trained, evals, unread = read_metrics(folder.metrics)
    train = dict(zip(_TRAIN_COLUMNS, columns(trained, _TRAIN_COLUMNS).T, strict=True))
    train["time_s"] = parse_times([record.time or "" for record in trained])
    events = [*_logged(folder.log(0)), *_evaluations(train, evals), *_stalls(train)]
    return Run(
        folder=folder,
        config=config,
        config_problem=problem,
        env=_read_json(folder.env),
        status=folder.status(),
        train=train,
        evals=evals,
        processes=processes(trained, train["time_s"]),
        events=sorted(events, key=lambda event: event.time_s),
        skipped=trained[-1].skipped if trained else None,
        unread=unread,
    )


def read_ranks(path: Path) -> tuple[dict[str, list[float]], int]:
    """Returns the milliseconds per step of each rank, by phase, and the number of log points they cover.

    The values are means over the steps of the last log points in metrics.jsonl.
    """
    times = [
        (record.step, {phase: row for phase, row in msgspec.structs.asdict(record.ranks_ms).items() if row})
        for part in parts(path, METRICS, -_TAIL_BYTES)
        for record in part.rows
        if isinstance(record, TrainRecord)
    ]
    found = [(step, rows) for step, rows in times if rows]
    shapes = [{phase: len(row) for phase, row in rows.items()} for _, rows in found]
    found = [pair for pair, shape in zip(found, shapes, strict=True) if shape == shapes[-1]]
    if not found:
        return {}, 0
    steps = np.diff([step for step, _ in found])
    if len(found) > 1:
        found = found[1:]  # the first one covers an unknown number of steps
    weights = np.maximum(steps, 1) if len(steps) else None
    means = {
        phase: np.average([rows[phase] for _, rows in found], axis=0, weights=weights).tolist()
        for phase in found[-1][1]
    }
    return means, len(found)


def time_to_accuracy(run: Run, accuracy: float) -> tuple[EvalRecord, float] | None:
    """Returns the first evaluation with at least this accuracy, and the seconds of training before it."""
    for record in run.evals:
        if record.accuracy >= accuracy:
            before = int(np.searchsorted(run.train["step"], record.step, side="right"))
            return record, float(run.training_s[before - 1]) if before else math.nan
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _logged(log: Path) -> Iterator[Event]:
    """Yields the starts of the run and its checkpoints, from the log of rank 0."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return
    starts = 0
    for line in lines:
        found = _LOGGED.match(line)
        if found is None:
            continue
        time_s = float(parse_times([found["time"]])[0])
        if found["start"]:
            starts += 1
            yield Event("start", time_s, None, "start" if starts == 1 else f"start number {starts}")
        else:
            best = f"{found['best']} so far" if found["best"] else ""
            yield Event("checkpoint", time_s, None, f"checkpoint of step {int(found['step']):,}{best}")


def _evaluations(train: dict[str, Array], evals: Iterable[EvalRecord]) -> Iterator[Event]:
    """Yields the evaluations; each one starts at the last log point of its epoch."""
    for record in evals:
        if record.time is None:
            continue
        end_s = float(parse_times([record.time])[0])
        last = int(np.searchsorted(train["step"], record.step, side="right")) - 1
        seconds = end_s - float(train["time_s"][last]) if last >= 0 else math.nan
        known = seconds if math.isfinite(seconds) else None
        yield Event(
            "evaluation", end_s, known, f"evaluation after epoch {record.epoch}: {percent(record.accuracy)}"
        )


def _stalls(train: dict[str, Array]) -> Iterator[Event]:
    """Yields the intervals between log points with steps far slower than usual."""
    if len(train["step"]) < 3:
        return
    steps = np.diff(train["step"], prepend=0.0)
    usual_s = float(np.nanmedian(train["step_time_s"]))
    lost_s = steps * (train["step_time_s"] - usual_s)
    slow = (train["step_time_s"] > _STALL_FACTOR * usual_s) & (lost_s > _STALL_S)
    for at in np.flatnonzero(slow & np.isfinite(train["time_s"])):
        last, count, step_time_s = (float(c[at]) for c in (train["step"], steps, train["step_time_s"]))
        which = f"steps {last - count + 1:,.0f} to {last:,.0f}" if count > 1 else f"step {last:,.0f}"
        times = f"{step_time_s / usual_s:,.0f} times as long as usual"
        text = f"{which} took {count * step_time_s:,.0f} s, {times}"
        yield Event("stall", float(train["time_s"][at]), count * step_time_s, text)
