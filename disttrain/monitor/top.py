"""`disttrain top`: the GPUs of a run, live from its files, or those of this node.

Reads only what the run writes: gpu.jsonl, metrics.jsonl, status.json and env.json, so it works from another
terminal, on another node, and after the end. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from disttrain.errors import UsageError
from disttrain.monitor import nvml
from disttrain.monitor.readings import GpuReaders
from disttrain.monitor.widgets import Frame, bar, devices, plain
from disttrain.runs.runfolder import RunFolder
from disttrain.terminal import Output, is_animated
from disttrain.units import ago, number, percent

_INTERVAL_S = 0.5
_SILENT_S = 60.0  # after which a run that should be running is suspicious
_FIRST_BYTES = 2**20
_MOST_BYTES = 2**26  # a GPU whose last reading lies further back is shown without one
_BAR = 30

Snapshot = dict[str, Any]
Cell = Callable[[Mapping[str, Any]], str]


def show(run: Path | None, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Shows the GPUs of a run, or of this node, until Ctrl-C; once where there is no terminal.

    Args:
        run: the run folder; None for this node.
        as_json: print one JSON document and return.
        stream: where to write; None is standard output.

    Raises:
        UsageError: the folder holds no run.
    """
    out = Output(sys.stdout if stream is None else stream)
    with _node() if run is None else _run(run) as look:
        if as_json:
            out.write(json.dumps(look(), indent=1) + "\n")
        elif is_animated(out):
            _follow(look, out)
        else:
            for line in lines(look(), Console(file=cast(TextIO, out)).width, None):
                out.write(line.plain.rstrip() + "\n")
        out.flush()


