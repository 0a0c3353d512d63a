"""Readings of the devices of all ranks: which rank reads which GPU, and how every rank gets the numbers.

The first rank of each node reads the GPUs of that node, except those that only another rank can see.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from disttrain.monitor import nvml
from disttrain.monitor.readings import memory_of
from disttrain.monitor.telemetry import GpuSampler, ProcessorSampler
from disttrain.runs.jsonl import encoded
from disttrain.runs.records import GpuMeans, Process
from disttrain.runs.runfolder import RunFolder
from disttrain.training.collectives import Group, gather

_ABOUT = ("rank", "host", "index", "uuid", "name", "memory_total_mib", "memory_shared")
"""Fields known from the start. All other fields are reduced together with the loss."""


class RunGauges:
    """Readings of every GPU, or of every process on CPUs, as a vector that can be summed over the ranks.

    Each reading has a fixed position in the vector. A rank fills its own positions and leaves 0 elsewhere.

    Args:
        devices: one description per rank, from `gather_devices`.
        rank: of this process.
        interval_s: seconds between two readings of a GPU.
        folder: the run folder, for gpu.jsonl.
        alarm: called for lost GPUs and critical errors: at once on the rank that reads the GPU, and at the
            next log point on rank 0 for GPUs that other ranks read.
    """

    def __init__(
        self,
        devices: Sequence[Mapping[str, Any]],
        rank: int,
        interval_s: float,
        folder: RunFolder,
        alarm: Callable[[str], None],
    ) -> None:
        self._rank = rank
        self._alarm = alarm
        self._on_gpu = devices[rank]["uuid"] is not None
        # A GPU that ranks share has one position, and the description from its first rank.
        first = {device["uuid"] or device["rank"]: device for device in reversed(devices)}
        self._devices = sorted(first.values(), key=lambda device: int(device["rank"]))
        self._kind = GpuMeans if self._on_gpu else Process
        self._fields = [name for name in self._kind.__struct_fields__ if name not in _ABOUT]
        key = "reader" if self._on_gpu else "rank"
        self._own = [place for place, device in enumerate(self._devices) if device[key] == rank]
        self._told = [0] * len(self._devices)
        self._processor = ProcessorSampler()
        gpus = [
            {key: self._devices[place][key] for key in ("host", "index", "uuid", "name")}
            for place in (self._own if self._on_gpu else ())
        ]
        self._file = SharedLines(folder.gpu) if gpus or rank == 0 else None
        self._sampler = GpuSampler(
            gpus,
            interval_s,
            self._file.write if self._file else None,
            pids=[device["pid"] for device in devices if device["host"] == devices[rank]["host"]],
            alarm=alarm,
        )

    def start(self) -> None:
        """Starts reading."""
        self._sampler.start()

    def stop(self) -> None:
        """Stops reading."""
        self._sampler.stop()
        if self._file is not None:
            self._file.close()

    def read(self) -> list[float]:
        """Returns this rank's numbers: 0 at the positions of others, and NaN for an unknown reading."""
        width = len(self._fields)
        values = [0.0] * (len(self._devices) * width)
        readings = self._sampler.means() if self._on_gpu else [self._processor.means()]
        for place, reading in zip(self._own, readings, strict=True):
            values[place * width : (place + 1) * width] = [
                math.nan if reading[field] is None else float(reading[field]) for field in self._fields
            ]
        return values

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Returns the `gpus` of a train record, and on CPUs its `processes`."""
        numbers = iter([None if math.isnan(number) else round(number, 1) for number in totals])
        names = self._kind.__struct_fields__
        rows: list[Any] = []
        for device in self._devices:
            fields: Any = {name: device.get(name) if name in _ABOUT else next(numbers) for name in names}
            rows.append(self._kind(**fields))
        if not self._on_gpu:
            return {"gpus": (), "processes": tuple(rows)}
        for place, gpu in enumerate(rows):
            self._tell_of_others(place, gpu)
        return {"gpus": tuple(rows)}

    def _tell_of_others(self, place: int, gpu: GpuMeans) -> None:
        events = int(gpu.critical_events or 0)
        if self._rank == 0 and place not in self._own and events > self._told[place]:
            self._alarm(
                f"GPU {gpu.index} ({gpu.name}, {gpu.uuid}) on {gpu.host}: a critical error; "
                "gpu.jsonl has its Xid, or that the GPU is lost"
            )
        self._told[place] = events


class SharedLines:
    """Appends records to a JSONL file that other nodes also append to.

    Args:
        path: created if missing.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, records: Sequence[object]) -> None:
        """Appends records, one per line, in a single write."""
        lines = b"".join(map(encoded, records))
        # NFS appends at the end as this node has it cached; taking the lock refreshes it from the server.
        # File systems without locks append at the true end.
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            self._file.write(lines)
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def gather_devices(group: Group) -> list[dict[str, Any]]:
    """Returns rank, host, pid, device, GPU and its reader for every rank. Every rank must call this."""
    own = {"rank": group.rank, "host": socket.gethostname(), "pid": os.getpid()}
    return assign(gather(group, own | describe_device(group.device)))


def describe_device(device: torch.device) -> dict[str, Any]:
    """Returns the description of a rank's device; `reach` lists the UUIDs of all GPUs visible to NVML."""
    if device.type != "cuda":
        return {"device": str(device), "name": "CPU", "uuid": None}
    properties = torch.cuda.get_device_properties(device)
    place: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    bus = None if None in place else "{:08x}:{:02x}:{:02x}.0".format(*place)
    with nvml.session():  # keeps NVML initialised for the calls below
        gpu = nvml.gpu_of_device(str(properties.uuid), bus)
        reach = [each.uuid for each in nvml.node_gpus()]
    known = nvml.Gpu(-1, f"GPU-{properties.uuid}", properties.name, None) if gpu is None else gpu
    total_mib, shared = memory_of(known)
    return {
        "device": str(device),
        "name": known.name,
        "uuid": known.uuid,
        "index": None if gpu is None else gpu.index,
        "minor": known.minor,
        "memory_total_mib": total_mib,
        "memory_shared": shared,
        "reach": reach,
    }


def assign(devices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the devices with the rank that reads each GPU: the first rank of its host that can see it.

    If each task sees only its own GPU, all of them have index 0. The index is then the number of the device
    file.
    """
    assigned = []
    for device in devices:
        own = {key: value for key, value in device.items() if key not in ("reach", "minor")}
        if device["uuid"] is not None:
            neighbours = [other for other in devices if other["host"] == device["host"]]
            readers = [other["rank"] for other in neighbours if device["uuid"] in other.get("reach", ())]
            own["reader"] = min(readers, default=device["rank"])
            names = {(other["index"], other["uuid"]) for other in neighbours}
            if len({index for index, _ in names}) < len({uuid for _, uuid in names}):
                own["index"] = device["index"] if device["minor"] is None else device["minor"]
        assigned.append(own)
    return assigned
