"""Reads a run folder for the report: columns of numbers instead of records, whatever is there of it.

A run may be going on, have failed or have lost files: what cannot be read is left out and counted. This
module imports neither torch nor the plotting library.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from disttrain.config import Config, load_config
from disttrain.errors import UsageError
from disttrain.parallel import KilledError, in_processes, usable_cores
from disttrain.runs.runfolder import RunFolder

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_TAIL_BYTES = 2**21  # of metrics.jsonl, in which the ranks are looked at
_CHUNK_BYTES = 2**20  # what is decoded of it stays in the processor's cache
_PART_BYTES = 2**27  # of gpu.jsonl that are worth a process
_STALL_FACTOR = 5.0  # a step this much slower than the median
_STALL_S = 10.0  # that costs at least so long
_LOGGED = re.compile(
    r"(?P<time>\S+Z) INFO (?:(?P<start>rank 0, process )|saved .*step_(?P<step>\d+)(?P<best>, the best)?$)"
)


class Process(msgspec.Struct, gc=False):
    """A process of a run on CPUs, at a log point."""

    rank: int
    host: str = ""
    cpu_pct: float | None = None
    memory_used_mib: float | None = None


class Phases(msgspec.Struct, gc=False, frozen=True):
    """Milliseconds of a step, mean over the ranks."""

    data: float | None = None
    to_device: float | None = None
    augmentation: float | None = None
    compute: float | None = None
    communication: float | None = None
    optimizer: float | None = None


class Record(msgspec.Struct, gc=False):
    """What the report reads of a record of metrics.jsonl, train or eval."""

    kind: str
    step: int
    epoch: int = 0
    time: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    skipped: int | None = None
    samples: float | None = None
    lr: float | None = None
    images_per_s: float | None = None
    step_time_s: float | None = None
    data_wait_pct: float | None = None
    device_flops_per_s: float | None = None
    mfu_pct: float | None = None
    grad_norm: float | None = None
    phases_ms: Phases = Phases()
    processes: tuple[Process, ...] = ()
    correct: int | None = None
    total: int | None = None
    tta: str | None = None


class RankRecord(msgspec.Struct, gc=False):
    """The phases of a step on each rank, where a record has them."""

    step: int
    ranks_ms: dict[str, tuple[float, ...]] = {}


class GpuSample(msgspec.Struct, gc=False):
    """What the report reads of a record of gpu.jsonl."""

    time: str
    uuid: str
    host: str = ""
    index: int | None = None
    name: str | None = None
    utilization_pct: float | None = None
    memory_used_mib: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


MEASURES = {
    "utilization_pct": ("Utilisation of the GPU", "%"),
    "cpu_pct": ("Processor, 100 % is one core", "%"),
    "memory_gib": ("Memory", "GiB"),
    "power_w": ("Power", "W"),
    "temperature_c": ("Temperature", "°C"),
}
"""What is measured of a device over time: title and unit."""

_TRAIN_COLUMNS = (
    "step", "epoch", "samples", "loss", "accuracy", "lr", "images_per_s", "step_time_s", "data_wait_pct",
    "device_flops_per_s", "mfu_pct",
    *(f"phases_ms.{name}" for name in Phases.__struct_fields__),
)  # fmt: skip
_GPU_COLUMNS = ("utilization_pct", "memory_used_mib", "power_w", "temperature_c")
_PROCESS_COLUMNS = ("cpu_pct", "memory_used_mib")


class Event(NamedTuple):
    """Something that happened to a run, for the time axis.

    Attributes:
        time_s: UTC, seconds since 1970.
        seconds: how long it took, or None.
        text: one line for people.
    """

    kind: Literal["start", "evaluation", "checkpoint", "stall"]
    time_s: float
    seconds: float | None
    text: str


@dataclass(frozen=True)
class Device:
    """A GPU, or a process on CPUs, and its measures over time.

    Attributes:
        label: what people call it.
        name: product name, or "CPU".
        time_s: UTC, seconds since 1970, increasing; float64 [n].
        values: key of MEASURES -> float64 [n], NaN where unknown.
    """

    label: str
    name: str
    time_s: Array
    values: dict[str, Array]


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: its run folder.
        config: None if config.yaml is missing or not valid; `config_problem` says which.
        env: the content of env.json, or {}.
        status: the content of status.json, or {}.
        train: column of the train records -> float64 [records], NaN where unknown; with time_s, UTC.
        evals: the evaluations.
        processes: of a run on CPUs.
        events: in order of time.
        skipped: training samples that were left out, or None.
        unread: lines that could not be read; a last line that is being written is not counted.
    """

    folder: RunFolder
    config: Config | None
    config_problem: str
    env: dict[str, Any]
    status: dict[str, Any]
    train: dict[str, Array]
    evals: list[Record]
    processes: list[Device]
    events: list[Event]
    skipped: int | None
    unread: int

    @property
    def name(self) -> str:
        """The name of the experiment, or of the folder."""
        return self.config.name if self.config else self.folder.path.resolve().name

    @property
    def best(self) -> Record | None:
        """The evaluation with the highest accuracy, the first of several."""
        known = [record for record in self.evals if record.accuracy is not None]
        return max(known, key=lambda record: record.accuracy or 0.0, default=None)

    @property
    def training_s(self) -> Array:
        """Seconds of training up to each train record, without evaluations and pauses; float64 [records]."""
        steps = np.diff(self.train["step"], prepend=0.0)
        return np.nancumsum(steps * self.train["step_time_s"])


