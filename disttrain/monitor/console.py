"""What rank 0 shows of a run: a live dashboard on a terminal, plain lines everywhere else.

It is fed the records of metrics.jsonl and one-line notes. It knows nothing of torch, NVML or the training
loop, and whatever becomes of the terminal, training goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from disttrain.terminal import is_animated
from disttrain.units import flops_text

_REFRESHES_PER_S = 2  # each takes some milliseconds in which the training waits for the interpreter
_LABEL = 9  # cells of the column of labels
_DEVICE_MIN = 72  # cells that a device's row needs: rows go side by side from twice as many
_POINTS_KEPT = 400
_ASCII = str.maketrans("━╾─▁▂▃▄▅▆▇█°…", "#--_..-=+*# ~")  # for terminals that have nothing else

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What stays the same during a run, in the words in which it is shown."""

    name: str
    run_dir: str
    model: str
    parameters: int
    data: str
    """Such as `mnist 60,000 train, 10,000 val, 1x28x28`."""
    devices: str
    """Such as `4 x NVIDIA H100` or `2 processes, CPU`."""
    precision: str
    batch_size: int
    """Global batch."""
    epochs: int
    steps_per_epoch: int
    samples_per_epoch: int


class Console:
    """Shows one run; used by rank 0 alone.

    On a terminal it is a dashboard that redraws itself in a thread, elsewhere a line per event, each with
    its UTC time. Methods return at once: only the redrawing thread waits for the terminal.

    Args:
        info: the run.
        verbosity: -1 shows the outcome alone, 0 the usual, 1 a line for every record where there are lines.
        position: gives the optimizer step and the samples seen in the whole run; called at each redraw.
        stream: where to write; None is standard output.
        line_interval_s: the least time between two lines on training.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        info: RunInfo,
        *,
        verbosity: int,
        position: Callable[[], tuple[int, int]],
        stream: TextIO | None = None,
        line_interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self._info = info
        self._verbosity = verbosity
        self._position = position
        self._line_interval_s = line_interval_s
        self._clock = clock
        self._out = Output(stream)
        self._lock = threading.Lock()
        self._train: Record = {}
        self._eval: Record = {}
        self._best: Record = {}
        self._verdict = ""
        self._curves = {key: deque[float | None](maxlen=_POINTS_KEPT) for key in ("loss", "accuracy")}
        self._notes: deque[str] = deque(maxlen=3)
        self._started_s = clock()
        self._origin: tuple[float, int] | None = None  # time and samples from which the pace is measured
        self._last_line_s = -math.inf
        self._live: Live | None = None
        if verbosity >= 0 and is_animated(self._out):
            self._live = Live(
                console=RichConsole(file=cast(TextIO, self._out), force_terminal=True),
                get_renderable=self.render,
                refresh_per_second=_REFRESHES_PER_S,
                vertical_overflow="crop",
                redirect_stdout=stream is sys.stdout,
                redirect_stderr=sys.stderr.isatty(),  # what goes to a file stays in the file
            )

    def start(self) -> None:
        """Shows the header, or the dashboard."""
        self._started_s = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
            return
        today = time.strftime("%Y-%m-%d UTC", time.gmtime())
        self._line(f"disttrain {self._info.name}  {today}")
        for label, text in _facts(self._info):
            self._line(f"{label:<5}  {text}")

    def train(self, record: Record) -> None:
        """Takes a record of kind train."""
        with self._lock:
            self._train = record
            for key, points in self._curves.items():
                points.append(record.get(key))
        now = self._clock()
        if self._verbosity >= 1 or now - self._last_line_s >= self._line_interval_s:
            self._last_line_s = now
            self._line(train_line(record, self._info))

    def evaluate(self, record: Record) -> None:
        """Takes a record of kind eval."""
        with self._lock:
            self._eval = record
            best = (record.get("accuracy") or 0.0) >= (self._best.get("accuracy") or 0.0)
            self._best = record if best else self._best
        self._line(eval_line(record, self._info))

    def verdict(self, text: str) -> None:
        """Takes what holds the run back at present; the dashboard alone shows it."""
        with self._lock:
            self._verdict = text

    def note(self, text: str) -> None:
        """Shows a message, such as that a checkpoint was saved."""
        with self._lock:
            self._notes.append(f"{_utc()}  {text}")
        self._line(text)

    def finish(self, text: str, ok: bool) -> None:
        """Shows how the run ended, below the last frame."""
        live = self._live
        self.stop()
        if live is None:
            self._out.write_line(text if self._verbosity < 0 else f"{_utc()}  {text}")
        else:
            live.console.print(_text(text, "bold green" if ok else "bold red"), soft_wrap=True)

    def stop(self) -> None:
        """Gives the terminal back, the last frame staying on it; harmless when repeated."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Console:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def render(self) -> RenderableType:
        """Returns the dashboard as of now; it takes the width and height of where it is printed."""
        return Frame(self._frame)

    def _line(self, text: str) -> None:
        if self._live is None and self._verbosity >= 0:
            self._out.write_line(f"{_utc()}  {text}")

    def _frame(self, width: int, height: int) -> list[Text]:
        """Returns the lines of the dashboard, at most `height`; rich crops what is wider than `width`."""
        with self._lock:
            train, evaluation, best = self._train, self._eval, self._best
            curves = {key: list(points) for key, points in self._curves.items()}
            notes, verdict = list(self._notes), self._verdict
        elapsed = f"elapsed {duration(self._clock() - self._started_s)}"
        title = _text(f"disttrain  {self._info.name}", "bold")
        title.truncate(max(0, width - len(elapsed) - 2), overflow="ellipsis", pad=True)
        rule = _text("─" * width, "bright_black")
        top = [
            Text.assemble(title, "  ", elapsed),
            *(_row(label, _text(text)) for label, text in _facts(self._info)),
            rule,
            *self._progress(train, width),
            *_train_rows(train, width),
            _row("eval", _text(_eval_summary(evaluation, best, self._info))),
            _curve_row("loss", curves["loss"], width, ".4f"),
            _curve_row("accuracy", curves["accuracy"], width, ".2f", " %", 100),
            *(
                _row("" if i else "verdict", _text(part))
                for i, part in enumerate(textwrap.wrap(verdict, max(20, width - _LABEL)))
            ),
        ]
        notes_rows = [_row("" if i else "notes", _text(note)) for i, note in enumerate(notes)]
        room = height - len(top) - 1 - len(notes_rows)
        devices = _device_rows(train, width, max(1, room))
        return [*top, *([rule, *devices] if devices else []), *notes_rows][:height]

    def _progress(self, train: Record, width: int) -> list[Text]:
        info, now = self._info, self._clock()
        step, samples = self._position()
        if self._origin is None or samples <= self._origin[1]:  # start-up is no part of the pace
            self._origin = (now, samples)
        whole = max(1, info.epochs * info.samples_per_epoch)
        epoch = min(info.epochs, max(1, math.ceil(samples / max(1, info.samples_per_epoch))))
        in_epoch = samples - (epoch - 1) * info.samples_per_epoch
        pace = (samples - self._origin[1]) / (now - self._origin[0]) if now > self._origin[0] else None
        speed = train.get("images_per_s")
        bars = (
            ("epoch", in_epoch / max(1, info.samples_per_epoch), f"{epoch:,}/{info.epochs:,}",
             eta(info.samples_per_epoch - in_epoch, speed)),
            ("total", samples / whole, f"step {step:,}/{info.epochs * info.steps_per_epoch:,}",
             eta(whole - samples, pace or speed)),
        )  # fmt: skip
        places = max(len(count) for _, _, count, _ in bars)
        rows = []
        for label, share, count, left in bars:
            share = min(1.0, max(0.0, share))
            after = f"  {int(100 * share):3d} %  {count:>{places}}  ETA {left}"
            row = _row(label, _gauge(share, width - _LABEL - len(after), "cyan"))
            rows.append(row.append(after))
        return rows


