"""Readings of GPUs through NVML.

Unavailable readings are None; the log has the reason once. telemetry.py decides when to read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import psutil

from disttrain.monitor.cuda_driver import is_integrated
from disttrain.monitor.nvml import Gpu, ask, gpu_of, handle_of, session
from disttrain.monitor.xids import XidWatch, address_of, meaning
from disttrain.runs.records import READINGS
from disttrain.units import MIB

_log = logging.getLogger("disttrain")

_RARELY_S = 30.0  # between slow queries, which take milliseconds: processes of a GPU, error counts

_THROTTLE = {  # bits of NVML's clocks event reasons; an idle GPU (bit 0) is not throttled
    0x002: "clock_setting",
    0x004: "power",
    0x008: "hardware",
    0x010: "sync_boost",
    0x020: "thermal",
    0x040: "thermal_hardware",
    0x080: "power_brake",
    0x100: "display_clock",
    0x200: "board_limit",
    0x400: "reliability",
}
_GPM = {  # keys of readings -> metrics of NVML's GPU performance monitoring, Hopper and later
    "sm_activity_pct": "NVML_GPM_METRIC_SM_UTIL",
    "tensor_activity_pct": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "pcie_rx_mib_per_s": "NVML_GPM_METRIC_PCIE_RX_PER_SEC",
    "pcie_tx_mib_per_s": "NVML_GPM_METRIC_PCIE_TX_PER_SEC",
    "nvlink_rx_mib_per_s": "NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC",
    "nvlink_tx_mib_per_s": "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC",
}
_ALL_LINKS = 0xFFFFFFFF
_COUNTERS = {  # keys of readings -> counter, its scope and units in a MiB, before Hopper
    "pcie_rx_mib_per_s": ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", 0, MIB),
    "pcie_tx_mib_per_s": ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", 0, MIB),
    "nvlink_rx_mib_per_s": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", _ALL_LINKS, 1024),
    "nvlink_tx_mib_per_s": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", _ALL_LINKS, 1024),
}


class _LostError(Exception):
    """The GPU no longer answers."""


class GpuReaders:
    """Reads some GPUs; a context manager whose sweeps belong to one thread.

    Args:
        uuids: with or without prefix.
        pids: processes whose memory is counted as ours.
        alarm: called once for each lost GPU and each kind of critical error (Xid) of a GPU.
    """

    def __init__(self, uuids: Sequence[str], pids: Sequence[int], alarm: Callable[[str], None]) -> None:
        self._uuids = uuids
        self._pids = frozenset(pids)
        self._alarm = alarm
        self._stack = contextlib.ExitStack()
        self._readers: list[_Reader | None] = []
        self._xids: XidWatch | None = None
        self._rarely_due_s = -math.inf

    def __enter__(self) -> GpuReaders:
        with self._stack:
            nvml = self._stack.enter_context(session())
            if nvml is not None:
                self._xids = XidWatch(nvml)
                self._stack.callback(self._xids.close)
            said: set[str] = set()
            self._readers = [self._reader(nvml, uuid, said) for uuid in self._uuids]
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers = []
        self._stack.close()

    def _reader(self, nvml: Any, uuid: str, said: set[str]) -> _Reader | None:
        if nvml is None or self._xids is None:
            return None
        handle = handle_of(nvml, uuid)
        gpu = gpu_of(nvml, handle)
        if gpu is None:
            _log.info("GPU %s: not visible to this process through NVML; it is not read", uuid)
            return None
        reader = _Reader(nvml, handle, gpu, self._pids, said)
        self._stack.callback(reader.close)
        with contextlib.suppress(_LostError):
            reader.watched = bool(reader.ask("xids", self._xids.add, handle))
        return reader

    def sweep(self) -> list[dict[str, Any] | None]:
        """Reads every GPU once.

        Returns:
            A reading for each UUID, with the keys READINGS; None for a GPU that was not found or is lost.
        """
        now_s = time.monotonic()
        rarely = now_s >= self._rarely_due_s
        if rarely:
            self._rarely_due_s = now_s + _RARELY_S
        rows = [None if reader is None else reader.read(rarely) for reader in self._readers]
        # After the readings, so that the Xid of a lost GPU is included.
        xids = {} if self._xids is None else self._xids.take()
        for place, (reader, reading) in enumerate(zip(self._readers, rows, strict=True)):
            if reader is None or reading is None:
                continue
            reading["xids"] = xids.get(address_of(reader.handle), []) if reader.watched else None
            for xid in sorted(set(reading["xids"] or ()) - reader.told):
                reader.told.add(xid)
                self._alarm(f"{reader.title}: Xid {xid}, {meaning(xid)}; see dmesg")
            if reading["lost"]:
                self._alarm(
                    f"{reader.title}: {reader.loss}; it is no longer read, and programs on it fail or "
                    "hang; take the node out of service and see dmesg"
                )
                self._readers[place] = None
        return rows

    @property
    def gone(self) -> bool:
        """Whether no GPU is left to read."""
        return not any(self._readers)


class _Reader:
    """Reads one GPU or MIG instance, in a session."""

    def __init__(self, nvml: Any, handle: Any, gpu: Gpu, pids: frozenset[int], said: set[str]) -> None:
        self._nvml = nvml
        self._pids = pids
        self._said = said
        self._unsupported: set[str] = set()
        self._rare: dict[str, Any] = {}
        self._uuid = gpu.uuid
        self.handle = handle
        self.title = f"GPU {gpu.index} ({gpu.name}, {gpu.uuid})"
        self.watched = False
        self.told: set[int] = set()
        self.loss = ""
        self._performance: _Performance | None = None
        self._before: tuple[float, dict[str, float]] = (0.0, {})
        with contextlib.suppress(_LostError):
            self._performance = self.ask("activity", _Performance, nvml, handle)

    def close(self) -> None:
        if self._performance is not None:
            self._performance.close()

    def ask(self, what: str, query: Callable[..., Any], *args: object) -> Any:
        """Returns the answer of a query, or None. An unsupported query is not repeated.

        Raises:
            _LostError: the GPU no longer answers.
        """
        nvml = self._nvml
        if what in self._unsupported:
            return None
        try:
            return query(*args)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError) as error:
            code = getattr(error, "value", nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            if code == nvml.NVML_ERROR_GPU_IS_LOST:
                raise _LostError("it has fallen off the bus") from None
            if code == nvml.NVML_ERROR_RESET_REQUIRED:
                raise _LostError("it does not work until it is reset") from None
            if code in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
                self._unsupported.add(what)
            if what not in self._said:  # once for all GPUs
                self._said.add(what)
                _log.info("%s: %s is not known: NVML: %s", self.title, what, error)
            return None

    def read(self, rarely: bool) -> dict[str, Any]:
        """Returns a reading, all None but `lost` if the GPU is lost; `rarely` runs the slow queries too."""
        try:
            reading = self._read_often()
            if rarely:
                self._rare = self._read_rarely()
                reading |= self._read_traffic_of_20_ms(reading)
            return dict.fromkeys(READINGS) | reading | self._rare | {"lost": False}
        except _LostError as error:
            self.loss = str(error)
            return dict.fromkeys(READINGS) | {"lost": True}

    def _read_often(self) -> dict[str, Any]:
        """Runs the queries that take microseconds."""
        nvml, ask, handle = self._nvml, self.ask, self.handle
        use = ask("utilization", nvml.nvmlDeviceGetUtilizationRates, handle)
        codes = {
            "temperature_c": (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        }
        return {
            "utilization_pct": None if use is None else use.gpu,
            "memory_utilization_pct": None if use is None else use.memory,
            **self._memory(),
            "power_w": _rounded(ask("power_w", nvml.nvmlDeviceGetPowerUsage, handle), 1000),
            "throttle": self._throttle(),
            **{key: ask(key, query, handle, which) for key, (query, which) in codes.items()},
            **self._traffic(),
            **self._activity(),
        }

    def _memory(self) -> dict[str, Any]:
        """Returns used and total memory; the driver's reserve does not count as used, as in nvidia-smi."""
        nvml = self._nvml
        memory = self.ask("memory", nvml.nvmlDeviceGetMemoryInfo, self.handle, nvml.nvmlMemory_v2)
        if memory is None:  # before driver 510
            memory = self.ask("memory without a reserve", nvml.nvmlDeviceGetMemoryInfo, self.handle)
        if memory is not None and memory.total:
            used_mib, total_mib, shared = memory.used // MIB, memory.total // MIB, False
        elif self._integrated:
            system = psutil.virtual_memory()
            used_mib, total_mib, shared = (system.total - system.available) // MIB, system.total // MIB, True
        else:
            return {}
        return {"memory_used_mib": used_mib, "memory_total_mib": total_mib, "memory_shared": shared}

    @functools.cached_property
    def _integrated(self) -> bool:
        return is_integrated(self._uuid)

    def _throttle(self) -> list[str] | None:
        nvml = self._nvml
        reasons = self.ask("throttle", nvml.nvmlDeviceGetCurrentClocksEventReasons, self.handle)
        if reasons is None:  # before driver 535
            query = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
            reasons = self.ask("throttle by its old name", query, self.handle)
        if reasons is None:
            return None
        if reasons & 0x0C0:
            reasons &= ~0x008  # also set for each of those two; current GPUs set it for nothing else
        return [name for bit, name in _THROTTLE.items() if reasons & bit]

    def _activity(self) -> dict[str, float | None]:
        """Returns the performance metrics of the GPU: those keys of _GPM that it supports."""
        if self._performance is None:
            return {}
        return self.ask("activity", self._performance.read) or {}

    def _traffic(self) -> dict[str, float | None]:
        """Returns MiB per second from 64-bit counters; narrower ones wrap within a second."""
        if self._performance is not None or "traffic" in self._unsupported:
            return {}
        nvml = self._nvml
        fields = [(getattr(nvml, name), scope) for name, scope, _ in _COUNTERS.values()]
        values = self.ask("traffic", nvml.nvmlDeviceGetFieldValues, self.handle, fields) or ()
        now_s = time.monotonic()
        counts = {
            key: value.value.ullVal / units
            for (key, (_, _, units)), value in zip(_COUNTERS.items(), values, strict=bool(values))
            if value.nvmlReturn == nvml.NVML_SUCCESS
            and value.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
        }
        if not counts:
            self._unsupported.add("traffic")
        (before_s, before), self._before = self._before, (now_s, counts)
        spans = {key: count - before[key] for key, count in counts.items() if key in before}
        return {key: round(span / (now_s - before_s), 1) for key, span in spans.items() if span >= 0}

    def _read_traffic_of_20_ms(self, reading: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the PCIe traffic over 20 ms, for GPUs without counters."""
        nvml = self._nvml
        if self._performance is not None or "pcie_rx_mib_per_s" in self._before[1]:
            return {}
        counters = {
            "pcie_rx_mib_per_s": nvml.NVML_PCIE_UTIL_RX_BYTES,
            "pcie_tx_mib_per_s": nvml.NVML_PCIE_UTIL_TX_BYTES,
        }
        query = nvml.nvmlDeviceGetPcieThroughput  # in KiB
        return {
            key: _rounded(self.ask("traffic of a moment", query, self.handle, counter), 1024)
            for key, counter in counters.items()
        }

    def _read_rarely(self) -> dict[str, Any]:
        """Runs the queries that take milliseconds."""
        nvml, ask, handle = self._nvml, self.ask, self.handle
        kinds = {
            "ecc_corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "ecc_uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        errors = nvml.nvmlDeviceGetTotalEccErrors
        return {
            "power_limit_w": _rounded(
                ask("power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1000
            ),
            "memory_used_by_us_mib": self._ours_mib(),
            **{key: ask(key, errors, handle, kind, nvml.NVML_VOLATILE_ECC) for key, kind in kinds.items()},
        }

    def _ours_mib(self) -> int | None:
        if not self._pids:
            return None
        query = self._nvml.nvmlDeviceGetComputeRunningProcesses
        processes = self.ask("memory_used_by_us_mib", query, self.handle) or ()
        ours = [process.usedGpuMemory for process in processes if process.pid in self._pids]
        # None of our processes: a container hides them. Memory unknown: the driver may withhold it.
        return sum(ours) // MIB if ours and None not in ours else None


def memory_of(gpu: Gpu) -> tuple[int | None, bool | None]:
    """Returns the memory of a GPU in MiB, and whether it is the system's; None where that is not known."""
    if gpu.memory_total_mib is not None:
        return gpu.memory_total_mib, False
    if is_integrated(gpu.uuid):
        return psutil.virtual_memory().total // MIB, True
    return None, None


def _rounded(value: float | None, units: int) -> float | None:
    return None if value is None else round(value / units, 1)


class _Performance:
    """NVML's GPU performance monitoring: metrics between two samples (Hopper and later).

    Raises:
        pynvml.NVMLError: the GPU or the driver has none.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        instance = ask(nvml.nvmlDeviceGetGpuInstanceId, handle)
        whole = handle if instance is None else nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        if not nvml.nvmlGpmQueryDeviceSupport(whole).isSupportedDevice:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        self._take = nvml.nvmlGpmSampleGet if instance is None else nvml.nvmlGpmMigSampleGet
        self._of = (whole,) if instance is None else (whole, instance)
        self._request = nvml.c_nvmlGpmMetricsGet_t()
        self._request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(_GPM)
        for metric, name in zip(self._request.metrics, _GPM.values(), strict=False):
            metric.metricId = getattr(nvml, name)
        self._before, self._now = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self._filled = False

    def close(self) -> None:
        for sample in (self._before, self._now):
            ask(self._nvml.nvmlGpmSampleFree, sample)

    def read(self) -> dict[str, float | None]:
        """Returns the metrics since the last call; {} from the first."""
        nvml, request = self._nvml, self._request
        self._before, self._now = self._now, self._before
        two, self._filled = self._filled, False
        self._take(*self._of, self._now)
        self._filled = True
        if not two:
            return {}
        request.sample1, request.sample2 = self._before, self._now
        nvml.nvmlGpmMetricsGet(request)
        return {
            key: round(metric.value, 1)
            if metric.nvmlReturn == nvml.NVML_SUCCESS and math.isfinite(metric.value)
            else None
            for key, metric in zip(_GPM, request.metrics, strict=False)
        }
