"""The frames of the dashboard of a run: what is shown where, for every size of terminal.

What changes comes first. A low terminal shows neither graphs nor the facts that stay the same.
"""

from __future__ import annotations

import math
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from disttrain.monitor.device_table import Devices, devices, table
from disttrain.monitor.history import History, blocks, dots, limits, row_of
from disttrain.monitor.verdict import Evidence
from disttrain.monitor.widgets import LABEL, gauge, plain, row, rule, side_by_side
from disttrain.runs.eval_metrics import EVAL_METRICS, best_of
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.units import flops_text, hms, number, percent, utc

_LOW, _HIGH = 18, 29  # lines below which there are no graphs, and from which there are facts
_GRAPH_MIN = 5  # lines of the graphs, with their title
_PANEL_MIN, _GAP = 34, 2  # cells of a graph, and between two
_MARK, _MARK_CELLS = "•", 4  # an evaluation; at most one in so many cells


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
    best: str = "accuracy"
    """The metric of the best evaluation: `eval.best`."""


@dataclass(frozen=True)
class _Panel:
    """A quantity that has a graph."""

    key: str
    name: str
    text: Callable[[float | None], str]
    label: Callable[[float], str]
    """On the axis."""
    from_zero: bool = False


def _images(per_s: float | None) -> str:
    return number(per_s, ",.0f")


_PANELS = [
    _Panel("loss", "loss", lambda value: number(value, ".4f"), lambda value: f"{value:.3g}"),
    _Panel("accuracy", "accuracy", percent, lambda value: percent(value, 0)),
    _Panel("images_per_s", "images/s", _images, _images, from_zero=True),
]
_STATE_STYLES = {"finished": "bold green", "failed": "bold red", "stopped": "bold red"}
_PARTS = {"input": ("░", "yellow"), "computing": ("█", "green"), "communication": ("▒", "magenta")}


