"""Trains the runs of a sweep on this machine, one after the other or several at a time.

Each run is `disttrain run` in a process of its own, so a crash of one does not affect the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from disttrain.config import Config
from disttrain.errors import StoppedError, UsageError
from disttrain.launch.plan import Processes, plan_processes
from disttrain.lifetime import end_with_parent, received_stops
from disttrain.monitor.nvml import Gpu
from disttrain.monitor.widgets import Frame, gauge, plain
from disttrain.sweep.folder import SweepFolder
from disttrain.sweep.plan import PlannedRun
from disttrain.terminal import Output, is_animated
from disttrain.units import duration, hms

_POLL_S = 0.2
_REDRAW_S = 1.0
_BAR = 24

Say = Callable[[str], None]


class Place(NamedTuple):
    """A part of the machine, for one of the runs at a time.

    Attributes:
        processes: that `disttrain run` starts there.
        environ: variables that give it the GPUs and CPU threads of this part.
    """

    processes: Processes
    environ: dict[str, str]


def share_machine(
    jobs: int,
    *,
    gpus: int | None,
    procs: int | None,
    visible: Sequence[Gpu],
    cores: int,
    environ: Mapping[str, str],
) -> list[Place]:
    """Deals out this machine to several runs at a time. Pure.

    Args:
        jobs: number of runs at a time.
        gpus: of each run; None means an equal share of all.
        procs: CPU processes of each run, instead of GPUs.
        visible: the GPUs of this machine.
        cores: the CPU cores of this machine.
        environ: may have OMP_NUM_THREADS, which stays.

    Raises:
        UsageError: there are not enough GPUs, or the options contradict each other.
    """
    each = 0 if procs is not None else gpus or len(visible) // jobs
    if jobs > 1 and procs is None and visible and not 0 < jobs * each <= len(visible):
        needed = f"{jobs * max(1, each)} GPUs, but this machine has {len(visible)} visible"
        raise UsageError(f"--jobs {jobs} needs {needed}; lower --jobs or --gpus")
    places = []
    for job in range(jobs):
        own = visible[job * each : (job + 1) * each]
        share = max(1, cores // jobs)
        found = plan_processes(gpus=gpus, procs=procs, visible=own, cores=share, environ=environ)
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in own)} if own else {}
        variables["OMP_NUM_THREADS"] = str(found.threads)
        places.append(Place(found, variables if jobs > 1 else {}))  # a single run decides for itself
    return places


def run_arguments(folder: SweepFolder, run: PlannedRun, options: Sequence[str]) -> list[str]:
    """Returns the command of one run, as a user types it."""
    where = ["--run-dir", str(folder.run(run.name).path)]
    return ["disttrain", "run", str(folder.config), *run.overrides, *where, *options]


def exit_code(codes: Sequence[int]) -> int:
    """Returns the exit code of a sweep: that of the first run that failed, else of one that was stopped."""
    return next((code for code in codes if code not in (0, StoppedError.exit_code)), max(codes, default=0))


class _Started(NamedTuple):
    """A run whose process has been started.

    Attributes:
        run: the run.
        config: its config.
        process: `disttrain run`.
        place: where it trains.
        since_s: when it was started, monotonic.
    """

    run: PlannedRun
    config: Config
    process: subprocess.Popen[bytes]
    place: Place
    since_s: float


def train_runs(
    folder: SweepFolder,
    runs: Sequence[tuple[PlannedRun, Config]],
    places: Sequence[Place],
    options: Sequence[str],
    say: Say | None,
) -> tuple[dict[str, int], list[int]]:
    """Trains runs, as many at a time as there are places, and keeps the table up to date.

    After a signal that asks to stop, no run is started, and those that train save and stop. A second signal
    ends them at once. No process is left when this returns.

    Args:
        folder: of the sweep, with its plan.
        runs: to train or to resume.
        places: a part of the machine for each of the runs at a time.
        options: of `disttrain run`.
        say: prints a line on each event; None for silence.

    Returns:
        The exit codes of the runs that have ended, and the signals received.
    """
    waiting, free = deque(runs), deque(places)
    busy: list[_Started] = []
    codes: dict[str, int] = {}
    rows = {run.name: folder.row(run.name) for run in folder.read().runs}
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(received_stops())
        screen = stack.enter_context(_Screen(len(runs), busy, folder, say))
        forwarded = 0
        while busy or (waiting and not signals):
            while waiting and free and not signals:
                busy.append(_start(folder, *waiting.popleft(), free.popleft(), options))
                screen.event(busy[-1].run.name, "started" + _where(busy[-1].place))
            if len(signals) > forwarded:
                forwarded = len(signals)
                screen.event("", f"asked {len(busy)} run{'s' * (len(busy) > 1)} to save and stop")
                for started in busy:  # SIGINT would give a traceback while modules are imported
                    started.process.terminate()
            for started in [each for each in busy if each.process.poll() is not None]:
                busy.remove(started)
                free.append(started.place)
                name = started.run.name
                codes[name] = _code(started.process.returncode, stopping=bool(signals))
                rows[name] = folder.row(name, codes[name])
                folder.write_table(rows)
                screen.event(name, f"{rows[name].outcome}, {duration(time.monotonic() - started.since_s)}")
            screen.draw(codes)
            time.sleep(_POLL_S)
    return codes, signals


def _start(
    folder: SweepFolder, run: PlannedRun, config: Config, place: Place, options: Sequence[str]
) -> _Started:
    """Starts a run in a session of its own, so that Ctrl-C reaches only this process."""
    with folder.log(run.name).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *run_arguments(folder, run, options)],
            env=os.environ | place.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    return _Started(run, config, process, place, time.monotonic())


def _code(status: int, *, stopping: bool) -> int:
    """Returns the exit code of an ended process, as a shell gives it."""
    if stopping and status == -signal.SIGTERM:  # it had not begun
        return StoppedError.exit_code
    return 128 - status if status < 0 else status


def _where(place: Place) -> str:
    if not place.environ or not place.processes.gpus:
        return ""
    return " on GPU " + ", ".join(str(gpu.index) for gpu in place.processes.gpus)


class _Screen:
    """Prints events, and on a terminal draws the runs that train below them."""

    def __init__(self, count: int, busy: Sequence[_Started], folder: SweepFolder, say: Say | None) -> None:
        self._count = count
        self._busy = busy
        self._folder = folder
        self._say = say
        self._due_s = 0.0
        self._live: Live | None = None
        out = Output(sys.stdout)
        if say is not None and is_animated(out):
            console = Console(file=cast(TextIO, out), force_terminal=True)
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, name: str, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S', time.gmtime())}  {name}{': ' * bool(name)}{text}"
        if self._live is not None:
            self._live.console.print(plain(line), soft_wrap=True)
        elif self._say is not None:
            self._say(line)

    def draw(self, codes: Mapping[str, int]) -> None:
        """Draws the runs that train, at most once a second."""
        if self._live is None or time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + _REDRAW_S
        failed = sum(code not in (0, StoppedError.exit_code) for code in codes.values())
        counts = f"{len(codes)} of {self._count} ended, {failed} failed, {len(self._busy)} running"
        lines = [plain(counts, "bold"), *map(self._line, self._busy)]
        self._live.update(Frame(lambda width, height: lines[:height]), refresh=True)

    def _line(self, started: _Started) -> Text:
        """Returns the progress of a run."""
        epoch = self._folder.run(started.run.name).status().get("epoch") or 0
        epochs = started.config.train.epochs
        spent = hms(time.monotonic() - started.since_s)
        text = f"  epoch {epoch:,}/{epochs:,}  {spent}  {started.run.name}"
        return gauge(epoch / epochs, _BAR, "cyan").append_text(plain(text))
