"""Writes the records of a run to files and to the screen: the observer that `train` calls.

Rank 0 writes metrics, status and environment, and drives the console. Every rank writes its own log.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from msgspec import structs

from disttrain.config import Config
from disttrain.errors import StoppedError
from disttrain.files import write_atomically
from disttrain.heartbeat import Phase
from disttrain.monitor.console import Console
from disttrain.monitor.environment import environment, run_info
from disttrain.monitor.gauges import RunGauges, gather_devices
from disttrain.monitor.trackers import Trackers
from disttrain.monitor.verdict import Evidence, Verdict, evidence, judge, places_of
from disttrain.runs.eval_metrics import EVAL_METRICS, result_text
from disttrain.runs.jsonl import JsonLines
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.runs.runfolder import ALL_EPOCHS, RunFolder, utc_now
from disttrain.shards.index import Index
from disttrain.shards.reader import sample_keys
from disttrain.training.autotune import Choice
from disttrain.training.graph import graph_obstacle
from disttrain.training.state import Progress, TrainState

log = logging.getLogger("disttrain")

_STATUS_INTERVAL_S = 1.0
_LIVE_RECORDS = 10  # train records for the verdict on the dashboard
_JUDGED_RECORDS = 1000  # train records for the final verdict


class _Shown(NamedTuple):
    """The outputs of rank 0."""

    metrics: JsonLines
    console: Console
    trackers: Trackers


class RunObserver:
    """Observes one run on one rank; a context manager around the training.

    Every rank must create one, because the devices of all ranks are gathered. `choices` are the automatically
    chosen settings with their reasons; `phase` returns what this rank is doing.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        state: TrainState,
        progress: Progress,
        index: Index,
        choices: dict[str, Choice],
        *,
        verbosity: int,
        phase: Callable[[], Phase] = lambda: Phase.COMPUTE,
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._rank = state.rank
        self._index = index
        self._metric = EVAL_METRICS[config.eval.best]
        self._last_eval: EvalRecord | None = None
        self._status_due_s = 0.0
        self._records: deque[TrainRecord] = deque(maxlen=_JUDGED_RECORDS)
        devices = gather_devices(state.group)
        settings = state.settings
        obstacle = graph_obstacle(config, state.accelerator.device, state.world_size, settings.precision)
        self._setting = Evidence(
            where=places_of([device["host"] for device in devices]),
            cache=choices["cache"].value,
            precision=settings.precision,
            compiled=settings.compiled,
            graph=None if obstacle else state.graph is not None,
            staged=config.data.pipeline is not None,
        )
        self.gauges = RunGauges(devices, state.rank, config.monitor.gpu_interval_s, folder, self.alarm)
        self._files: list[JsonLines] = []
        self._trace: JsonLines | None = None
        if config.train.trace_samples:
            folder.trace(state.rank).parent.mkdir(exist_ok=True)
            self._trace = JsonLines(folder.trace(state.rank))
            self._files.append(self._trace)
        self._shown: _Shown | None = None
        if state.rank == 0:
            metrics = JsonLines(folder.metrics)
            self._files.append(metrics)
            info = run_info(config, folder, state, index, devices, choices)
            document = environment(info, state, index, devices, choices)
            document["forced"] = folder.status().get("forced", [])
            write_atomically(folder.env, json.dumps(document, indent=1) + "\n")
            self._shown = _Shown(
                metrics,
                Console(
                    info,
                    verbosity=verbosity,
                    position=lambda: (progress.step, progress.samples_seen),
                    phase=phase,
                ),
                Trackers(config, folder, progress.step, self.note),
            )
            self._shown.console.recall(folder.metrics)

    def __enter__(self) -> RunObserver:
        self.gauges.start()
        if self._shown is not None:
            self._shown.console.start()
            self._shown.trackers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gauges.stop()
        if self._shown is not None:
            self._shown.trackers.close()
            if isinstance(error, StoppedError):
                self._shown.console.finish(str(error), ok=False)
            self._shown.console.stop()
        for file in self._files:
            file.close()

    def train(self, record: TrainRecord) -> None:
        """Writes and shows a train record; once a second, updates the verdict and status.json."""
        if self._shown is None:
            return
        self._write(record, self._shown)
        self._shown.console.train(record)
        self._records.append(record)
        now = time.monotonic()
        if now >= self._status_due_s:
            self._status_due_s = now + _STATUS_INTERVAL_S
            self._update_status()
            self._judge(_LIVE_RECORDS, self._shown.console)

    def evaluate(self, record: EvalRecord) -> None:
        """Writes and shows an evaluation."""
        if self._shown is None:
            return
        log.info("evaluation: %s", record)
        self._write(record, self._shown)
        self._shown.console.evaluate(record)
        self._last_eval = record
        self._update_status()

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        """Writes the ids of the samples that this rank trains on."""
        if self._trace is not None:
            self._trace.write({"epoch": epoch, "step": step, "ids": list(ids)})

    def bad_batch(self, epoch: int, step: int, ids: Sequence[int]) -> str:
        """Writes the samples of a batch into errors/batch_<step>.json, from rank 0."""
        path = self._folder.bad_batch(step)
        if self._rank == 0:
            document = {"epoch": epoch, "step": step, "ids": list(ids), "keys": sample_keys(self._index, ids)}
            write_atomically(path, json.dumps(document, indent=1) + "\n")
        return str(path)

    def sync(self) -> None:
        """Flushes the files of this rank to disk, before a checkpoint that relies on them."""
        for file in self._files:
            file.sync()

    def saved(self, path: Path, best: bool) -> None:
        """Logs a complete checkpoint."""
        log.info("saved %s%s", path, f", the best {self._metric.title}" if best else "")

    def note(self, text: str) -> None:
        """Shows a message."""
        self._say(logging.INFO, text)

    def alarm(self, text: str) -> None:
        """Shows an error; may be called from any thread."""
        self._say(logging.ERROR, text)

    def finished(self, why: str = ALL_EPOCHS) -> None:
        """Shows the outcome, with the reason if it is not that all epochs are done, and the verdict."""
        log.info("finished")
        if self._shown is None:
            return
        self._shown.trackers.close()  # its messages come before the outcome
        if verdict := self._judge(_JUDGED_RECORDS, self._shown.console, final=True):
            self._folder.update_status(verdict=asdict(verdict))
        result = "no evaluation" if self._last_eval is None else result_text(self._last_eval)
        self._shown.console.finish(f"finished: {result}{'' if why == ALL_EPOCHS else f'; {why}'}", ok=True)

    def _write(self, record: TrainRecord | EvalRecord, shown: _Shown) -> None:
        record = structs.replace(record, time=utc_now())
        shown.metrics.write(record)
        shown.trackers.log(record)

    def _say(self, level: int, text: str) -> None:
        log.log(level, "%s", text)
        if self._shown is not None:
            self._shown.console.note(text)

    def _judge(self, records: int, console: Console, *, final: bool = False) -> Verdict | None:
        """Shows the verdict on the last records, without the first one, which includes the warm-up."""
        found = evidence(list(self._records)[1:][-records:], self._setting)
        if found is None:
            return None
        verdict = judge(found)
        console.verdict(verdict.text, found, final=final)
        return verdict

    def _update_status(self) -> None:
        place = self._progress
        self._folder.update_status(step=place.step, epoch=place.epoch, samples_seen=place.samples_seen)
