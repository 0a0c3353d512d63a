"""Times the phases of a step on this rank, with the same calls that beat its heartbeat.

On a CPU, the host times the phases. On a GPU the host only queues work, so CUDA events time one step between
two log points. The second log point reads them, because it waits for the device anyway. The timed step is in
the middle of the interval: right after a log point the device is idle, and for some steps the events would
show the host's time. DDP measures how long a rank waits for the gradients of others, as a part of the
backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.heartbeat import Phase
from disttrain.runs.records import StepTimes

PHASE_NAMES = {
    Phase.DATA: "data",
    Phase.TO_DEVICE: "to_device",
    Phase.AUGMENT: "augmentation",
    Phase.COMPUTE: "compute",
    Phase.REDUCE: "communication",
    Phase.OPTIMIZE: "optimizer",
    Phase.REPORT: "logging",
    Phase.EVALUATE: "evaluation",
    Phase.SAVE: "checkpoint",
}
"""The names of phases in `StepTimes`."""


class Phases:
    """Times the phases of one rank.

    Args:
        beat: the heartbeat; called with each phase, step and part that begins.
        device: where the rank computes.
    """

    def __init__(
        self,
        beat: Callable[[Phase, int, int], None] = lambda phase, step, part: None,
        device: torch.device | None = None,
    ) -> None:
        self._beat = beat
        self._on_gpu = device is not None and device.type == "cuda"
        self._seconds = [0.0] * len(Phase)
        self._phase, self._since = Phase.START, time.perf_counter()
        self._events: list[tuple[Phase, torch.cuda.Event]] = []
        self._on_device_ms = [0.0] * len(Phase)  # of the last timed step
        self._step = 0
        self._steps_before = 0  # steps until the timed step; -1 once it has begun
        self._marking = False  # whether the timed step is running

    def enter(self, phase: Phase, step: int, part: int = 0) -> float:
        """Begins a phase; for the arguments see `Heartbeat.beat`. Returns the time of perf_counter in s."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        self._beat(phase, step, part)
        if self._on_gpu:
            self._mark(phase, step)
        return now

    def _mark(self, phase: Phase, step: int) -> None:
        begins = phase == Phase.DATA and step != self._step
        self._step = step
        if self._marking:
            self._marking = not begins and phase <= Phase.OPTIMIZE  # otherwise this is the last event
        elif begins and self._steps_before >= 0:
            self._marking = self._steps_before == 0
            self._steps_before -= 1
            if not self._marking:
                return
        else:
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def synchronized(self) -> None:
        """Excludes the time that the host just waited for the device from the current phase."""
        if self._on_gpu:
            self._since = time.perf_counter()

    def take(self, steps: int, model: nn.Module) -> StepTimes[float]:
        """Returns the mean milliseconds per phase since the last call; the device must be idle."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._since = now
        step_ms = [1000 * seconds / steps for seconds in self._seconds]
        if len(self._events) > 1:
            self._on_device_ms = [0.0] * len(Phase)
            for (phase, begin), (_, end) in zip(self._events, self._events[1:], strict=False):
                self._on_device_ms[phase] += begin.elapsed_time(end)
        if any(self._on_device_ms):  # all 0 on a CPU, and before the first timed step
            step_ms[Phase.DATA : Phase.REPORT] = self._on_device_ms[Phase.DATA : Phase.REPORT]
        waiting_ms = min(exposed_communication_ms(model), step_ms[Phase.COMPUTE])
        self._seconds = [0.0] * len(Phase)
        self._events.clear()
        self._steps_before, self._marking = steps // 2, False
        times = {name: step_ms[phase] for phase, name in PHASE_NAMES.items()}
        times["compute"] -= waiting_ms
        times["communication"] += waiting_ms
        return StepTimes(**times)


def exposed_communication_ms(model: nn.Module) -> float:
    """Returns the milliseconds that the last step timed by DDP waited for gradients; 0 without DDP."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    found = model._get_ddp_logging_data()
    nanoseconds = found.get("backward_comm_time", 0) - found.get("backward_compute_comm_overlap_time", 0)
    return max(0.0, float(nanoseconds) / 1e6)
