"""`disttrain top`: the GPUs of a run, live from its files, or those of this node.

Reads only what the run writes: gpu.jsonl, metrics.jsonl, status.json and env.json, so it works from another
terminal, on another node, and after the end. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import msgspec
from msgspec import UNSET, UnsetType
from rich.console import Console
from rich.live import Live
from rich.text import Text

from disttrain.errors import DisttrainError, UsageError
from disttrain.monitor import nvml
from disttrain.monitor.device_table import devices, slowed_by, table
from disttrain.monitor.readings import GpuReaders
from disttrain.monitor.widgets import Frame, plain
from disttrain.runs.jsonl import Follower
from disttrain.runs.records import METRICS, EvalRecord, GpuReading, Process, TrainRecord
from disttrain.runs.runfolder import RunFolder
from disttrain.terminal import Output, is_animated
from disttrain.units import ago, number, percent

_INTERVAL_S = 0.5
_SILENT_S = 60.0  # after which a run that should be running is suspicious


class Gpu(GpuReading, kw_only=True):
    """The last reading of a GPU."""

    age_s: float | None = None
    why_lost: str | None = None
    """NVML's error, where it was lost before this program began to look."""
    xids_seen: tuple[int, ...] = ()
    """Critical errors since this program started."""


class Snapshot(msgspec.Struct, kw_only=True):
    """The state of a run, or of the GPUs of this node, at one time."""

    run: str | None
    host: str | UnsetType = UNSET
    time: datetime
    status: dict[str, Any] = {}
    last_sign_age_s: float | None = None
    train: TrainRecord | None = None
    eval: EvalRecord | None = None
    gpus: list[Gpu]
    processes: tuple[Process, ...] = ()
    notes: list[str] = []


def show(run: Path | None, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Shows the GPUs of a run, or of this node, until Ctrl-C; once without a terminal.

    Args:
        run: the run folder; None for this node.
        as_json: print one JSON document and return.
        stream: where to write; None is standard output.

    Raises:
        UsageError: the folder holds no run.
    """
    out = Output(sys.stdout if stream is None else stream)
    with _node() if run is None else contextlib.nullcontext(_run(run)) as look:
        if as_json:
            out.write(msgspec.json.format(msgspec.json.encode(look()), indent=1).decode() + "\n")
        elif is_animated(out):
            _follow(look, out)
        else:
            for line in lines(look(), Console(file=cast(TextIO, out)).width, None):
                out.write(line.plain.rstrip() + "\n")
        out.flush()


def _follow(look: Callable[[], Snapshot], out: Output) -> None:
    console = Console(file=cast(TextIO, out), force_terminal=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # restores the cursor
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                began_s = time.monotonic()
                live.update(Frame(partial(lines, look())), refresh=True)
                time.sleep(max(0.0, began_s + _INTERVAL_S - time.monotonic()))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _node() -> Iterator[Callable[[], Snapshot]]:
    """Yields a function that reads the GPUs of this node.

    Raises:
        DisttrainError: NVML cannot be used, although this is not a machine without GPUs.
    """
    why = nvml.trouble()
    if why is not None and (not why.absent or nvml.device_files()):
        raise DisttrainError(f"the GPUs of this node cannot be read: {why.text}; run `disttrain doctor`")
    host = socket.gethostname()
    every = nvml.node_gpus()
    gpus = [gpu for gpu in every if gpu.lost is None]
    notes: list[str] = []
    rows = [Gpu(host=host, index=gpu.index, uuid=gpu.uuid, name=gpu.name) for gpu in every]
    for row, gpu in zip(rows, every, strict=True):
        row.lost, row.why_lost = (None if gpu.lost is None else True), gpu.lost

    def look() -> Snapshot:
        now = datetime.now(UTC)
        places = (place for place, gpu in enumerate(every) if gpu.lost is None)
        for place, reading in zip(places, readers.sweep(), strict=True):
            if reading is not None:
                rows[place] = msgspec.structs.replace(rows[place], time=now.isoformat(), **reading)
        return Snapshot(run=None, host=host, time=now, gpus=_aged(rows, now), notes=list(notes))

    with GpuReaders([gpu.uuid for gpu in gpus], (), notes.append) as readers:
        if gpus:
            readers.sweep()  # rates need two readings
            time.sleep(_INTERVAL_S)
        yield look


def _run(path: Path) -> Callable[[], Snapshot]:
    """Returns a function that reads the state of a run.

    Raises:
        UsageError: the folder holds no run.
    """
    folder = RunFolder(path)
    if not (folder.env.exists() or folder.status()):
        raise UsageError(f"{path}: holds no run; give a run folder, such as runs/<name>/<UTC time>")
    train: TrainRecord | None = None
    evaluation: EvalRecord | None = None
    readings: dict[str, Gpu] = {}

    def take_metrics(new: Sequence[TrainRecord | EvalRecord]) -> bool:
        nonlocal train, evaluation
        for record in new:
            if isinstance(record, TrainRecord):
                train = record
            else:
                evaluation = record
        return train is not None and evaluation is not None

    def take_readings(new: Sequence[Gpu]) -> bool:
        for gpu in new:
            seen = readings[gpu.uuid].xids_seen if gpu.uuid in readings else ()
            gpu.xids_seen = tuple(sorted({*seen, *(gpu.xids or ())}))
            readings[gpu.uuid] = gpu
        return _devices(folder).keys() <= readings.keys()

    metrics = Follower(folder.metrics, METRICS, take_metrics)
    gpus = Follower(folder.gpu, msgspec.json.Decoder(Gpu), take_readings)

    def look() -> Snapshot:
        metrics.read()
        gpus.read()
        now = datetime.now(UTC)
        status = folder.status()
        devices = _devices(folder)
        rows = [readings.get(uuid, gpu) for uuid, gpu in devices.items()] or readings.values()
        signs = [*(row.time for row in rows), status.get("updated_at")]
        with contextlib.suppress(OSError):
            signs.append(datetime.fromtimestamp(folder.metrics.stat().st_mtime, UTC).isoformat())
        ages = [age for sign in signs if (age := _age_s(sign, now)) is not None]
        return Snapshot(
            run=str(path),
            time=now,
            status=status,
            last_sign_age_s=min(ages, default=None),
            train=train and msgspec.structs.replace(train, gpus=UNSET, processes=UNSET),
            eval=evaluation,
            gpus=_aged(rows, now),
            processes=(train and train.processes) or (),
        )

    return look


def _devices(folder: RunFolder) -> dict[str, Gpu]:
    """Returns the GPUs of the run's last start by their UUID, without readings."""
    try:
        rows = json.loads(folder.env.read_bytes())["devices"]
        gpus = msgspec.convert([row for row in rows if row["uuid"] is not None], list[Gpu])
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError):
        return {}
    return {gpu.uuid: gpu for gpu in gpus}