def read_run(path: Path) -> Run:
    """Reads a run folder, all but gpu.jsonl.

    Raises:
        UsageError: it is no run folder.
    """
    folder = RunFolder(path)
    if not (path / "status.json").exists() and not folder.config.exists() and not folder.metrics.exists():
        raise UsageError(f"{path}: is not a run folder (no status.json, config.yaml or metrics.jsonl)")
    config, problem = None, ""
    try:
        config = load_config(folder.config)
    except UsageError as error:
        problem = str(error)
    records, unread = _read_lines(folder.metrics, Record)
    trained = [record for record in records if record.kind == "train"]
    evals = [record for record in records if record.kind == "eval"]
    train = dict(zip(_TRAIN_COLUMNS, _columns(trained, _TRAIN_COLUMNS).T, strict=True))
    train["time_s"] = _seconds([record.time or "" for record in trained])
    events = [*_logged(folder.log(0)), *_evaluations(train, evals), *_stalls(train)]
    return Run(
        folder=folder,
        config=config,
        config_problem=problem,
        env=_read_json(folder.env),
        status=folder.status(),
        train=train,
        evals=evals,
        processes=_processes(trained, train["time_s"]),
        events=sorted(events, key=lambda event: event.time_s),
        skipped=trained[-1].skipped if trained else None,
        unread=unread,
    )


