"""Readings of the GPUs (NVML) and of this process's use of the processor.

Readings are taken beside the training loop, never in it: a thread asks NVML a few microseconds' worth of
questions per GPU, and the loop collects the means at its log points. A GPU is known by its UUID, because
an index means one GPU to NVML and another to CUDA. What cannot be read is None. This module imports
neither torch nor, until GPUs are asked for, pynvml.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil

_log = logging.getLogger("disttrain")

_MIB = 2**20
_STOP_TIMEOUT_S = (
    5.0  # a GPU that fell off the bus can hold an NVML call for longer than anyone wants to wait
)
_READINGS = ("utilization_pct", "memory_used_mib", "memory_total_mib", "power_w", "temperature_c")
_AVERAGED = ("utilization_pct", "power_w", "temperature_c")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU, as NVML knows it.

    Attributes:
        index: NVML index of the GPU (the one nvidia-smi shows); of the parent for a MIG instance.
        uuid: with its prefix, `GPU-` or `MIG-`.
        name: product name.
        memory_total_mib: None where it cannot be read.
    """

    index: int
    uuid: str
    name: str
    memory_total_mib: int | None


def visible_gpus() -> list[Gpu]:
    """Returns the GPUs that CUDA programs of this environment see, in their order; [] without NVML.

    Honours CUDA_VISIBLE_DEVICES. Bare indexes are taken in PCI bus order, which is also CUDA's unless the
    GPUs of the node differ in speed and CUDA_DEVICE_ORDER is not PCI_BUS_ID: so match a GPU to a rank by
    its UUID, not by its place in this list.
    """
    with _nvml_session() as nvml:
        if nvml is None:
            return []
        gpus: list[Gpu] = []
        instances: dict[str, list[Gpu]] = {}
        for index in range(_ask(nvml.nvmlDeviceGetCount) or 0):
            handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
            gpu = _describe(nvml, handle, index)
            if gpu is None:
                continue
            gpus.append(gpu)
            slots = range(_ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
            found = (_ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in slots)
            described = [_describe(nvml, instance, index) for instance in found]
            instances[gpu.uuid] = [instance for instance in described if instance is not None]
    return _cuda_order(os.environ.get("CUDA_VISIBLE_DEVICES"), gpus, instances)


def _cuda_order(spec: str | None, gpus: Sequence[Gpu], instances: Mapping[str, Sequence[Gpu]]) -> list[Gpu]:
    """Returns what CUDA makes of a CUDA_VISIBLE_DEVICES value (CUDA C++ Programming Guide).

    Args:
        spec: the value; None when it is not set.
        gpus: in NVML's order.
        instances: the MIG instances of each GPU, by the UUID of the GPU.
    """
    chosen: list[Gpu] = []
    if spec is None:
        chosen = list(gpus)
    else:
        everything = [*gpus, *(instance for group in instances.values() for instance in group)]
        prefix = spec.strip()[:4] if spec.strip()[:4] in ("GPU-", "MIG-") else ""
        for entry in (part.strip() for part in spec.split(",")):
            if prefix:
                matches = [gpu for gpu in everything if gpu.uuid.startswith(entry)]
                known = entry.startswith(prefix) and len(matches) == 1
            else:
                number = re.match(r"\+?[0-9]+", entry)  # CUDA reads "1abc" as 1
                matches = list(gpus[int(number.group()) :][:1]) if number else []
                known = bool(matches)
            if not known:
                break
            if matches[0] in chosen:
                return []  # a repeated entry hides all
            chosen.append(matches[0])
    for gpu in chosen:  # CUDA sees one MIG instance at most, and then nothing else (MIG user guide)
        if gpu.uuid.startswith("MIG-"):
            return [gpu]
        if instances.get(gpu.uuid):
            return [instances[gpu.uuid][0]]
    return chosen


class GpuSampler:
    """Reads some GPUs at a fixed interval in a thread of its own.

    `means` may be called from any thread, before `start` and after `stop` too. NVML averages utilisation
    over 1/6 to 1 s, so an interval below that tells nothing new.

    Args:
        uuids: the GPUs, with or without their `GPU-` or `MIG-` prefix.
        interval_s: seconds between two readings.
        sink: called in the sampler's thread with each reading of each GPU that was found: time (UTC), host,
            index, uuid, name, utilization_pct, memory_used_mib, memory_total_mib, power_w, temperature_c.
    """

    def __init__(
        self, uuids: Sequence[str], interval_s: float, sink: Callable[[Mapping[str, object]], None] | None
    ) -> None:
        host = socket.gethostname()
        self._windows = [_Window({"host": host, "index": None, "uuid": uuid, "name": None}) for uuid in uuids]
        self._interval_s = interval_s
        self._sink = sink
        self._sink_failed = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts reading; without GPUs there is nothing to start."""
        if self._windows and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for it; harmless when it is not running."""
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

    def means(self) -> list[dict[str, object]]:
        """Returns one row per GPU, in the order of `uuids`, over the readings since the last call.

        Utilisation, power and temperature are means; memory is the maximum. Without a new reading, the last
        one is given again. A field that no reading had is None.
        """
        with self._lock:
            return [window.take() for window in self._windows]

    def _run(self) -> None:
        with _nvml_session() as nvml:
            if nvml is None:
                return
            handles = [self._find(nvml, window) for window in self._windows]
            deadline = time.monotonic()
            while any(handles) and not self._stop.is_set():
                for window, handle in zip(self._windows, handles, strict=True):
                    if handle is not None:
                        self._keep(window, _read(nvml, handle))
                late_s = max(0.0, time.monotonic() - deadline)
                deadline += self._interval_s * (1 + math.floor(late_s / self._interval_s))
                self._stop.wait(deadline - time.monotonic())

    def _find(self, nvml: Any, window: _Window) -> Any:
        """Returns NVML's handle of a window's GPU, and fills in its index, UUID and name; None if unknown."""
        for prefix in ("", "GPU-", "MIG-"):
            handle = _ask(nvml.nvmlDeviceGetHandleByUUID, f"{prefix}{window.gpu['uuid']}")
            gpu = _describe(nvml, handle)
            if gpu is not None:
                with self._lock:
                    window.gpu |= {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name}
                return handle
        return None

    def _keep(self, window: _Window, reading: Mapping[str, float | None]) -> None:
        with self._lock:
            window.add(reading)
        if self._sink is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        try:
            self._sink({"time": now.replace("+00:00", "Z"), **window.gpu, **reading})
        except Exception as error:  # whatever the sink does, readings go on
            if not self._sink_failed:
                _log.warning("GPU readings cannot be written: %s: %s", type(error).__name__, error)
            self._sink_failed = True


@dataclass
class _Window:
    """The readings of one GPU since they were last taken."""

    gpu: dict[str, object]
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    memory_used_mib: float | None = None
    fresh: bool = False
    last: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(_READINGS))

    def add(self, reading: Mapping[str, float | None]) -> None:
        self.last, self.fresh = reading, True
        for key in _AVERAGED:
            value = reading[key]
            if value is not None:
                total, count = self.sums.get(key, (0.0, 0))
                self.sums[key] = (total + value, count + 1)
        used = reading["memory_used_mib"]
        if used is not None:
            self.memory_used_mib = max(used, self.memory_used_mib or 0)

    def take(self) -> dict[str, object]:
        row = {**self.gpu, **self.last}
        if self.fresh:
            means = {key: round(total / count, 1) for key, (total, count) in self.sums.items()}
            row |= {key: means.get(key) for key in _AVERAGED} | {"memory_used_mib": self.memory_used_mib}
        self.sums, self.memory_used_mib, self.fresh = {}, None, False
        return row