def _aged(gpus: Iterable[Gpu], now: datetime) -> list[Gpu]:
    """Sets the age of each reading, and returns the GPUs."""
    rows = list(gpus)
    for row in rows:
        row.age_s = _age_s(row.time, now)
    return rows


def _age_s(when: object, now: datetime) -> float | None:
    """Returns the seconds since a UTC time; 0 if the clock of another node is ahead."""
    try:
        then = datetime.fromisoformat(str(when))
        return max(0.0, round((now - then).total_seconds(), 1))
    except (ValueError, TypeError):
        return None


def lines(snapshot: Snapshot, width: int, height: int | None) -> list[Text]:
    """Returns the view of a snapshot, at most `height` lines; the caller crops what is wider than `width`."""
    head = [plain(f"disttrain top  {snapshot.run or f'this node, {snapshot.host}'}", "bold")]
    if snapshot.run is not None:
        head += _state_lines(snapshot, width)
    found = devices(snapshot.gpus, snapshot.processes)
    if not found.rows:
        what = "no NVIDIA GPU that NVML knows" if snapshot.run is None else "no readings yet"
        return [*head, plain(what)][:height]
    if len(found.names) == 1:
        head.append(plain(f"{len(found.rows)} x {found.names[0]}"))
    wrong = _notes(found.rows, found.labels) if snapshot.gpus else []
    notes = [plain(note, "bold red") for note in [*wrong, *snapshot.notes]]
    room = None if height is None else max(1, height - len(head) - len(notes))
    return [*head, *table(found, width, room), *notes][:height]


def _state_lines(snapshot: Snapshot, width: int) -> list[Text]:
    """Returns the lines on the state, progress and end of a run."""
    status, train, evaluation = snapshot.status, snapshot.train, snapshot.eval
    state, silent_s = str(status.get("state", "starting")), snapshot.last_sign_age_s
    quiet = state == "running" and (silent_s or 0.0) > _SILENT_S
    style = "bold red" if quiet or state == "failed" else "bold"
    text = f"{state}, last sign of life {ago(silent_s)} ago"
    if state not in ("running", "starting"):
        where = "" if status.get("rank") is None else f", rank {status['rank']} on {status.get('host')}"
        ended = _age_s(status.get("updated_at"), snapshot.time)
        text = f"{state} {ago(ended)} ago, exit code {status.get('exit_code')}{where}: {status.get('reason')}"
    place = [
        f"step {number(train.step if train else status.get('step'), ',d')}",
        f"epoch {number(train.epoch if train else status.get('epoch'), ',d')}",
        f"loss {number(train and train.loss, '.4f')}",
        f"accuracy {percent(train.accuracy if train else None)}",
        number(train and train.images_per_s, ",.0f", " images/s"),
        f"wait {number(train and train.data_wait_pct, '.0f', ' %')}",
    ]
    if evaluation is not None:
        place.append(f"eval {percent(evaluation.accuracy)}")
    numbers = [place[0]]
    for part in place[1:]:
        if len(numbers[-1]) + len(part) + 2 > width:
            numbers.append(part)
        else:
            numbers[-1] += f"  {part}"
    return [plain(text.splitlines()[0], style), *map(plain, numbers)]


def _notes(rows: Sequence[Gpu], labels: Sequence[str]) -> list[str]:
    """Returns a line for each GPU that has a problem."""
    notes = []
    for row, label in zip(rows, labels, strict=True):
        gone = f"NVML: {row.why_lost}" if row.why_lost else "it has fallen off the bus or must be reset"
        wrong = [f"is lost: {gone}"] if row.lost else []
        wrong += [f"Xid {xid}" for xid in row.xids_seen or row.xids or ()]
        if row.ecc_uncorrected:
            wrong.append(f"{row.ecc_uncorrected} uncorrectable memory errors")
        wrong += [f"slowed by {', '.join(reasons)}"] if (reasons := slowed_by(row)) else []
        if wrong:
            notes.append(f"{label}: {', '.join(wrong)}")
    return notes