def _follow(look: Callable[[], Snapshot], out: Output) -> None:
    console = Console(file=cast(TextIO, out), force_terminal=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cursor comes back
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
    """Gives what looks at the GPUs of this node."""
    host = socket.gethostname()
    gpus = nvml.node_gpus()
    notes: list[str] = []
    last: dict[str, dict[str, Any]] = {}

    def look() -> Snapshot:
        now = datetime.now(UTC)
        for gpu, reading in zip(gpus, readers.sweep(), strict=True):
            if reading is not None:
                identity = {"host": host, "index": gpu.index, "uuid": gpu.uuid, "name": gpu.name}
                last[gpu.uuid] = {"time": now.isoformat(), **identity, **reading}
        rows = [row | {"age_s": _age_s(row["time"], now)} for row in last.values()]
        return {"run": None, "host": host, "time": now.isoformat(), "gpus": rows, "notes": list(notes)}

    with GpuReaders([gpu.uuid for gpu in gpus], (), notes.append) as readers:
        if gpus:
            readers.sweep()  # rates are known from the second reading on
            time.sleep(_INTERVAL_S)
        yield look


@contextlib.contextmanager
def _run(path: Path) -> Iterator[Callable[[], Snapshot]]:
    """Gives what looks at a run.

    Raises:
        UsageError: the folder holds no run.
    """
    folder = RunFolder(path)
    if not (folder.env.exists() or folder.status()):
        raise UsageError(f"{path}: holds no run; give a run folder, such as runs/<name>/<UTC time>")
    records: dict[str, dict[str, Any]] = {}  # of metrics.jsonl, the last of each kind
    readings: dict[str, dict[str, Any]] = {}  # of gpu.jsonl, the last of each GPU

    def take_metrics(new: Sequence[dict[str, Any]]) -> bool:
        records.update({record["kind"]: record for record in new if "kind" in record})
        return {"train", "eval"} <= records.keys()

    def take_readings(new: Sequence[dict[str, Any]]) -> bool:
        for record in new:
            uuid, xids = str(record.get("uuid")), record.get("xids") or []
            seen = readings.get(uuid, {}).get("xids_seen", [])
            readings[uuid] = record | {"xids_seen": sorted({*seen, *xids})}
        return {device["uuid"] for device in _devices(folder)} <= readings.keys()

    metrics = _Tail(folder.metrics, take_metrics)
    gpu = _Tail(folder.gpu, take_readings)

    def look() -> Snapshot:
        metrics.read()
        gpu.read()
        now = datetime.now(UTC)
        status = folder.status()
        train, evaluation = records.get("train", {}), records.get("eval")
        devices = _devices(folder)
        rows = [device | readings.get(device["uuid"], {}) for device in devices] or list(readings.values())
        signs = [*(row.get("time") for row in rows), status.get("updated_at")]
        with contextlib.suppress(OSError):
            signs.append(datetime.fromtimestamp(folder.metrics.stat().st_mtime, UTC).isoformat())
        ages = [age for sign in signs if (age := _age_s(sign, now)) is not None]
        return {
            "run": str(path),
            "time": now.isoformat(),
            "status": status,
            "last_sign_age_s": min(ages, default=None),
            "train": {key: value for key, value in train.items() if key not in ("gpus", "processes")},
            "eval": evaluation,
            "gpus": [row | {"age_s": _age_s(row.get("time"), now)} for row in rows],
            "processes": train.get("processes") or [],
            "notes": [],
        }

    yield look


def _devices(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns host, index, uuid and name of the GPUs of the run's last start, each once."""
    try:
        devices = json.loads(folder.env.read_bytes())["devices"]
        rows = [{key: row.get(key) for key in ("host", "index", "uuid", "name")} for row in devices]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return list({row["uuid"]: row for row in rows if row["uuid"] is not None}.values())


class _Tail:
    """Follows a JSONL file to which others append.

    Args:
        path: need not exist yet; may be replaced by another file.
        take: gets new records; at first those of the end of the file, of a longer end until it returns True.
    """

    def __init__(self, path: Path, take: Callable[[Sequence[dict[str, Any]]], bool]) -> None:
        self._path = path
        self._take = take
        self._file = 0  # its inode
        self._offset = 0

    def read(self) -> None:
        """Takes the lines that have been completed since the last call."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino == self._file and state.st_size >= self._offset:
                self._read_from(file, self._offset)
                return
            self._file, self._offset, length = state.st_ino, 0, _FIRST_BYTES
            while not self._read_from(file, state.st_size - length) and length < min(
                state.st_size, _MOST_BYTES
            ):
                length *= 8

    def _read_from(self, file: BinaryIO, start: int) -> bool:
        """Takes what follows a place; from the middle of the file, what follows the next line."""
        begin = max(0, start)
        file.seek(begin)
        text = file.read()
        complete = text.rfind(b"\n") + 1
        lines = text[:complete].split(b"\n")
        if start > 0 and start != self._offset:
            del lines[0]
        self._offset = begin + complete
        records = []
        for line in lines:
            with contextlib.suppress(ValueError):  # torn by a crash
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
        return self._take(records)


def _age_s(when: object, now: datetime) -> float | None:
    """Returns how long ago a UTC time was; 0 for one ahead, by the clock of another node."""
    try:
        then = datetime.fromisoformat(str(when))
        return max(0.0, round((now - then).total_seconds(), 1))
    except (ValueError, TypeError):
        return None


def _of(key: str, form: str = ".0f", unit: str = "", scale: float = 1) -> Cell:
    return lambda row: number(row.get(key), form, unit, scale)


def _pair(first: Cell, second: Cell) -> Cell:
    return lambda row: f"{first(row)}/{second(row)}"


class _Column(NamedTuple):
    title: str
    width: int
    cell: Cell


_GPU_COLUMNS = (  # the first that fit are shown
    _Column("use", 5, _of("utilization_pct", unit=" %")),
    _Column(
        "memory",
        14,
        _pair(
            _of("memory_used_mib", ".1f", scale=1 / 1024),
            _of("memory_total_mib", ".1f", " GiB", 1 / 1024),
        ),
    ),
    _Column("power", 9, _pair(_of("power_w"), _of("power_limit_w", unit=" W"))),
    _Column("temp", 6, _of("temperature_c", unit=" °C")),
    _Column("age", 6, lambda row: ago(row.get("age_s"))),
    _Column("SM clock", 8, _of("sm_clock_mhz", unit=" MHz")),
    _Column("SMs", 5, _of("sm_activity_pct", unit=" %")),
    _Column("tensor", 6, _of("tensor_activity_pct", unit=" %")),
    _Column("mem use", 7, _of("memory_utilization_pct", unit=" %")),
    _Column("ours", 8, _of("memory_used_by_us_mib", ".1f", " GiB", 1 / 1024)),
    _Column(
        "PCIe in/out MiB/s",
        17,
        _pair(_of("pcie_rx_mib_per_s", ",.0f"), _of("pcie_tx_mib_per_s", ",.0f")),
    ),
    _Column(
        "NVLink in/out MiB/s",
        19,
        _pair(_of("nvlink_rx_mib_per_s", ",.0f"), _of("nvlink_tx_mib_per_s", ",.0f")),
    ),
    _Column("ECC", 7, _pair(_of("ecc_corrected"), _of("ecc_uncorrected"))),
    _Column("slowed by", 16, lambda row: _slowed_by(row.get("throttle"))),
)
_PROCESS_COLUMNS = (
    _Column("of one core", 11, _of("cpu_pct", unit=" %")),
    _Column("memory", 9, _of("memory_used_mib", ".1f", " GiB", 1 / 1024)),
)


def _slowed_by(reasons: Sequence[str] | None) -> str:
    return "n/a" if reasons is None else ", ".join(reasons) or "-"


def lines(snapshot: Snapshot, width: int, height: int | None) -> list[Text]:
    """Returns the view of a snapshot, at most `height` lines; the caller crops what is wider than `width`."""
    head = [plain(f"disttrain top  {snapshot['run'] or 'this node, ' + snapshot['host']}", "bold")]
    if snapshot["run"] is not None:
        head += _state_lines(snapshot, width)
    found = devices(snapshot["gpus"], snapshot.get("processes") or [])
    rows, labels = found.rows, found.labels
    if not rows:
        what = "no NVIDIA GPU that NVML knows" if snapshot["run"] is None else "no readings yet"
        return [*head, plain(what)][:height]
    notes = [plain(note, "bold red") for note in _notes(rows, labels) + snapshot["notes"]]
    room = len(rows) if height is None else max(1, height - len(head) - 1 - len(notes))
    shown = len(rows) if len(rows) <= room else room - 1
    label_width = max(len(label) for label in labels) + 1
    columns, bar_width = _fitting(_GPU_COLUMNS if snapshot["gpus"] else _PROCESS_COLUMNS, width - label_width)
    titles = " ".join(column.title.rjust(column.width) for column in columns)
    body = [plain(" " * (label_width + bar_width + 1) + titles, "bright_black")]
    for label, row in zip(labels[:shown], rows[:shown], strict=True):
        done, rest = bar((row.get(found.use) or 0) / 100, bar_width)
        cells = " ".join(column.cell(row).rjust(column.width) for column in columns)
        body.append(
            Text.assemble(
                plain(label.ljust(label_width), "bold"), (done, "green"), (rest, "bright_black"), f" {cells}"
            )
        )
    if shown < len(rows):
        body.append(plain(f"{found.folded(shown)}; all are shown through a pipe"))
    return [*head, *body, *notes][:height]


def _state_lines(snapshot: Snapshot, width: int) -> list[Text]:
    """Returns the run's state, where it is, and its end."""
    status, train, evaluation = snapshot["status"], snapshot["train"], snapshot["eval"]
    state, silent_s = str(status.get("state", "starting")), snapshot["last_sign_age_s"]
    quiet = state == "running" and (silent_s or 0.0) > _SILENT_S
    style = "bold red" if quiet or state == "failed" else "bold"
    text = f"{state}, last sign of life {ago(silent_s)} ago"
    if state not in ("running", "starting"):
        where = "" if status.get("rank") is None else f", rank {status['rank']} on {status.get('host')}"
        ended = _age_s(status.get("updated_at"), datetime.fromisoformat(snapshot["time"]))
        text = f"{state} {ago(ended)} ago, exit code {status.get('exit_code')}{where}: {status.get('reason')}"
    place = [
        f"step {number(train.get('step', status.get('step')), ',d')}",
        f"epoch {number(train.get('epoch', status.get('epoch')), ',d')}",
        f"loss {number(train.get('loss'), '.4f')}",
        f"accuracy {percent(train.get('accuracy'))}",
        number(train.get("images_per_s"), ",.0f", " images/s"),
        f"wait {number(train.get('data_wait_pct'), '.0f', ' %')}",
    ]
    if evaluation:
        place.append(f"eval {percent(evaluation.get('accuracy'))}")
    numbers = [place[0]]
    for part in place[1:]:
        if len(numbers[-1]) + len(part) + 2 > width:
            numbers.append(part)
        else:
            numbers[-1] += f"  {part}"
    return [plain(text.splitlines()[0], style), *map(plain, numbers)]


def _notes(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """Returns what is wrong with a GPU, a line each."""
    notes = []
    for row, label in zip(rows, labels, strict=True):
        wrong = ["is lost: it has fallen off the bus or must be reset"] if row.get("lost") else []
        wrong += [f"Xid {xid}" for xid in row.get("xids_seen") or row.get("xids") or []]
        if row.get("ecc_uncorrected"):
            wrong.append(f"{row['ecc_uncorrected']:.0f} uncorrectable memory errors")
        hot = [reason for reason in row.get("throttle") or [] if reason not in ("power", "clock_setting")]
        wrong += [f"slowed by {', '.join(hot)}"] if hot else []
        if wrong:
            notes.append(f"{label}: {', '.join(wrong)}")
    return notes


def _fitting(columns: Sequence[_Column], width: int) -> tuple[Sequence[_Column], int]:
    """Returns the first columns that fit beside a bar of at least a sixth of the width, and its width."""
    sizes = [0]
    for column in columns:
        sizes.append(sizes[-1] + column.width + 1)
    fitting = max(count for count, size in enumerate(sizes) if count == 0 or size <= width - width // 6)
    return columns[:fitting], max(0, min(_BAR, width - sizes[fitting]))
