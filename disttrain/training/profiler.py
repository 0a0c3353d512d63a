"""Profiles a few steps of this rank with torch.profiler (`--profile`), on the beats of the phases.

The phases of a step are spans in the trace. Without `--profile`, nothing of this is made or called.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from disttrain.errors import DisttrainError, StoppedError, reason
from disttrain.files import write_atomically
from disttrain.heartbeat import Phase
from disttrain.training.phases import PHASE_NAMES

_SKIPPED_STEPS = 10  # of this process: libraries are loaded, kernels chosen and graphs captured in them
_WARM_UP_STEPS = 2  # with a running profiler, whose first events are late
_STEPS = 5
_OPERATORS = 10
_ALLOCATIONS = 100_000  # the newest ones that the memory snapshot has


class Profiler:
    """Profiles steps of one rank; a context manager around the training.

    Args:
        beat: the heartbeat, called with each phase, step and part that begins.
        folder: for the trace, the memory snapshot and, of rank 0, operators.json.
        rank: of this process.
        device: where the rank computes.
        say: called with what was written, or why nothing was.
    """

    def __init__(
        self,
        beat: Callable[[Phase, int, int], None],
        folder: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._beat = beat
        self._folder = folder
        self._rank = rank
        self._on_gpu = device.type == "cuda"
        self._say = say
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile: profile | None = profile(activities=activities)
        self._begun = 0  # steps of this process
        self._step = 0  # the last of them
        self._first = 0  # the first recorded one; 0 before it
        self._spans: list[record_function] = []

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None or not (error is None or isinstance(error, StoppedError)):
            return  # after a failure, waiting for the device could fail again or never end
        if self._first:
            self._finish(self._profile)
        else:
            left_out = _SKIPPED_STEPS + _WARM_UP_STEPS
            self._say(f"profile: empty, because it leaves out the first {left_out} steps and none came after")

    def beat(self, phase: Phase, step: int, part: int) -> None:
        """Beats the heartbeat; starts and ends the profile, and marks the phases while it runs."""
        self._beat(phase, step, part)
        if self._profile is None:
            return
        begins = phase is Phase.DATA and step != self._step
        self._close(0 if begins else 1)
        if begins:
            self._begin_step(self._profile, step, self._begun - _SKIPPED_STEPS)
        if self._spans and phase in PHASE_NAMES:  # within a recorded step
            self._open(PHASE_NAMES[phase])

    def _begin_step(self, running: profile, step: int, number: int) -> None:
        if number == _WARM_UP_STEPS + _STEPS:
            self._finish(running)
            return
        self._step = step
        self._begun += 1
        if number == 0:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
            running.prepare_trace()
        elif number == _WARM_UP_STEPS:
            running.start_trace()
            self._first = step
        if self._first:
            self._open(f"step {step}")

    def _open(self, name: str) -> None:
        self._spans.append(record_function(name))
        self._spans[-1].__enter__()

    def _close(self, left: int) -> None:
        """Ends the innermost spans until `left` are open: that of the step contains those of its phases."""
        while len(self._spans) > left:
            self._spans.pop().__exit__(None, None, None)

    def _finish(self, running: profile) -> None:
        """Ends the profile and writes what it has seen. A failure to write does not end the run."""
        self._profile = None
        self._close(0)
        running.stop_trace()
        trace = self._folder / f"rank_{self._rank:05d}.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(trace))
            if self._on_gpu:
                snapshot = trace.with_name(f"rank_{self._rank:05d}.memory.pickle")
                torch.cuda.memory._dump_snapshot(str(snapshot))
            if self._rank == 0:
                document = {"steps": [self._first, self._step]} | costliest(running.key_averages())
                write_atomically(self._folder / "operators.json", json.dumps(document, indent=1) + "\n")
        except (DisttrainError, OSError, RuntimeError) as error:
            self._say(f"profile: {trace} cannot be written: {reason(error)}")
        else:
            self._say(f"profile of steps {self._first:,} to {self._step:,}: {trace}")
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)


def costliest(events: Iterable[FunctionEventAvg]) -> dict[str, list[dict[str, Any]]]:
    """Returns the ten operators with the most self time on the CPU, and the ten such kernels on the device.

    Each has its `name`, its `calls`, `self_ms` over all calls, and its share of the self time of all.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    operators = [event for event in events if not event.is_user_annotation]
    on_cpu = [event for event in operators if event.device_type.name == "CPU"]
    on_device = [event for event in operators if event.device_type.name != "CPU"]
    for place, rows in (
        ("cpu", [(event.self_cpu_time_total, event) for event in on_cpu]),
        ("device", [(event.self_device_time_total, event) for event in on_device]),
    ):
        whole_us = sum(us for us, _ in rows)
        found[place] = [
            {"name": event.key, "calls": event.count, "self_ms": us / 1000, "share_pct": 100 * us / whole_us}
            for us, event in heapq.nlargest(_OPERATORS, rows, key=itemgetter(0))
            if us
        ]
    return found
