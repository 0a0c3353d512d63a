"""The devices of a run and their measures over time: GPUs, or the processes of a CPU run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.parallel import KilledError, in_processes, usable_cores
from disttrain.report.columns import Array, columns, parse_times
from disttrain.runs.jsonl import parts
from disttrain.runs.records import GPUS, GpuReading, LogPoint, Process

_PART_BYTES = 2**27  # of gpu.jsonl per process
_GPU_COLUMNS = ("utilization_pct", "memory_used_mib", "power_w", "temperature_c")
_PROCESS_COLUMNS = ("cpu_pct", "memory_used_mib")

MEASURES = {
    "utilization_pct": ("GPU utilization", "%"),
    "cpu_pct": ("CPU usage, 100 % is one core", "%"),
    "memory_gib": ("Memory", "GiB"),
    "power_w": ("Power", "W"),
    "temperature_c": ("Temperature", "°C"),
}
"""Title and unit of each measure of a device."""


@dataclass(frozen=True)
class Device:
    """A GPU, or a process of a CPU run, with its measures over time.

    Attributes:
        label: name to display.
        name: product name, or "CPU".
        time_s: UTC, seconds since 1970, increasing; float64 [n].
        values: key of MEASURES -> float64 [n], NaN if unknown.
    """

    label: str
    name: str
    time_s: Array
    values: dict[str, Array]


def read_gpus(path: Path) -> tuple[list[Device], int]:
    """Reads gpu.jsonl; uses several processes for a large one (a day of 64 GPUs is 5.5 million readings).

    Returns:
        The GPUs in order of host and index, and the number of unreadable lines.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return [], 0
    count = min(usable_cores(), max(1, size // _PART_BYTES))
    cuts = [size * number // count for number in range(count + 1)]
    found: list[_Readings] = []
    if count > 1:
        with contextlib.suppress(KilledError):  # not enough memory for all parts at once
            found = in_processes(partial(_read_readings, path), list(itertools.pairwise(cuts)), count)
    found = found or [_read_readings(path, (0, size))]
    first: dict[str, GpuReading] = {}
    for part in found:
        first = part.first | first
    unread = sum(part.unread for part in found)
    if not first:
        return [], unread
    numbers = {uuid: number for number, uuid in enumerate(first)}
    whose = np.concatenate([np.array([numbers[u] for u in p.first], np.int64)[p.whose] for p in found])
    times = np.concatenate([part.times_s for part in found])
    values = np.concatenate([part.values for part in found])
    order = np.argsort(whose, kind="stable")
    ends = np.cumsum(np.bincount(whose, minlength=len(numbers)))
    several_hosts = len({reading.host for reading in first.values()}) > 1
    devices = []
    for (uuid, reading), own in zip(first.items(), np.split(order, ends[:-1]), strict=True):
        index = uuid if reading.index is None else f"GPU {reading.index}"
        label = f"{reading.host} {index}" if several_hosts else index
        measured = _measured(_GPU_COLUMNS, values[own])
        device = Device(label, reading.name or "unknown GPU", times[own], measured)
        devices.append(((reading.host, reading.index is None, reading.index or 0), device))
    return [device for _, device in sorted(devices, key=lambda pair: pair[0])], unread


class _Readings(NamedTuple):
    """A part of gpu.jsonl: the first reading of each GPU; the GPU, time and values of each line."""

    first: dict[str, GpuReading]
    whose: npt.NDArray[np.int16]
    times_s: Array
    values: npt.NDArray[np.float32]
    unread: int


def _read_readings(path: Path, place: tuple[int, int]) -> _Readings:
    """Reads the lines that start in a byte range of gpu.jsonl; `place` is its start and end."""
    first: dict[str, GpuReading] = {}
    whose, times_s = [np.empty(0, np.int16)], [np.empty(0)]
    values, unread = [np.empty((0, len(_GPU_COLUMNS)), np.float32)], 0
    for part in parts(path, GPUS, *place):
        unread += part.unread
        for reading in part.rows:
            first.setdefault(reading.uuid, reading)
        numbers = {uuid: number for number, uuid in enumerate(first)}
        whose.append(np.array([numbers[reading.uuid] for reading in part.rows], np.int16))
        times_s.append(parse_times([reading.time or "" for reading in part.rows]))
        values.append(columns(part.rows, _GPU_COLUMNS).astype(np.float32))
    return _Readings(first, np.concatenate(whose), np.concatenate(times_s), np.concatenate(values), unread)


def processes(records: Sequence[LogPoint], times: Array) -> list[Device]:
    """Returns the processes of a CPU run; `times` of the log points are UTC seconds since 1970."""
    ranks: dict[int, list[tuple[float, Process]]] = {}
    for time_s, record in zip(times.tolist(), records, strict=True):
        for process in record.processes or ():
            ranks.setdefault(process.rank, []).append((time_s, process))
    devices = []
    for rank, rows in sorted(ranks.items()):
        values = columns([process for _, process in rows], _PROCESS_COLUMNS)
        times_s = np.array([time for time, _ in rows])
        devices.append(Device(f"rank {rank}", "CPU", times_s, _measured(_PROCESS_COLUMNS, values)))
    return devices


def _measured(names: Sequence[str], values: npt.NDArray[Any]) -> dict[str, Array]:
    """Returns the columns of the readings by key of MEASURES."""
    keys = ["memory_gib" if name == "memory_used_mib" else name for name in names]
    measured = dict(zip(keys, values.T.astype(np.float64), strict=True))
    measured["memory_gib"] /= 1024
    return measured