def read_ranks(path: Path) -> tuple[dict[str, list[float]], int]:
    """Returns the milliseconds of a step on each rank, phase by phase, and of how many log points they are.

    They are the means over the steps of the last ones in metrics.jsonl.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return {}, 0
    chunks = _chunks(path, RankRecord, max(0, size - _TAIL_BYTES), size)
    found = [record for records, _ in chunks for record in records if record.ranks_ms]
    shapes = [{phase: len(row) for phase, row in record.ranks_ms.items()} for record in found]
    found = [record for record, shape in zip(found, shapes, strict=True) if shape == shapes[-1]]
    if not found:
        return {}, 0
    steps = np.diff([record.step for record in found])
    if len(found) > 1:
        found = found[1:]  # of the first one it is not known how many steps it has
    weights = np.maximum(steps, 1) if len(steps) else None
    means = {
        phase: np.average([record.ranks_ms[phase] for record in found], axis=0, weights=weights).tolist()
        for phase in found[-1].ranks_ms
    }
    return means, len(found)


def read_gpus(path: Path) -> tuple[list[Device], int]:
    """Reads gpu.jsonl; a large one in several processes, as a day of 64 GPUs is 5.5 million readings.

    Returns:
        The GPUs in order of host and index, and the number of lines that could not be read.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return [], 0
    count = min(usable_cores(), max(1, size // _PART_BYTES))
    cuts = [size * number // count for number in range(count + 1)]
    parts: list[_Readings] = []
    if count > 1:
        with contextlib.suppress(KilledError):  # there may be too little memory for all at once
            parts = in_processes(partial(_read_readings, path), list(itertools.pairwise(cuts)), count)
    parts = parts or [_read_readings(path, (0, size))]
    first: dict[str, GpuSample] = {}
    for part in parts:
        first = part.first | first
    numbers = {uuid: number for number, uuid in enumerate(first)}
    if not numbers:
        return [], sum(part.unread for part in parts)
    whose = np.concatenate([np.array([numbers[u] for u in p.first], np.int64)[p.whose] for p in parts])
    times = np.concatenate([part.times_s for part in parts])
    values = np.concatenate([part.values for part in parts])
    order = np.argsort(whose, kind="stable")
    ends = np.cumsum(np.bincount(whose, minlength=len(numbers)))
    several_hosts = len({sample.host for sample in first.values()}) > 1
    devices = []
    for (uuid, sample), own in zip(first.items(), np.split(order, ends[:-1]), strict=True):
        index = uuid if sample.index is None else f"GPU {sample.index}"
        label = f"{sample.host} {index}" if several_hosts else index
        measured = _measured(_GPU_COLUMNS, values[own])
        device = Device(label, sample.name or "unknown GPU", times[own], measured)
        devices.append(((sample.host, sample.index is None, sample.index or 0), device))
    ordered = [device for _, device in sorted(devices, key=lambda pair: pair[0])]
    return ordered, sum(part.unread for part in parts)


class _Readings(NamedTuple):
    """A part of gpu.jsonl: the GPUs with their first reading; of each line whose it is, when, and what."""

    first: dict[str, GpuSample]
    whose: npt.NDArray[np.int16]
    times_s: Array
    values: npt.NDArray[np.float32]
    unread: int


def _read_readings(path: Path, place: tuple[int, int]) -> _Readings:
    """Reads the lines that begin in a part of gpu.jsonl; `place` is where it begins and ends."""
    first: dict[str, GpuSample] = {}
    numbers: dict[str, int] = {}
    whose, times_s = [np.empty(0, np.int16)], [np.empty(0)]
    values, unread = [np.empty((0, len(_GPU_COLUMNS)), np.float32)], 0
    for samples, bad in _chunks(path, GpuSample, *place):
        unread += bad
        uuids = [sample.uuid for sample in samples]
        for uuid in set(uuids) - set(numbers):
            numbers[uuid] = len(numbers)
            first[uuid] = samples[uuids.index(uuid)]
        whose.append(np.fromiter(map(numbers.__getitem__, uuids), np.int16, len(uuids)))
        times_s.append(_seconds([sample.time for sample in samples]))
        values.append(_columns(samples, _GPU_COLUMNS).astype(np.float32))
    return _Readings(first, np.concatenate(whose), np.concatenate(times_s), np.concatenate(values), unread)


def thin(values: Array, points: int) -> Ids:
    """Returns which values to draw so that no extreme is lost: increasing indices, about `points` at most.

    The values are cut into buckets of equal length; of each the least and the greatest one are kept, and of
    all the first and the last. A bucket of unknown values keeps one of them, which leaves a gap in the curve.

    Args:
        values: float64 [n], NaN where unknown.
        points: at least 4.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    buckets = max(1, (points - 2) // 2)
    width = -(-count // buckets)
    padded = np.full(width * -(-count // width), np.nan)
    padded[:count] = values
    table = padded.reshape(-1, width)
    unknown = np.isnan(table)
    starts = np.arange(len(table)) * width
    low = starts + np.where(unknown, np.inf, table).argmin(1)
    high = starts + np.where(unknown, -np.inf, table).argmax(1)
    kept: Ids = np.unique(np.concatenate([[0], low, high, [count - 1]]))
    return kept


def reached(run: Run, accuracy: float) -> tuple[Record, float] | None:
    """Returns the first evaluation of at least this accuracy and the seconds of training before it."""
    for record in run.evals:
        if record.accuracy is not None and record.accuracy >= accuracy:
            before = int(np.searchsorted(run.train["step"], record.step, side="right"))
            return record, float(run.training_s[before - 1]) if before else math.nan
    return None


_Row = TypeVar("_Row", bound=msgspec.Struct)


def _read_lines(path: Path, kind: type[_Row]) -> tuple[list[_Row], int]:
    rows: list[_Row] = []
    unread = 0
    for chunk, bad in _chunks(path, kind):
        rows += chunk
        unread += bad
    return rows, unread


def _chunks(
    path: Path, kind: type[_Row], begin: int = 0, end: int | None = None
) -> Iterator[tuple[list[_Row], int]]:
    """Yields the rows of a JSONL file, some megabytes at a time, and how many lines could not be read.

    Args:
        path: of the file.
        kind: of the rows.
        begin: the lines that begin after this byte and not after `end` are read, but the first one of all.
        end: None is the end of the file.
    """
    decoder, size = msgspec.json.Decoder(kind), _CHUNK_BYTES
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        return
    with file:
        begin = _next_line(file, begin)
        end = _next_line(file, end) if end is not None else None
        while end is None or begin < end:
            file.seek(begin)
            data = file.read(size if end is None else min(size, end - begin))
            lines = memoryview(data)[: data.rfind(b"\n") + 1]  # of a line that is being written, nothing
            if not lines and len(data) == size:
                size *= 2  # a line of very many GPUs
                continue
            if not lines:
                return
            begin += len(lines)
            try:
                yield decoder.decode_lines(lines), 0
            except msgspec.MsgspecError:
                yield _readable(decoder, bytes(lines))


def _next_line(file: BinaryIO, place: int) -> int:
    """Returns where the first line begins that does not begin before a place."""
    if place == 0:
        return 0
    file.seek(place - 1)
    return place - 1 + len(file.readline())


def _readable(decoder: msgspec.json.Decoder[_Row], lines: bytes) -> tuple[list[_Row], int]:
    rows, bad = [], 0
    for line in lines.splitlines():
        try:
            rows.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            bad += 1
    return rows, bad


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _columns(rows: Sequence[object], names: Sequence[str]) -> Array:
    """Returns attributes of rows as float64 [rows, names], NaN for None."""
    if not rows:
        return np.empty((0, len(names)))
    return np.stack([_column(rows, name) for name in names], axis=1)


def _column(rows: Sequence[object], name: str) -> Array:
    try:
        return np.fromiter(map(attrgetter(name), rows), np.float64, len(rows))
    except TypeError:  # there is a None
        return np.array(list(map(attrgetter(name), rows)), np.float64)


def _seconds(times: Sequence[str]) -> Array:
    """Returns ISO times in UTC with milliseconds or better as seconds since 1970, NaN for what is no time."""
    text = np.frombuffer("".join(times).encode("ascii", "replace"), np.uint8)
    width = len(times[0]) if times else 0
    if width >= 23 and len(text) == width * len(times):
        table = text.reshape(-1, width)
        digits = table[:, _DIGITS] - np.uint8(ord("0"))
        if (table[:, :11] == table[0, :11]).all() and (digits <= 9).all():  # the same day, as in most chunks
            parsed: Array = _parse(f"{times[0][:11]}00:00:00.000") + digits @ _WEIGHTS_S
            return parsed
    return np.array([_parse(time[:23]) for time in times], np.float64)


_DIGITS = [11, 12, 14, 15, 17, 18, 20, 21, 22]  # of hours, minutes, seconds and milliseconds
_WEIGHTS_S = np.array([36000, 3600, 600, 60, 10, 1, 0.1, 0.01, 0.001])


def _parse(time: str) -> float:
    try:
        return datetime.fromisoformat(f"{time}+00:00").timestamp()
    except ValueError:
        return math.nan


def _processes(records: Sequence[Record], times: Array) -> list[Device]:
    ranks: dict[int, list[tuple[float, Process]]] = {}
    for time_s, record in zip(times.tolist(), records, strict=True):
        for process in record.processes:
            ranks.setdefault(process.rank, []).append((time_s, process))
    devices = []
    for rank, rows in sorted(ranks.items()):
        values = _columns([process for _, process in rows], _PROCESS_COLUMNS)
        times_s = np.array([time for time, _ in rows])
        devices.append(Device(f"rank {rank}", "CPU", times_s, _measured(_PROCESS_COLUMNS, values)))
    return devices


def _measured(names: Sequence[str], values: npt.NDArray[Any]) -> dict[str, Array]:
    """Returns columns of readings by their key in MEASURES."""
    columns = dict(zip(names, values.T.astype(np.float64), strict=True))
    return {"memory_gib" if k == "memory_used_mib" else k: v / (1024 if k == "memory_used_mib" else 1)
            for k, v in columns.items()}  # fmt: skip


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
        time_s = float(_seconds([found["time"]])[0])
        if found["start"]:
            starts += 1
            yield Event("start", time_s, None, "start" if starts == 1 else f"start number {starts}")
        else:
            best = ", the best so far" if found["best"] else ""
            yield Event("checkpoint", time_s, None, f"checkpoint of step {int(found['step']):,}{best}")


def _evaluations(train: dict[str, Array], evals: Iterable[Record]) -> Iterator[Event]:
    """Yields the evaluations; each takes the time since the log point at the end of its epoch."""
    for record in evals:
        if record.time is None:
            continue
        end_s = float(_seconds([record.time])[0])
        last = int(np.searchsorted(train["step"], record.step, side="right")) - 1
        seconds = end_s - float(train["time_s"][last]) if last >= 0 else math.nan
        accuracy = "n/a" if record.accuracy is None else f"{100 * record.accuracy:.2f} %"
        known = seconds if math.isfinite(seconds) else None
        yield Event("evaluation", end_s, known, f"evaluation after epoch {record.epoch}: {accuracy}")


def _stalls(train: dict[str, Array]) -> Iterator[Event]:
    """Yields the intervals between log points in which steps took far longer than usual."""
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