def bar(share: float, width: int) -> tuple[str, str]:
    """Returns the filled and the empty part of a bar, together `width` cells; told apart without colour."""
    halves = int(min(1.0, max(0.0, share)) * width * 2)
    done = "━" * (halves // 2) + "╾" * (halves % 2)
    return done, "─" * (width - len(done))


def sparkline(values: Sequence[float | None]) -> str:
    """Returns one character per value, its height between the least and the greatest of them.

    A value that is unknown or not finite is a blank.
    """
    levels = "▁▂▃▄▅▆▇█"
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return "".join(
        " " if value is None or not math.isfinite(value)
        else levels[int((value - low) / span * (len(levels) - 1) + 0.5) if span > 0 else 0]
        for value in values
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Returns hours:minutes:seconds."""
    whole = max(0, int(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def eta(samples: float, samples_per_s: float | None) -> str:
    """Returns how long so many samples take, n/a while the pace is not known."""
    if not samples_per_s or not math.isfinite(samples_per_s):
        return "     n/a"
    return duration(max(0.0, samples) / samples_per_s)


def number(value: object, form: str, unit: str = "", scale: float = 1, width: int = 0) -> str:
    """Returns a number in the given format with its unit, n/a for None; right-aligned in `width` cells."""
    known = isinstance(value, (int, float))
    return (f"{cast(float, value) * scale:{form}}{unit}" if known else "n/a").rjust(width)


def train_line(record: Record, info: RunInfo) -> str:
    """Returns the line of a train record, its fields aligned with those of the run's other lines."""
    gpus, processes = record.get("gpus") or [], record.get("processes") or []
    busy = ("gpu", _mean(gpus, "utilization_pct")) if gpus else ("cpu", _mean(processes, "cpu_pct"))
    return "  ".join(
        [
            _place(record, info),
            f"loss {number(record.get('loss'), '.4f', width=7)}",
            f"acc {number(record.get('accuracy'), '.2f', ' %', 100, 8)}",
            f"lr {number(record.get('lr'), '.1e', width=7)}",
            number(record.get("images_per_s"), ",.0f", " images/s", width=18),
            f"wait {number(record.get('data_wait_pct'), '.0f', ' %', width=5)}",
            f"{busy[0]} {number(busy[1], '.0f', ' %', width=5)}",
        ]
    )


def eval_line(record: Record, info: RunInfo) -> str:
    """Returns the line of an eval record."""
    return "  ".join(
        [
            _place(record, info),
            f"loss {number(record.get('loss'), '.4f', width=7)}",
            f"acc {number(record.get('accuracy'), '.2f', ' %', 100, 8)}",
            f"eval: {number(record.get('correct'), ',.0f')} of {number(record.get('total'), ',.0f')} correct",
        ]
    )


class Frame:
    """The dashboard as rich asks for it: drawn for the place in which it is shown."""

    def __init__(self, draw: Callable[[int, int], list[Text]]) -> None:
        self._draw = draw

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - 1)  # a full last column makes some terminals wrap
        height = max(1, options.size.height - 1)  # a line is left for the outcome
        lines = self._draw(width, height)
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        yield from console.render(Group(*lines), options.update_width(width))


class Output:
    """A stream that never raises: once it fails, what is written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._glyphs = {} if self.encoding.lower().startswith("utf") else _ASCII

    def write(self, text: str) -> int:
        """Writes what the stream can show of a text."""
        with self._failing_quietly() as stream:
            if stream is not None:
                shown = text.translate(self._glyphs) if self._glyphs else text
                stream.write(shown.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def write_line(self, text: str) -> None:
        """Writes a line in which nothing moves the cursor, at once."""
        self.write(_printable(text) + "\n")
        self.flush()

    def flush(self) -> None:
        """Hands on what was written."""
        with self._failing_quietly() as stream:
            if stream is not None:
                stream.flush()

    def isatty(self) -> bool:
        """Tells whether the stream is a terminal."""
        with self._failing_quietly() as stream:
            return stream is not None and stream.isatty()
        return False

    @contextlib.contextmanager
    def _failing_quietly(self) -> Iterator[TextIO | None]:
        try:
            yield self._stream
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            stream, self._stream = self._stream, None
            if isinstance(error, BrokenPipeError) and stream is not None:
                # Python flushes standard output at exit; what is left in it would become exit code 120.
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)


def _facts(info: RunInfo) -> list[tuple[str, str]]:
    model = f"{info.model}, {info.parameters:,} parameters, {info.precision}, {info.devices}"
    return [("model", model), ("data", f"{info.data}, batch {info.batch_size:,}"), ("run", info.run_dir)]


def _utc() -> str:
    return time.strftime("%H:%M:%S", time.gmtime())


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)


def _text(text: str, style: str = "") -> Text:
    """Returns a text in which nothing is markup or moves the cursor."""
    return Text(_printable(text), style)


def _row(label: str, value: Text, label_width: int = _LABEL) -> Text:
    left = _text(label, "bold")
    left.truncate(label_width, pad=True)
    return _text("").append_text(left).append_text(value)


def _gauge(share: float | None, width: int, style: str) -> Text:
    done, rest = bar(share or 0.0, max(0, width))
    return Text.assemble((done, style), (rest, "bright_black"))


def _place(record: Record, info: RunInfo) -> str:
    """Returns epoch and step of a record; the epoch is that of the step, from 1."""
    epochs, steps = f"{info.epochs:,}", f"{info.epochs * info.steps_per_epoch:,}"
    epoch = number(_epoch(record, info), ",.0f", width=len(epochs))
    return f"epoch {epoch}/{epochs}  step {number(record.get('step'), ',.0f', width=len(steps))}/{steps}"


def _epoch(record: Record, info: RunInfo) -> int | None:
    step: int | None = record.get("step")
    if step is None:
        return None
    return min(info.epochs, max(1, math.ceil(step / max(1, info.steps_per_epoch))))


def _mean(rows: Sequence[Record], key: str) -> float | None:
    known = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(known) if known else None


def _train_rows(record: Record, width: int) -> list[Text]:
    step_time_s = record.get("step_time_s")
    fields = [
        ("loss ", number(record.get("loss"), ".4f")),
        ("accuracy ", number(record.get("accuracy"), ".2f", " %", 100)),
        ("lr ", number(record.get("lr"), ".1e")),
        ("", number(record.get("images_per_s"), ",.0f", " images/s")),
        ("step ", number(step_time_s, ",.1f", " ms", 1000)),
        ("data wait ", number(record.get("data_wait_pct"), ".0f", " %")),
    ]
    if (speed := record.get("device_flops_per_s")) is not None:
        share = record.get("mfu_pct")
        fields.append(("", flops_text(speed) + ("" if share is None else f", MFU {share:.0f} %")))
    cell, rows = 22, []
    lines = math.ceil(len(fields) / max(1, (width - _LABEL) // cell))
    per_row = math.ceil(len(fields) / lines)
    for first in range(0, len(fields), per_row):
        row = _row("" if first else "train", Text())
        for name, value in fields[first : first + per_row]:
            row.append(name).append(value, "bold").append(" " * (cell - len(name + value)))
        rows.append(row)
    return rows


def _eval_summary(last: Record, best: Record, info: RunInfo) -> str:
    if not last:
        return "n/a"
    both = [
        f"{number(record.get('accuracy'), '.2f', ' %', 100)} "
        f"({number(record.get('correct'), ',.0f')}/{number(record.get('total'), ',.0f')})"
        for record in (last, best)
    ]
    return f"{both[0]}   best {both[1]} in epoch {number(_epoch(best, info), ',.0f')}"


def _curve_row(
    label: str, points: Sequence[float | None], width: int, form: str, unit: str = "", scale: float = 1
) -> Text:
    shown = points[-max(1, width - _LABEL - 22) :]
    known = [scale * point for point in shown if point is not None and math.isfinite(point)]
    if not known:
        return _row(label, _text("n/a"))
    return _row(label, _text(sparkline(shown))).append(f"  {min(known):{form}} to {max(known):{form}}{unit}")


def _device_rows(record: Record, width: int, room: int) -> list[Text]:
    """Returns the rows of the GPUs, else of the processes, in `room` lines, the last summing up the rest."""
    gpus, processes = record.get("gpus") or [], record.get("processes") or []
    rows, draw, what, index, use = (
        (gpus, _gpu_row, "GPU", "index", "utilization_pct")
        if gpus
        else (processes, _process_row, "rank", "rank", "cpu_pct")
    )
    rows = sorted(rows, key=lambda row: (str(row.get("host")), row.get(index) is None, row.get(index)))
    several_hosts = len({row.get("host") for row in rows}) > 1
    labels = [device_label(row, f"{what} {number(row.get(index), 'd')}", several_hosts) for row in rows]
    label_width = max([_LABEL, *(cell_len(label) + 1 for label in labels)])
    columns = max(1, width // _DEVICE_MIN) if len(rows) > room else 1
    column = width // columns
    shown = len(rows) if len(rows) <= room * columns else (room - 1) * columns
    cells = []
    for label, row in zip(labels[:shown], rows[:shown], strict=True):
        cell = _row(label, draw(row, column - label_width - 2 * (columns > 1)), label_width)
        if columns > 1:
            cell.truncate(column, overflow="ellipsis", pad=True)
        cells.append(cell)
    height = math.ceil(shown / columns)  # filled down the first column, then down the next
    lines = [_text("").join(cells[line::height]) for line in range(height)]
    if shown < len(rows):
        hidden = [row[use] for row in rows[shown:] if row.get(use) is not None]
        spread = f"{min(hidden):.0f} to {max(hidden):.0f} %" if hidden else "n/a"
        lines.append(_text(f"+{len(rows) - shown} more, use {spread}"))
    return lines


def device_label(row: Record, name: str, several_hosts: bool) -> str:
    """Returns the name of a row's device, after that of its host where there are several."""
    if not several_hosts:
        return name
    host = str(row.get("host") or "?").partition(".")[0]
    return f"{host if len(host) <= 14 else '…' + host[-13:]} {name}"  # nodes differ in the end of their names


def _gpu_row(row: Record, width: int) -> Text:
    use, used_mib, total_mib = (
        row.get(k) for k in ("utilization_pct", "memory_used_mib", "memory_total_mib")
    )
    memory = number(used_mib, ".1f", "", 1 / 1024) + "/" + number(total_mib, ".1f", " GiB", 1 / 1024)
    after_use = number(use, ".0f", " %", width=7)
    after_memory = (
        f"{memory:>17}{number(row.get('power_w'), '.0f', ' W', width=8)}"
        f"{number(row.get('temperature_c'), '.0f', ' °C', width=8)}"
    )
    wide = width >= 110
    if wide:
        after_memory += _printable(f"   {row.get('name') or 'n/a'}")
    room = width - len(after_use) - cell_len(after_memory) - 3 * wide
    line = _gauge(use and use / 100, room // 2 if wide else room, "green").append(after_use)
    if wide:
        line.append("   ").append_text(
            _gauge(used_mib and total_mib and used_mib / total_mib, room // 2, "cyan")
        )
    return line.append(after_memory)


def _process_row(row: Record, width: int) -> Text:
    memory = number(row.get("memory_used_mib"), ".1f", " GiB", 1 / 1024, 10)
    return _text(f"cpu {number(row.get('cpu_pct'), '.0f', ' %', width=7)} of one core   memory {memory}")
