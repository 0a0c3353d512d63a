"""The records of a run for other tools: experiment trackers, and a text file for Prometheus.

Everything here runs in the background on rank 0. Each tool has its own thread and queue, so that a slow or
unreachable one delays neither training nor the other tools. metrics.jsonl stays the complete record. If a
tool is too slow, the oldest records are dropped and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from disttrain.config import Config, dump_config, settings, shown
from disttrain.errors import reason
from disttrain.files import write_atomically
from disttrain.monitor.samples import MetricValue, samples
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.runs.runfolder import RunFolder

_MOST_WAITING = 256  # records in a queue
_CLOSE_S = 15.0  # for all tools together to empty their queues at the end of a run


class Sink(Protocol):
    """A tool that receives records. All its methods are called in one thread, and may fail."""

    name: str

    def start(self) -> None:
        """Called once, first."""

    def log(self, record: TrainRecord | EvalRecord) -> None:
        """Takes a record."""

    def finish(self) -> None:
        """Called once, last."""


class Trackers:
    """Feeds the records of a run to every tool of its config. For rank 0.

    Args:
        config: of the run.
        folder: of the run; stores the ids that the tools need to resume the same run.
        step: at which this process starts.
        say: called once for each tool that fails, from any thread.
    """

    def __init__(self, config: Config, folder: RunFolder, step: int, say: Callable[[str], None]) -> None:
        sinks: list[Sink] = [
            Tracker(name, config, folder.path, step) for name in dict.fromkeys(config.monitor.trackers)
        ]
        if config.monitor.prometheus_dir is not None:
            sinks.append(Prometheus(config, folder.path))
        self._feeds = [Feed(sink, say) for sink in sinks]

    def start(self) -> None:
        """Begins; returns at once."""
        for feed in self._feeds:
            feed.start()

    def log(self, record: TrainRecord | EvalRecord) -> None:
        """Queues a record and returns at once. The record must not change afterwards."""
        for feed in self._feeds:
            feed.put(record)

    def close(self) -> None:
        """Waits until the queues are empty, at most _CLOSE_S; safe to call twice."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.end()
        deadline = time.monotonic() + _CLOSE_S
        for feed in feeds:
            feed.join(deadline)


class Feed:
    """A thread that feeds one tool from a queue.

    Args:
        sink: the tool.
        say: called for its first failure, and at the end for dropped records.
        most: length of the queue; the oldest records are dropped.
    """

    def __init__(self, sink: Sink, say: Callable[[str], None], most: int = _MOST_WAITING) -> None:
        self._sink = sink
        self._say = say
        self._waiting: deque[TrainRecord | EvalRecord] = deque(maxlen=most)  # drops its oldest
        self._put = self._taken = 0
        self._failed = False
        self._off = False
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"feed-{sink.name}", daemon=True)

    def start(self) -> None:
        """Begins; the tool itself is started in the thread."""
        self._thread.start()

    def put(self, record: TrainRecord | EvalRecord) -> None:
        """Queues a record; drops the oldest one if the queue is full."""
        with self._changed:
            self._waiting.append(record)
            self._put += 1
            self._changed.notify()

    def end(self) -> None:
        """Lets the thread end when the queue is empty."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Waits for the end, and reports lost records.

        Args:
            deadline: monotonic time in seconds; a tool that needs longer is left alone.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            off, self._off = self._off, True
            lost = self._put - self._taken
        if self._thread.is_alive():
            self._say(f"{self._sink.name}: did not finish in time; abandoned")
        if lost and not off:
            self._say(f"{self._sink.name}: {lost:,} records were not delivered; metrics.jsonl has them all")

    def _run(self) -> None:
        if not self._try(self._sink.start):
            self._off = True
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    break
                record = self._waiting.popleft()
            self._taken += self._try(lambda record=record: self._sink.log(record))  # type: ignore[misc]
        self._try(self._sink.finish)

    def _try(self, call: Callable[[], None]) -> bool:
        """Returns whether a call succeeded; no exception of a tool may end the run."""
        try:
            call()
        except (Exception, SystemExit) as error:
            if not self._failed and not self._off:
                self._failed = True
                what = f"{type(error).__name__}: {reason(error)}"
                self._say(f"{self._sink.name}: failed ({what}); training goes on, metrics.jsonl has it all")
            return False
        return True


class Tracker:
    """An experiment tracker, through Accelerate's class for it.

    Args:
        name: tensorboard, wandb, mlflow or trackio.
        config: of the run; its name is that of the project or experiment.
        folder: the run folder.
        step: at which this process begins.
    """

    def __init__(self, name: str, config: Config, folder: Path, step: int) -> None:
        self.name = name
        self._config = config
        self._folder = folder
        self._step = step
        self._tracker: Any = None
        self._sent_path = folder / f".{name}-sent"
        self._sent: dict[str, int] = {}

    def start(self) -> None:
        """Opens the tracker, with the run that it had in this run folder before if there was one."""
        path = self._folder / f".{self.name}-run"
        known, _, unsettled = path.read_text().partition("\n") if path.exists() else ("", "", "new")
        if not known and self.name in _NEW_ID:
            # Before anything is opened: a process that is killed meanwhile must not leave a second run.
            known = _NEW_ID[self.name](self._folder)
            write_atomically(path, f"{known}\nnew")
        self._tracker, run = _OPEN[self.name](self._config, self._folder, self._step, known or None)
        if run is None:
            return
        if unsettled:
            write_atomically(path, f"{run}\nnew")
            plain = {
                key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                for key, value in settings(self._config).items()
            }
            self._tracker.store_init_configuration(plain)
            write_atomically(path, run)
        self._sent = _steps_sent(self._sent_path, self.name, run)

    def log(self, record: TrainRecord | EvalRecord) -> None:
        """Logs the numbers of a record, unless a process before this one has already logged its step."""
        kind = "train" if isinstance(record, TrainRecord) else "eval"
        if record.step <= self._sent.get(kind, -1):
            return
        values = {sample.name: sample.value for sample in samples(record)}
        if self.name == "wandb":  # its steps cannot go back, but those of a resumed run do
            self._tracker.log({**values, "step": record.step})
        else:
            self._tracker.log(values, step=record.step)
        if self.name in _KEEPS:
            self._sent[kind] = record.step
            write_atomically(self._sent_path, json.dumps(self._sent), durable=False)

    def finish(self) -> None:
        """Closes the tracker."""
        self._tracker.finish()


def _steps_sent(path: Path, name: str, run: str) -> dict[str, int]:
    """Returns the last step that a tracker has of each kind of record; no tracker can remove one again."""
    sent: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        sent = json.loads(path.read_bytes())
    if name == "mlflow":  # what was under way when a process was killed is not in the file
        import mlflow

        last = mlflow.get_run(run).data.metrics
        there = {kind: int(last[f"{kind}/step"]) for kind in ("train", "eval") if f"{kind}/step" in last}
        sent |= {kind: max(step, sent.get(kind, -1)) for kind, step in there.items()}
    return sent


_NEW_ID: dict[str, Callable[[Path], str]] = {
    "wandb": lambda folder: uuid.uuid4().hex[:12],
    "trackio": lambda folder: f"{folder.resolve().name}-{uuid.uuid4().hex[:6]}",  # it finds runs by name
}
"""Makes the id of a new run, where that is not the tracker's own affair."""

