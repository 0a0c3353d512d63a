"""Readings of the GPUs and of this process's use of the processor, taken in parallel with training.

A thread queries NVML (readings.py), which takes a few microseconds per GPU, and the loop collects the means
at its log points. Unavailable readings are None. This module imports neither torch nor, until GPUs are
asked for, pynvml.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import psutil

from disttrain.monitor.readings import GpuReaders
from disttrain.runs.records import READINGS, GpuReading
from disttrain.units import MIB

_log = logging.getLogger("disttrain")

_MEMORY_INTERVAL_S = 1.0
_STOP_TIMEOUT_S = 5.0  # an NVML call on a lost GPU can block for longer
_GREATEST = ("memory_used_mib", "memory_used_by_us_mib")
_LATEST = ("memory_total_mib", "power_limit_w", "ecc_corrected", "ecc_uncorrected")
_SLOWED = {  # reasons for lower clocks that make training slower, by what they are counted as
    "throttled_power_pct": {"power", "power_brake", "board_limit"},
    "throttled_thermal_pct": {"thermal", "thermal_hardware", "hardware"},
}


class GpuSampler:
    """Reads some GPUs at a fixed interval in a thread of its own.

    `means` may be called from any thread, before `start` and after `stop` too. NVML averages utilisation
    over 1/6 to 1 s, so a shorter interval gives no more information.

    Args:
        gpus: what describes each GPU in its readings, such as host, index and name, and its uuid, with or
            without the `GPU-` or `MIG-` prefix.
        interval_s: seconds between two readings. Missed readings are not made up for.
        sink: called in the sampler's thread after each sweep over the GPUs, with a reading of each GPU that
            was read.
        pids: processes whose memory counts as ours.
        alarm: called in the sampler's thread, once for each lost GPU and critical error.
    """

    def __init__(
        self,
        gpus: Sequence[Mapping[str, Any]],
        interval_s: float,
        sink: Callable[[Sequence[GpuReading]], None] | None = None,
        *,
        pids: Sequence[int] = (),
        alarm: Callable[[str], None] = _log.error,
    ) -> None:
        self._windows = [_Window(dict(gpu)) for gpu in gpus]
        self._interval_s = interval_s
        self._sink = sink
        self._pids = pids
        self._alarm = alarm
        self._sink_failed = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts reading; does nothing without GPUs."""
        if self._windows and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stops the thread and waits for it; safe to call when it is not running."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            self._thread = None

    def __enter__(self) -> GpuSampler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def means(self) -> list[dict[str, Any]]:
        """Returns one row per GPU, in the order of `gpus`, over the readings since the last call.

        Memory is the maximum, limits and counts of errors are the latest, all other numbers are means; the
        reasons for lower clocks become throttled_power_pct and throttled_thermal_pct, the share of readings
        that had one. critical_events counts Xids and the loss of the GPU since the start. Without a new
        reading, the last one is returned again. A field that no reading had is None.
        """
        with self._lock:
            return [window.take() for window in self._windows]

    def _run(self) -> None:
        uuids = [str(window.gpu["uuid"]) for window in self._windows]
        with GpuReaders(uuids, self._pids, self._alarm) as readers:
            deadline = time.monotonic()
            while not readers.gone and not self._stop.is_set():
                self._keep(readers.sweep())
                late_s = max(0.0, time.monotonic() - deadline)
                deadline += self._interval_s * (1 + math.floor(late_s / self._interval_s))
                self._stop.wait(deadline - time.monotonic())

    def _keep(self, sweep: Sequence[Mapping[str, Any] | None]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        records = []
        with self._lock:
            for window, reading in zip(self._windows, sweep, strict=True):
                if reading is not None:
                    window.add(reading)
                    records.append(GpuReading(time=now, **window.gpu, **reading))
        if self._sink is None:
            return
        try:
            self._sink(records)
        except Exception as error:  # a sink that fails must not stop the readings
            if not self._sink_failed:
                _log.warning("GPU readings cannot be written: %s: %s", type(error).__name__, error)
            self._sink_failed = True


def _numbers(reading: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the fields of a reading that can be averaged."""
    reasons = reading["throttle"]
    flags = ("throttle", "xids", "lost", "memory_shared")
    numbers = {key: reading[key] for key in READINGS if key not in flags}
    return numbers | {
        key: None if reasons is None else 100.0 * (not slowing.isdisjoint(reasons))
        for key, slowing in _SLOWED.items()
    }


@dataclass
class _Window:
    """The readings of one GPU since the last call of `take`."""

    gpu: dict[str, Any]
    last: dict[str, float | None] = field(default_factory=lambda: _numbers(dict.fromkeys(READINGS)))
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    fresh: bool = False
    critical_events: int | None = None

    def add(self, reading: Mapping[str, Any]) -> None:
        self.last, self.fresh = _numbers(reading), True
        events = None if reading["xids"] is None else len(reading["xids"])
        if events is not None or reading["lost"]:
            self.critical_events = (self.critical_events or 0) + (events or 0) + reading["lost"]
        for key, value in self.last.items():
            if value is not None:
                total, count = self.sums.get(key, (0.0, 0))
                if key in _GREATEST:
                    self.sums[key] = (max(total, value), 1)
                elif key in _LATEST:
                    self.sums[key] = (value, 1)
                else:
                    self.sums[key] = (total + value, count + 1)

    def take(self) -> dict[str, Any]:
        row: dict[str, Any] = {**self.gpu, **self.last, "critical_events": self.critical_events}
        if self.fresh:
            means = {key: round(total / count, 1) for key, (total, count) in self.sums.items()}
            row |= {key: means.get(key) for key in self.last}
        self.sums, self.fresh = {}, False
        return row


class ProcessorSampler:
    """The CPU time of this process, read on demand, and its memory, read once a second."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._clocks()
        self._memory_mib: int | None = None
        self._memory_due_s = 0.0

    def means(self) -> dict[str, object]:
        """Returns cpu_pct and memory_used_mib.

        cpu_pct is the mean since the last call, 100 for one busy core. memory_used_mib is the resident
        set, at most a second old. Processes started by this one are not counted.
        """
        before, self._before = self._before, self._clocks()
        wall_s, busy_s = (now - then for now, then in zip(self._before, before, strict=True))
        if self._before[0] >= self._memory_due_s:
            self._memory_due_s, self._memory_mib = self._before[0] + _MEMORY_INTERVAL_S, None
            with contextlib.suppress(psutil.Error, OSError):
                self._memory_mib = round(self._process.memory_info().rss / MIB)
        cpu_pct = round(100 * busy_s / wall_s, 1) if wall_s > 0 else None
        return {"cpu_pct": cpu_pct, "memory_used_mib": self._memory_mib}

    @staticmethod
    def _clocks() -> tuple[float, float]:
        """Returns seconds of wall and of this process's processor time."""
        return time.monotonic(), time.process_time()