@dataclass
class Dashboard:
    """Draws the frames of one run, from any thread. Whoever has news sets the fields, from any other.

    Attributes:
        info: the run.
        state: what the run is doing.
        outcome: how it ended, in a word; empty before the last frame.
        elapsed_s: since the console started.
        step: optimizer steps taken.
        samples: trained on in the whole run.
        pace: samples a second since training began, with its pauses; None if not known.
        train: the last log point.
        eval: the last evaluation.
        best: the best one.
        verdict: on the speed.
        evidence: of the verdict. The speed that is shown is that of its log points.
        notes: the last messages.
    """

    info: RunInfo
    state: str = "starting"
    outcome: str = ""
    elapsed_s: float = 0.0
    step: int = 0
    samples: int = 0
    pace: float | None = None
    train: TrainRecord | None = None
    eval: EvalRecord | None = None
    best: EvalRecord | None = None
    verdict: str = ""
    evidence: Evidence | None = None
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    def __post_init__(self) -> None:
        self._metric = EVAL_METRICS[self.info.best]
        self._lock = threading.Lock()
        self._new: deque[TrainRecord | EvalRecord] = deque()  # the history does not have these yet
        self._history, self._evals = History(), History()
        self._log_points = 0
        self._trained_s = 0.0
        self._kept: dict[object, tuple[object, Any]] = {}

    def add(self, record: TrainRecord | EvalRecord) -> None:
        """Takes a record. The next frame does the rest, so that this costs the training next to nothing."""
        if isinstance(record, EvalRecord):
            self.eval = record
            self.best = best_of([record] if self.best is None else [self.best, record], self._metric)
        else:
            self.train = record
        self._new.append(record)

    def lines(self, width: int, height: int) -> list[Text]:
        """Returns the lines of a frame, at most `height`; the caller cuts what is wider than `width`."""
        with self._lock:
            self._learn()
            return self._lines(width, height)[:height]

    def _learn(self) -> None:
        while self._new:
            record = self._new.popleft()
            if isinstance(record, EvalRecord):
                self._evals.add(record.step, {"loss": record.loss, "accuracy": record.accuracy})
                continue
            self._log_points += 1
            steps = record.step - (self._history.steps[-1] if self._history.steps else 0)
            self._trained_s += max(0, steps) * record.step_time_s
            values: dict[str, float | None] = {panel.key: getattr(record, panel.key) for panel in _PANELS}
            found = devices(record.gpus or (), record.processes or ())
            values.update(zip(found.keys, found.uses(), strict=True))
            self._history.add(record.step, values)

    def _lines(self, width: int, height: int) -> list[Text]:
        low = height < _LOW
        train = self.train
        found = None if train is None else devices(train.gpus or (), train.processes or ())
        said = list(self.notes)[-1 if low else -3 :]
        notes = [row("" if i else "notes", note) for i, note in enumerate(said)]
        head = [
            self._title(width),
            *(map(plain, self._facts()) if height >= _HIGH else ()),
            *self._progress(width),
        ]
        speed = [
            *self._speed_row(width),
            *([row("eval", self._eval_summary(width))] if self.eval else []),
            *self._verdict_rows(width, low),
        ]
        panels = [] if low or not self._history.steps else _PANELS[: max(1, width // _PANEL_MIN)]
        numbers = self._numbers(width, panels)
        room = height - len(head) - len(numbers) - len(speed) - len(notes)
        if panels and room < _GRAPH_MIN + 3:
            panels, numbers = [], self._numbers(width, [])
            room = height - len(head) - len(numbers) - len(speed) - len(notes)
        body: list[Text] = []
        if found is not None and found.rows:
            graph = max(_GRAPH_MIN, room // 3) if panels else 0
            body = [] if low else [rule(self.info.devices, width)]
            body += self._table(found, width, max(1, room - graph - len(body)))
        graphs = self._graphs(panels, width, room - len(body)) if panels else []
        return [*head, *numbers, *speed, *graphs, *body, *notes]

    def _cached(self, key: object, stamp: object, make: Callable[[], Any]) -> Any:
        """Returns what was made for a key, made anew if the stamp differs."""
        if key not in self._kept or self._kept[key][0] != stamp:
            self._kept[key] = (stamp, make())
        return self._kept[key][1]

    def _stamp(self) -> object:
        """Returns what changes when the curves are to be drawn anew: at every 2 % more steps."""
        return int(50 * math.log(self._history.steps[-1])), len(self._evals.steps), self.outcome

    def _title(self, width: int) -> Text:
        state = self.outcome or self.state
        clock = f"elapsed {hms(self.elapsed_s)}"
        if width >= 64:
            clock = f"{utc().split(maxsplit=1)[1]}   {clock}"
        left = Text.assemble(plain(f"disttrain  {self.info.name}" if width >= 64 else self.info.name, "bold"))
        left.truncate(max(0, width - len(clock) - len(state) - 4), overflow="ellipsis")
        left.append("  ").append(state, _STATE_STYLES.get(state, "cyan"))
        return left.append(" " * max(2, width - left.cell_len - len(clock))).append(clock)

    def _facts(self) -> list[str]:
        info = self.info
        return [
            f"{info.model}, {info.parameters:,} parameters, {info.precision}, batch {info.batch_size:,}",
            info.data,
            *([] if self.outcome else [info.run_dir]),  # the outcome names it
        ]

    def _progress(self, width: int) -> list[Text]:
        info, samples = self.info, self.samples
        whole = max(1, info.epochs * info.samples_per_epoch)
        epoch = min(info.epochs, max(1, math.ceil(samples / max(1, info.samples_per_epoch))))
        in_epoch = samples - (epoch - 1) * info.samples_per_epoch
        narrow = width < 64
        speed = self.train.images_per_s if self.train else None
        bars = (
            ("epoch", in_epoch / max(1, info.samples_per_epoch), f"{epoch:,}/{info.epochs:,}",
             eta(info.samples_per_epoch - in_epoch, speed)),
            ("step" if narrow else "total", samples / whole,
             f"{'' if narrow else 'step '}{self.step:,}/{info.epochs * info.steps_per_epoch:,}",
             eta(whole - samples, self.pace or speed)),
        )  # fmt: skip
        places = max(len(count) for _, _, count, _ in bars)
        longest = max(8, *(len(left) for *_, left in bars))
        rows = []
        for label, share, count, left in bars:
            done = "" if narrow else f"  {int(100 * min(1.0, share)):3d} %"
            after = f"{done}  {count:>{places}}  ETA {left:>{longest}}"
            label_width = 6 if narrow else LABEL
            bar = gauge(share, width - label_width - len(after), "cyan")
            rows.append(row(label, bar, label_width).append(after))
        return rows

    def _numbers(self, width: int, panels: Sequence[_Panel]) -> list[Text]:
        """Returns the numbers of the last log point, but for those that stand above a graph."""
        record = self.train
        if record is None:
            return []
        numbers = [(panel.name, panel.text(self._value(panel))) for panel in _PANELS if panel not in panels]
        numbers.append(("lr", f"{record.lr:.1e}"))
        if record.grad_norm is not None:
            numbers.append(("gradient norm", f"{record.grad_norm:.3g}"))
        if record.device_flops_per_s is not None:
            numbers.append(("", flops_text(record.device_flops_per_s)))
        if record.mfu_pct is not None:
            mfu_pct = self.evidence and self.evidence.peak_pct
            numbers.append(("MFU", f"{mfu_pct or record.mfu_pct:.0f} %"))
        cell, indent = (max(1, width // 2), 0) if width < 64 else (22, LABEL)
        across = max(1, (width - indent) // cell)
        if width < 64:
            numbers = numbers[: 2 * across]
        rows = []
        for first in range(0, len(numbers), across):
            line = row("" if first else "train", "", indent)
            for name, value in numbers[first : first + across]:
                line.append(f"{name} ".lstrip()).append(value, "bold")
                line.append(" " * (cell - len(name + value) - bool(name)))
            rows.append(line)
        return rows

    def _value(self, panel: _Panel) -> float | None:
        """Returns the last value of a quantity; a speed is that of the verdict, which is calmer."""
        if panel.key == "images_per_s" and self.evidence is not None and self.evidence.step_s > 0:
            return self.info.batch_size / self.evidence.step_s
        return getattr(self.train, panel.key, None)

    def _table(self, found: Devices, width: int, room: int) -> list[Text]:
        stamp = self._stamp()

        def trace(key: str, count: int) -> str:
            text: str = self._cached(
                key, (stamp, count), lambda: blocks(self._history.columns(key, count), high=100.0)
            )
            return text

        lines: list[Text] = self._cached(
            "table", (self._log_points, stamp, width, room), lambda: table(found, width, room, trace)
        )
        return lines

    def _graphs(self, panels: Sequence[_Panel], width: int, height: int) -> list[Text]:
        """Returns the graphs side by side, below a line with their span."""
        title = f"{self._history.steps[-1]:,} steps, {hms(self._trained_s)} of training, smoothed"
        panel_width = (width + _GAP) // len(panels) - _GAP
        heads = []
        for panel in panels:
            head = Text.assemble((panel.name, "bold"), " ", (panel.text(self._value(panel)), "bold cyan"))
            if self._evals.points(panel.key):
                head.append(f"  {_MARK} eval", "magenta")
            heads.append(head)

        def draw() -> list[Text]:
            curves = [self._graph(panel, panel_width, height - 2) for panel in panels]
            return [side_by_side(cells, panel_width, _GAP) for cells in zip(*curves, strict=True)]

        stamp = (self._stamp(), panel_width, height)
        return [
            rule(title, width),
            side_by_side(heads, panel_width, _GAP),
            *self._cached("graphs", stamp, draw),
        ]

    def _graph(self, panel: _Panel, width: int, height: int) -> list[Text]:
        """Returns the curve of a quantity, with its axis and the evaluations."""
        marks = self._evals.points(panel.key)
        axis = limits([*self._history.smooth(panel.key, 2 * width), *(value for _, value in marks)])
        if axis is None:
            return [plain("n/a" if line == 0 else "") for line in range(height)]
        low, high = (0.0, axis[1]) if panel.from_zero else axis
        labels = {0: panel.label(high), height - 1: panel.label(low)}
        edge = max(map(len, labels.values()))
        across = max(1, width - edge - 1)
        cells = dots(self._history.smooth(panel.key, 2 * across), height, low, high)
        shown: dict[int, tuple[int, int]] = {}  # the last evaluation of every few columns
        for step, value in marks:
            column = min(across - 1, int(step / self._history.steps[-1] * across))
            shown[(across - 1 - column) // _MARK_CELLS] = (row_of(value, height, low, high), column)
        for line, column in shown.values():
            cells[line][column] = _MARK
        lines = []
        for line, characters in enumerate(cells):
            text = Text.assemble(
                (f"{labels.get(line, ''):>{edge}}│", "bright_black"), ("".join(characters), "cyan")
            )
            for marked, column in shown.values():
                if marked == line:
                    text.stylize("bold magenta", edge + 1 + column, edge + 2 + column)
            lines.append(text)
        return lines

    def _speed_row(self, width: int) -> list[Text]:
        """Returns the time of a step and its parts, in the words and numbers of the verdict."""
        if self.train is None:
            return []
        found = self.evidence
        if found is None or found.step_s <= 0:
            return [row("step", f"{1000 * self.train.step_time_s:,.1f} ms")]
        shares = {"input": found.input_s, "computing": 0.0, "communication": found.communication_s}
        shares["computing"] = max(0.0, found.step_s - sum(shares.values()))
        line = row("step", f"{1000 * found.step_s:,.1f} ms")
        for name, seconds in shares.items():
            text = f"   {_PARTS[name][0]} {name} {100 * seconds / found.step_s:.0f} %"
            if line.cell_len + len(text) <= width:
                line.append(text, _PARTS[name][1])
        room = min(60, width - line.cell_len - 3)
        if room >= 10:
            line.append("   ")
            for name, seconds in shares.items():
                line.append(_PARTS[name][0] * round(room * seconds / found.step_s), _PARTS[name][1])
        return [line]

    def _eval_summary(self, width: int) -> str:
        last, best = self.eval, self.best
        if last is None:
            return "n/a"
        narrow, metric = width < 64, self._metric

        def text(one: EvalRecord) -> str:
            return percent(one.accuracy) + ("" if narrow else f" ({one.correct:,d}/{one.total:,d})")

        if best is None:
            return text(last)
        then = text(best)
        if metric.key != "accuracy":
            then = f"{metric.title} {metric.text(metric.of(best))}"
        return (
            f"{text(last)}  best {then}" if narrow else f"{text(last)}   best {then} in epoch {best.epoch:,d}"
        )

    def _verdict_rows(self, width: int, low: bool) -> list[Text]:
        parts = textwrap.wrap(self.verdict, max(20, width - LABEL))
        if low and parts:
            parts = [self.verdict]  # cut at its end
        return [row("" if i else "verdict", part) for i, part in enumerate(parts)]


def eta(samples: float, samples_per_s: float | None) -> str:
    """Returns the time that the remaining samples take; n/a while the speed is unknown."""
    if not samples_per_s or not math.isfinite(samples_per_s):
        return "n/a"
    return hms(max(0.0, samples) / samples_per_s)