_KEEPS = ("wandb", "mlflow", "trackio")
"""The trackers that keep what they have when a run goes back to its last checkpoint."""

# Each opens a tracker and returns it with the id of its run, which is passed as `known` on the next start.


def _open_tensorboard(config: Config, folder: Path, step: int, known: str | None) -> tuple[Any, None]:
    from accelerate.tracking import TensorBoardTracker

    # Purges what an earlier process wrote after its last checkpoint.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    tracker.start()
    # Accelerate's store_init_configuration would create another run for the settings.
    text = dump_config(shown(config)).replace("\n", "\n    ")
    tracker.tracker.add_text("config", f"    {text}")
    return tracker, None


def _open_wandb(config: Config, folder: Path, step: int, known: str | None) -> tuple[Any, str | None]:
    # wandb must not write over the dashboard or prompt for a key; only this variable is read early enough.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", config.name),
        id=known,
        resume="allow",
        name=folder.resolve().name,
        dir=folder,
        settings=wandb.Settings(console="off"),
    )
    tracker.start()
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker, known


def _open_mlflow(config: Config, folder: Path, step: int, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(config.name, run_id=known, run_name=folder.resolve().name)
    tracker.start()
    return tracker, tracker.tracker.info.run_id


def _open_trackio(config: Config, folder: Path, step: int, known: str | None) -> tuple[Any, str | None]:
    from accelerate.tracking import TrackioTracker

    # The records contain the readings of GPUs and CPUs.
    tracker = TrackioTracker(
        config.name, name=known, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    tracker.start()
    return tracker, known


_OPEN: dict[str, Callable[[Config, Path, int, str | None], tuple[Any, str | None]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}


class Prometheus:
    """A file for the textfile collector of node_exporter, with the last record of each kind.

    Removed at the end of the run: Prometheus then ends its series, where a file that stays would show
    GPUs at work for ever. One that a killed run leaves behind shows by node_textfile_mtime_seconds.

    Args:
        config: of the run.
        folder: the run folder.
    """

    name = "prometheus"

    def __init__(self, config: Config, folder: Path) -> None:
        run = str(folder.resolve())
        assert config.monitor.prometheus_dir is not None
        name = f"disttrain_{config.name}_{hashlib.sha256(run.encode()).hexdigest()[:8]}.prom"
        self._path = Path(config.monitor.prometheus_dir) / name
        self._labels = {"experiment": config.name, "run": run}
        self._last: dict[type, list[MetricValue]] = {}

    def start(self) -> None:
        """Does nothing; there is no record yet."""

    def log(self, record: TrainRecord | EvalRecord) -> None:
        """Replaces the file."""
        self._last[type(record)] = list(samples(record))
        every = [sample for last in self._last.values() for sample in last]
        write_atomically(self._path, prometheus_text(every, self._labels, time.time()))

    def finish(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


def prometheus_text(numbers: Iterable[MetricValue], labels: Mapping[str, str], now_s: float) -> str:
    """Returns numbers in the text format of Prometheus, version 0.0.4.

    Args:
        numbers: to show.
        labels: that all of them get besides their place.
        now_s: seconds since 1970.
    """
    metrics: dict[str, tuple[str, list[MetricValue]]] = {}
    for sample in numbers:
        name = re.sub("[^a-zA-Z0-9_]", "_", f"disttrain_{sample.group}_{sample.field}")
        text = f"{sample.group} {sample.field} in the last record of metrics.jsonl"
        metrics.setdefault(name, (text, []))[1].append(sample)
    updated = MetricValue("", {}, "", now_s)
    metrics["disttrain_updated_timestamp_seconds"] = ("time of the last record, since 1970", [updated])
    lines = []
    for name, (text, rows) in metrics.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        for sample in rows:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**labels, **sample.place}.items())
            lines.append(f"{name}{{{pairs}}} {sample.value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
