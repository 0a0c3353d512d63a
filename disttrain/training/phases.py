"""Where the time of a step goes on this rank, told by the same calls that are its heartbeat.

On a CPU the phases are timed by the host. On a GPU the host only hands out work: there one step between two
log points is timed by events on the device, which are read at the second one, when all are waited for in any
case. It is one in the middle: after a log point the device is idle, and for some steps shows the time of the
host, which is hidden afterwards. The time that a rank waits for the gradients of others is what DDP itself
measures of a step in between; it is a part of the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.heartbeat import Phase
from disttrain.runs.records import StepTimes


class Phases:
    """Follows one rank through its phases.

    Args:
        beat: the heartbeat: told of each phase, step and part that begins.
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
        self._on_device_ms = [0.0] * len(Phase)  # of the step that was timed last
        self._step = 0
        self._steps_before = 0  # steps until the one that is timed; -1 once that has begun
        self._marking = False  # whether it is under way

    def enter(self, phase: Phase, step: int, part: int = 0) -> float:
        """Begins a phase; arguments as for `Heartbeat.beat`. Returns the time, seconds of perf_counter."""
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
            self._marking = not begins and phase <= Phase.OPTIMIZE  # if not, the last event
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
        """The host has waited for the device: that is no time of the phase in which it did."""
        if self._on_gpu:
            self._since = time.perf_counter()

    def take(self, steps: int, model: nn.Module) -> StepTimes[float]:
        """Returns the means of the steps since the last call; the device must be idle."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._since = now
        step_ms = [1000 * seconds / steps for seconds in self._seconds]
        if len(self._events) > 1:
            self._on_device_ms = [0.0] * len(Phase)
            for (phase, begin), (_, end) in zip(self._events, self._events[1:], strict=False):
                self._on_device_ms[phase] += begin.elapsed_time(end)
        if any(self._on_device_ms):  # not on a CPU, nor before the first step that was timed
            step_ms[Phase.DATA : Phase.REPORT] = self._on_device_ms[Phase.DATA : Phase.REPORT]
        waiting_ms = min(exposed_communication_ms(model), step_ms[Phase.COMPUTE])
        self._seconds = [0.0] * len(Phase)
        self._events.clear()
        self._steps_before, self._marking = steps // 2, False
        return StepTimes(
            data=step_ms[Phase.DATA],
            to_device=step_ms[Phase.TO_DEVICE],
            augmentation=step_ms[Phase.AUGMENT],
            compute=step_ms[Phase.COMPUTE] - waiting_ms,
            communication=waiting_ms,
            optimizer=step_ms[Phase.OPTIMIZE],
            logging=step_ms[Phase.REPORT],
            evaluation=step_ms[Phase.EVALUATE],
            checkpoint=step_ms[Phase.SAVE],
        )


def exposed_communication_ms(model: nn.Module) -> float:
    """Returns the milliseconds that the last step which DDP has timed waited for gradients; 0 without DDP."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    found = model._get_ddp_logging_data()
    nanoseconds = found.get("backward_comm_time", 0) - found.get("backward_compute_comm_overlap_time", 0)
    return max(0.0, float(nanoseconds) / 1e6)
