"""What rank 0 shows of a run: a live dashboard on a terminal, plain lines everywhere else.

It gets the records of the run and one-line notes, and does not depend on torch, NVML or the training loop.
A terminal that fails does not stop the training.
"""

from __future__ import annotations

import math
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from disttrain.monitor.widgets import LABEL, Frame, devices, gauge, plain, row, sparkline
from disttrain.runs.records import EvalRecord, GpuMeans, Process, TrainRecord, mean
from disttrain.terminal import Output, is_animated, printable
from disttrain.units import flops_text, hms, number, percent, utc

_REFRESHES_PER_S = 2  # each holds the GIL for some milliseconds, which delays training
_DEVICE_MIN = 72  # cells of a device's row; with twice as many, rows are side by side
_POINTS_KEPT = 400


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that stay the same, as they are shown."""

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
    """Shows one run; only rank 0 uses it.

    On a terminal it is a dashboard that a thread redraws. Otherwise it prints a line per event, with its UTC
    time. Methods return at once: only the redrawing thread waits for the terminal.

    Args:
        info: the run.
        verbosity: -1 shows only the outcome, 0 is the default, 1 prints a line for every record.
        position: returns the optimizer step and the samples seen in the whole run; called at each redraw.
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
        self._train: TrainRecord | None = None
        self._eval: EvalRecord | None = None
        self._best: EvalRecord | None = None
        self._verdict = ""
        self._curves = {key: deque[float](maxlen=_POINTS_KEPT) for key in ("loss", "accuracy")}
        self._notes: deque[str] = deque(maxlen=3)
        self._started_s = clock()
        self._origin: tuple[float, int] | None = None  # time and samples from which the speed is measured
        self._last_line_s = -math.inf
        self._live: Live | None = None
        if verbosity >= 0 and is_animated(self._out):
            self._live = Live(
                console=RichConsole(file=cast(TextIO, self._out), force_terminal=True),
                get_renderable=self.render,
                refresh_per_second=_REFRESHES_PER_S,
                vertical_overflow="crop",
                redirect_stdout=stream is sys.stdout,
                redirect_stderr=sys.stderr.isatty(),  # a redirected stderr keeps its file
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

    def train(self, record: TrainRecord) -> None:
        """Shows a log point."""
        with self._lock:
            self._train = record
            for key, points in self._curves.items():
                points.append(getattr(record, key))
        now = self._clock()
        if self._verbosity >= 1 or now - self._last_line_s >= self._line_interval_s:
            self._last_line_s = now
            self._line(train_line(record, self._info))

    def evaluate(self, record: EvalRecord) -> None:
        """Shows an evaluation."""
        with self._lock:
            self._eval = record
            if self._best is None or record.accuracy >= self._best.accuracy:
                self._best = record
        self._line(eval_line(record, self._info))

    def verdict(self, text: str) -> None:
        """Shows the current verdict; only the dashboard does."""
        with self._lock:
            self._verdict = text

    def note(self, text: str) -> None:
        """Shows a message, such as that a checkpoint was saved."""
        with self._lock:
            self._notes.append(f"{_time_of_day()}  {text}")
        self._line(text)

    def finish(self, text: str, ok: bool) -> None:
        """Shows how the run ended, below the last frame."""
        live = self._live
        self.stop()
        if live is None:
            self._out.write_line(text if self._verbosity < 0 else f"{_time_of_day()}  {text}")
        else:
            live.console.print(plain(text, "bold green" if ok else "bold red"), soft_wrap=True)

    def stop(self) -> None:
        """Restores the terminal and leaves the last frame on it; safe to call twice."""
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
        """Returns the current dashboard, which adapts to the size of the terminal."""
        return Frame(self._frame)

    def _line(self, text: str) -> None:
        if self._live is None and self._verbosity >= 0:
            self._out.write_line(f"{_time_of_day()}  {text}")

    def _frame(self, width: int, height: int) -> list[Text]:
        """Returns the lines of the dashboard, at most `height`; rich crops what is wider than `width`."""
        with self._lock:
            train, evaluation, best = self._train, self._eval, self._best
            curves = {key: list(points) for key, points in self._curves.items()}
            notes, verdict = list(self._notes), self._verdict
        elapsed = f"elapsed {hms(self._clock() - self._started_s)}"
        title = plain(f"disttrain  {self._info.name}", "bold")
        title.truncate(max(0, width - len(elapsed) - 2), overflow="ellipsis", pad=True)
        rule = plain("─" * width, "bright_black")
        verdict_lines = textwrap.wrap(verdict, max(20, width - LABEL))
        top = [
            Text.assemble(title, "  ", elapsed),
            *(row(label, text) for label, text in _facts(self._info)),
            rule,
            *self._progress(train, width),
            *_train_rows(train, width),
            row("eval", _eval_summary(evaluation, best)),
            _curve_row("loss", curves["loss"], width, ".4f"),
            _curve_row("accuracy", curves["accuracy"], width, ".2f", " %", 100),
            *(row("" if i else "verdict", part) for i, part in enumerate(verdict_lines)),
        ]
        bottom = [row("" if i else "notes", note) for i, note in enumerate(notes)]
        room = height - len(top) - 1 - len(bottom)
        middle = _device_rows(train, width, max(1, room))
        return [*top, *([rule, *middle] if middle else []), *bottom][:height]

    def _progress(self, train: TrainRecord | None, width: int) -> list[Text]:
        info, now = self._info, self._clock()
        step, samples = self._position()
        if self._origin is None or samples <= self._origin[1]:  # excludes startup from the speed
            self._origin = (now, samples)
        whole = max(1, info.epochs * info.samples_per_epoch)
        epoch = min(info.epochs, max(1, math.ceil(samples / max(1, info.samples_per_epoch))))
        in_epoch = samples - (epoch - 1) * info.samples_per_epoch
        pace = (samples - self._origin[1]) / (now - self._origin[0]) if now > self._origin[0] else None
        speed = train.images_per_s if train else None
        bars = (
            ("epoch", in_epoch / max(1, info.samples_per_epoch), f"{epoch:,}/{info.epochs:,}",
             eta(info.samples_per_epoch - in_epoch, speed)),
            ("total", samples / whole, f"step {step:,}/{info.epochs * info.steps_per_epoch:,}",
             eta(whole - samples, pace or speed)),
        )  # fmt: skip
        places = max(len(count) for _, _, count, _ in bars)
        longest = max(8, *(len(left) for *_, left in bars))
        rows = []
        for label, share, count, left in bars:
            after = f"  {int(100 * min(1.0, share)):3d} %  {count:>{places}}  ETA {left:>{longest}}"
            rows.append(row(label, gauge(share, width - LABEL - len(after), "cyan")).append(after))
        return rows


def eta(samples: float, samples_per_s: float | None) -> str:
    """Returns the time that the remaining samples take; n/a while the speed is unknown."""
    if not samples_per_s or not math.isfinite(samples_per_s):
        return "n/a"
    return hms(max(0.0, samples) / samples_per_s)


def train_line(record: TrainRecord, info: RunInfo) -> str:
    """Returns the line of a train record, aligned with the other lines of the run."""
    name, busy = "cpu", mean(process.cpu_pct for process in record.processes or ())
    if record.gpus:
        name, busy = "gpu", mean(gpu.utilization_pct for gpu in record.gpus)
    return (
        f"{_result(record, info)}  lr {record.lr:7.1e}"
        f"  {number(record.images_per_s, ',.0f', ' images/s'):>18}"
        f"  wait {number(record.data_wait_pct, '.0f', ' %'):>5}  {name} {number(busy, '.0f', ' %'):>5}"
    )


def eval_line(record: EvalRecord, info: RunInfo) -> str:
    """Returns the line of an eval record."""
    return f"{_result(record, info)}  eval: {record.correct:,d} of {record.total:,d} correct"


def _result(record: TrainRecord | EvalRecord, info: RunInfo) -> str:
    """Returns the common start of the lines: epoch, step, loss and accuracy."""
    epochs, steps = f"{info.epochs:,}", f"{info.epochs * info.steps_per_epoch:,}"
    return (
        f"epoch {record.epoch:>{len(epochs)},d}/{epochs}  step {record.step:>{len(steps)},d}/{steps}"
        f"  loss {number(record.loss, '.4f'):>7}  acc {percent(record.accuracy):>8}"
    )


def _facts(info: RunInfo) -> list[tuple[str, str]]:
    model = f"{info.model}, {info.parameters:,} parameters, {info.precision}, {info.devices}"
    return [("model", model), ("data", f"{info.data}, batch {info.batch_size:,}"), ("run", info.run_dir)]


def _time_of_day() -> str:
    return utc().split()[1]


def _train_rows(record: TrainRecord | None, width: int) -> list[Text]:
    fields = [
        ("loss ", number(getattr(record, "loss", None), ".4f")),
        ("accuracy ", percent(getattr(record, "accuracy", None))),
        ("lr ", number(getattr(record, "lr", None), ".1e")),
        ("", number(getattr(record, "images_per_s", None), ",.0f", " images/s")),
        ("step ", number(getattr(record, "step_time_s", None), ",.1f", " ms", 1000)),
        ("data wait ", number(getattr(record, "data_wait_pct", None), ".0f", " %")),
    ]
    if record is not None and record.device_flops_per_s is not None:
        share = "" if record.mfu_pct is None else f", MFU {record.mfu_pct:.0f} %"
        fields.append(("", flops_text(record.device_flops_per_s) + share))
    cell, rows = 22, []
    lines = math.ceil(len(fields) / max(1, (width - LABEL) // cell))
    per_row = math.ceil(len(fields) / lines)
    for first in range(0, len(fields), per_row):
        line = row("" if first else "train", "")
        for name, value in fields[first : first + per_row]:
            line.append(name).append(value, "bold").append(" " * (cell - len(name + value)))
        rows.append(line)
    return rows


def _eval_summary(last: EvalRecord | None, best: EvalRecord | None) -> str:
    if last is None or best is None:
        return "n/a"
    both = [f"{percent(one.accuracy)} ({one.correct:,d}/{one.total:,d})" for one in (last, best)]
    return f"{both[0]}   best {both[1]} in epoch {best.epoch:,d}"


def _curve_row(
    label: str, points: Sequence[float], width: int, form: str, unit: str = "", scale: float = 1
) -> Text:
    shown = points[-max(1, width - LABEL - 22) :]
    known = [scale * point for point in shown if math.isfinite(point)]
    if not known:
        return row(label, "n/a")
    return row(label, f"{sparkline(shown)}  {min(known):{form}} to {max(known):{form}}{unit}")


def _device_rows(record: TrainRecord | None, width: int, room: int) -> list[Text]:
    """Returns the rows of the GPUs or processes in `room` lines; the last one sums up the rest."""
    if record is None:
        return []
    draw: Callable[[Any, int], Text] = _gpu_row if record.gpus else _process_row
    found = devices(record.gpus or (), record.processes or ())
    count = len(found.rows)
    label_width = max([LABEL, *(cell_len(label) + 1 for label in found.labels)])
    columns = max(1, width // _DEVICE_MIN) if count > room else 1
    column = width // columns
    shown = count if count <= room * columns else (room - 1) * columns
    cells = []
    for label, device in zip(found.labels[:shown], found.rows[:shown], strict=True):
        cell = row(label, draw(device, column - label_width - 2 * (columns > 1)), label_width)
        if columns > 1:
            cell.truncate(column, overflow="ellipsis", pad=True)
        cells.append(cell)
    height = math.ceil(shown / columns)  # filled down the first column, then down the next
    lines = [plain("").join(cells[line::height]) for line in range(height)]
    return lines if shown == count else [*lines, plain(found.folded(shown))]


def _gpu_row(gpu: GpuMeans, width: int) -> Text:
    use, used_mib, total_mib = gpu.utilization_pct, gpu.memory_used_mib, gpu.memory_total_mib
    memory = f"{number(used_mib, '.1f', '', 1 / 1024)}/{number(total_mib, '.1f', ' GiB', 1 / 1024)}"
    memory += " shared" if gpu.memory_shared else ""
    after_use = f"{number(use, '.0f', ' %'):>7}"
    after_memory = (
        f"{memory:>17}{number(gpu.power_w, '.0f', ' W'):>8}{number(gpu.temperature_c, '.0f', ' °C'):>8}"
    )
    wide = width >= 110
    if wide:
        after_memory += printable(f"   {gpu.name or 'n/a'}")
    room = width - len(after_use) - cell_len(after_memory) - 3 * wide
    line = gauge(use and use / 100, room // 2 if wide else room, "green").append(after_use)
    if wide:
        share = used_mib and total_mib and used_mib / total_mib
        line.append("   ").append_text(gauge(share, room // 2, "cyan"))
    return line.append(after_memory)


def _process_row(process: Process, width: int) -> Text:
    use = number(process.cpu_pct, ".0f", " %")
    memory = number(process.memory_used_mib, ".1f", " GiB", 1 / 1024)
    return plain(f"cpu {use:>7} of one core   memory {memory:>10}")
