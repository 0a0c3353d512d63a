"""What rank 0 shows of a run: a live dashboard on a terminal, plain lines everywhere else.

It gets the records of the run and one-line notes, and does not depend on torch, NVML or the training loop.
A terminal that fails does not stop the training.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from disttrain.heartbeat import Phase
from disttrain.monitor.dashboard import Dashboard, RunInfo
from disttrain.monitor.verdict import Evidence
from disttrain.monitor.widgets import Frame, plain
from disttrain.runs.records import EvalRecord, TrainRecord, mean, thinned
from disttrain.terminal import Output, is_animated
from disttrain.units import number, percent, utc

_REFRESHES_PER_S = 2  # each holds the GIL for some milliseconds, which delays training
_OUTCOME_LINES = 3  # below the last frame, with what the launcher says


class Console:
    """Shows one run; only rank 0 uses it.

    On a terminal it is a dashboard that a thread redraws. Otherwise it prints a line per event, with its UTC
    time. Methods return at once: only the redrawing thread waits for the terminal.

    Args:
        info: the run.
        verbosity: -1 shows only the outcome, 0 is the default, 1 prints a line for every record.
        position: returns the optimizer step and the samples seen in the whole run; called at each redraw.
        phase: returns what this rank is doing; called at each redraw.
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
        phase: Callable[[], Phase] = lambda: Phase.COMPUTE,
        stream: TextIO | None = None,
        line_interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self._info = info
        self._verbosity = verbosity
        self._position = position
        self._phase = phase
        self._line_interval_s = line_interval_s
        self._clock = clock
        self._out = Output(stream)
        self._dashboard = Dashboard(info)
        self._frame = Frame(self._draw)
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
        if self._live is not None:
            self._dashboard.add(record)
        now = self._clock()
        if self._verbosity >= 1 or now - self._last_line_s >= self._line_interval_s:
            self._last_line_s = now
            self._line(train_line(record, self._info))

    def evaluate(self, record: EvalRecord) -> None:
        """Shows an evaluation."""
        if self._live is not None:
            self._dashboard.add(record)
        self._line(eval_line(record, self._info))

    def recall(self, path: Path) -> None:
        """Adds what metrics.jsonl has of earlier starts of the run to the dashboard."""
        if self._live is not None:
            for record in thinned(path):
                self._dashboard.add(record)
            self._dashboard.train = None  # nothing of it is true now

    def verdict(self, text: str, evidence: Evidence, *, final: bool = False) -> None:
        """Shows the current verdict on the dashboard, and the final one everywhere."""
        self._dashboard.verdict, self._dashboard.evidence = text, evidence
        if final:
            self._line(f"verdict: {text}")

    def note(self, text: str) -> None:
        """Shows a message, such as that a checkpoint was saved."""
        self._dashboard.notes.append(f"{_time_of_day()}  {text}")
        self._line(text)

    def finish(self, text: str, ok: bool) -> None:
        """Shows how the run ended, below the last frame."""
        self.stop("finished" if ok else "stopped")
        where = f"run folder {self._info.run_dir}"
        if self._live is None:
            text = f"{text}, {where}" if ok else text
            self._out.write_line(text if self._verbosity < 0 else f"{_time_of_day()}  {text}")
        else:  # the path has its own line, so that it can be copied
            self._live.console.print(plain(text, "bold green" if ok else "bold red"), soft_wrap=True)
            self._live.console.print(plain(where), soft_wrap=True)

    def stop(self, outcome: str = "failed") -> None:
        """Restores the terminal. The last frame, which stays on it, says how the run ended."""
        if self._live is not None and not self._dashboard.outcome:
            self._dashboard.outcome = outcome
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
        return self._frame

    def _line(self, text: str) -> None:
        if self._live is None and self._verbosity >= 0:
            self._out.write_line(f"{_time_of_day()}  {text}")

    def _draw(self, width: int, height: int) -> list[Text]:
        now_s = self._clock()
        step, samples = self._position()
        if self._origin is None or samples <= self._origin[1]:  # excludes startup from the speed
            self._origin = (now_s, samples)
        since_s, before = self._origin
        shown = self._dashboard
        shown.step, shown.samples, shown.elapsed_s = step, samples, now_s - self._started_s
        shown.pace = (samples - before) / (now_s - since_s) if now_s > since_s else None
        shown.state = _STATES.get(self._phase(), "training")
        return shown.lines(width, height - _OUTCOME_LINES * bool(shown.outcome))


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
    f1 = "" if record.macro_f1 is None else f", macro F1 {percent(record.macro_f1)}"
    first = "" if record.map is None else f"mAP {percent(record.map)}, "
    return f"{_result(record, info)}  eval: {first}{record.correct:,d} of {record.total:,d} correct{f1}"


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


_STATES = {
    Phase.START: "starting",
    Phase.EVALUATE: "evaluating",
    Phase.SAVE: "saving",
    Phase.END: "finishing",
}