class ProcessorSampler:
    """What this process takes of its host: processor time and memory, read when asked."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._host = socket.gethostname()
        self._before = self._clocks()

    def means(self) -> dict[str, object]:
        """Returns host, cpu_pct, threads and memory_used_mib.

        cpu_pct is the mean since the last call, 100 for one core kept busy; threads and memory (resident
        set) are of now. Processes started by this one are not counted.
        """
        before, self._before = self._before, self._clocks()
        wall_s, busy_s = (now - then for now, then in zip(self._before, before, strict=True))
        threads = memory = None
        with contextlib.suppress(psutil.Error, OSError):
            threads = self._process.num_threads()
            memory = round(self._process.memory_info().rss / _MIB)
        cpu_pct = round(100 * busy_s / wall_s, 1) if wall_s > 0 else None
        return {"host": self._host, "cpu_pct": cpu_pct, "threads": threads, "memory_used_mib": memory}

    @staticmethod
    def _clocks() -> tuple[float, float]:
        """Returns seconds of wall and of this process's processor time."""
        return time.monotonic(), time.process_time()


@contextlib.contextmanager
def _nvml_session() -> Iterator[Any]:
    """Gives pynvml, initialised, or None where NVML is missing or broken; sessions may overlap."""
    import pynvml

    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        _ask(nvml.nvmlShutdown)


def _ask(query: Callable[..., Any], *args: object) -> Any:
    """Returns the answer of an NVML query, None when it fails or is not supported."""
    import pynvml

    try:
        return query(*args)
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


def _describe(nvml: Any, handle: Any, index: int | None = None) -> Gpu | None:
    """Returns what NVML says of a GPU or MIG instance; None for no handle or a GPU that is lost."""
    if handle is None:
        return None
    if index is None:
        parent = _ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
        index = _ask(nvml.nvmlDeviceGetIndex, handle if parent is None else parent)
    uuid = _ask(nvml.nvmlDeviceGetUUID, handle)
    if uuid is None or index is None:
        return None
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    name = _ask(nvml.nvmlDeviceGetName, handle) or "unknown GPU"
    return Gpu(index, uuid, name, None if memory is None else memory.total // _MIB)


def _read(nvml: Any, handle: Any) -> dict[str, float | None]:
    """Returns one reading: microseconds per question, and never the list of processes (milliseconds)."""
    utilization = _ask(nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    power_mw = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
    return {
        "utilization_pct": None if utilization is None else utilization.gpu,
        "memory_used_mib": None if memory is None else memory.used // _MIB,
        "memory_total_mib": None if memory is None else memory.total // _MIB,
        "power_w": None if power_mw is None else round(power_mw / 1000, 1),
        "temperature_c": _ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
    }
