"""Turns what happens in a run into files and a screen: the observer and the gauges that `train` is handed.

Rank 0 writes metrics, status and environment and drives the console; the first rank of each node reads the
GPUs of that node, but for those that only another rank may see; every rank writes its own log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import gather_object

from disttrain import __version__
from disttrain.config import Config
from disttrain.errors import StoppedError
from disttrain.files import write_atomically
from disttrain.models import parameter_count
from disttrain.monitor import nvml
from disttrain.monitor.console import Console, RunInfo
from disttrain.monitor.telemetry import GpuSampler, ProcessorSampler
from disttrain.monitor.trackers import Trackers
from disttrain.monitor.verdict import Verdict, evidence, judge
from disttrain.runs.runfolder import COMMAND, JsonLines, RunFolder, utc_now
from disttrain.shards.index import Index
from disttrain.shards.reader import sample_keys
from disttrain.training.choices import Choice
from disttrain.training.graph import graph_obstacle
from disttrain.training.parts import Parts, Position

log = logging.getLogger("disttrain")

_STATUS_INTERVAL_S = 1.0
_LIVE_RECORDS = 10  # train records that the verdict on the screen is made from
_JUDGED_RECORDS = 1000  # and the one at the end
_GPU_FIELDS = (
    "utilization_pct",
    "memory_utilization_pct",
    "memory_used_mib",
    "power_w",
    "power_limit_w",
    "temperature_c",
    "sm_clock_mhz",
    "throttled_power_pct",
    "throttled_thermal_pct",
    "sm_activity_pct",
    "critical_events",
)
"""What of a GPU travels with the loss; gpu.jsonl has all that is read."""
_PROCESS_FIELDS = ("cpu_pct", "memory_used_mib")


class RunObserver:
    """Follows one run on one rank; a context manager around the training.

    Every rank makes one: the devices of all ranks are gathered. `choices` are the settings that were chosen
    for the user, with their reasons.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        parts: Parts,
        position: Position,
        index: Index,
        choices: dict[str, Choice],
        *,
        verbosity: int,
    ) -> None:
        self._folder = folder
        self._position = position
        self._rank = parts.rank
        self._index = index
        self._last_eval: dict[str, Any] = {}
        self._status_due_s = 0.0
        self._records: deque[dict[str, Any]] = deque(maxlen=_JUDGED_RECORDS)
        obstacle = graph_obstacle(
            config, parts.accelerator.device, parts.world_size, parts.settings.precision
        )
        self._judge = partial(
            evidence,
            cache=choices["cache"].value,
            precision=parts.settings.precision,
            compiled=parts.settings.compiled,
            graph=None if obstacle else parts.graph is not None,
        )
        self._metrics: JsonLines | None = None
        self._trace: JsonLines | None = None
        self._console: Console | None = None
        self._trackers: Trackers | None = None
        devices = _gather_devices(parts)
        self._hosts = [device["host"] for device in devices]
        self.gauges = RunGauges(devices, parts.rank, config.monitor.gpu_interval_s, folder, self.alarm)
        if config.train.trace_samples:
            folder.trace(parts.rank).parent.mkdir(exist_ok=True)
            self._trace = JsonLines(folder.trace(parts.rank))
        if parts.rank == 0:
            self._metrics = JsonLines(folder.metrics)
            info = _run_info(config, folder, parts, index, devices, choices)
            environment = _environment(parts, index, devices, choices) | {"run": dataclasses.asdict(info)}
            environment["forced"] = folder.status().get("forced", [])
            write_atomically(folder.env, json.dumps(environment, indent=1) + "\n")
            self._console = Console(
                info, verbosity=verbosity, position=lambda: (position.step, position.samples_seen)
            )
            self._trackers = Trackers(config, folder, position.step, self.note)

    def __enter__(self) -> RunObserver:
        self.gauges.start()
        if self._console is not None:
            self._console.start()
        if self._trackers is not None:
            self._trackers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gauges.stop()
        if self._trackers is not None:
            self._trackers.close()
        if self._console is not None and isinstance(error, StoppedError):
            self._console.finish(str(error), ok=False)
        elif self._console is not None:
            self._console.stop()
        for file in (self._metrics, self._trace):
            if file is not None:
                file.close()

    def train(self, record: dict[str, Any]) -> None:
        """Writes and shows a train record; once a second, judges the last ones and updates status.json."""
        if self._metrics is None or self._console is None or self._trackers is None:
            return
        self._metrics.write({"time": utc_now(), **record})
        self._console.train(record)
        self._trackers.log(record)
        self._records.append(record)
        now = time.monotonic()
        if now >= self._status_due_s:
            self._status_due_s = now + _STATUS_INTERVAL_S
            self._update_status()
            if verdict := self._verdict(_LIVE_RECORDS):
                self._console.verdict(verdict.text)

    def evaluate(self, record: dict[str, Any]) -> None:
        """Writes and shows an evaluation."""
        self._last_eval = record
        if self._metrics is None or self._console is None or self._trackers is None:
            return
        log.info("evaluation: %s", record)
        self._metrics.write({"time": utc_now(), **record})
        self._console.evaluate(record)
        self._trackers.log(record)
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
        """Makes sure that what this rank has written is on the disk before a checkpoint that counts on it."""
        for file in (self._metrics, self._trace):
            if file is not None:
                file.sync()

    def saved(self, path: Path, best: bool) -> None:
        """Tells of a checkpoint; only the best ones are worth a line on the screen."""
        log.info("saved %s%s", path, ", the best" if best else "")

    def note(self, text: str) -> None:
        """Shows a message."""
        log.info("%s", text)
        if self._console is not None:
            self._console.note(text)

    def alarm(self, text: str) -> None:
        """Shows that something is broken; may be called from any thread."""
        log.error("%s", text)
        if self._console is not None:
            self._console.note(text)

    def _verdict(self, records: int) -> Verdict | None:
        """Judges the last records, but not the first one, in which everything is still warming up."""
        judged = list(self._records)[1:][-records:]
        found = self._judge(judged, self._hosts)
        return None if found is None else judge(found)

    def finished(self) -> None:
        """Shows the outcome, and what held the run back."""
        log.info("finished")
        if self._trackers is not None:
            self._trackers.close()  # what it has to say comes before the outcome
        if self._console is not None:
            if verdict := self._verdict(_JUDGED_RECORDS):
                self._console.note(f"verdict: {verdict.text}")
                self._folder.update_status(verdict=dataclasses.asdict(verdict))
            result = self._last_eval
            accuracy = (
                f"accuracy {100 * result['accuracy']:.2f} % ({result['correct']:,} of {result['total']:,})"
                if result
                else "no evaluation"
            )
            self._console.finish(f"finished: {accuracy}, run folder {self._folder.path}", ok=True)

    def _update_status(self) -> None:
        self._folder.update_status(
            step=self._position.step, epoch=self._position.epoch, samples_seen=self._position.samples_seen
        )


class RunGauges:
    """Readings of every GPU, or of every process on CPUs, as numbers that can be summed over the ranks.

    Each reading has its place in the vector; a rank fills its own places and leaves 0 in the others.

    Args:
        devices: one description per rank, from `_gather_devices`.
        rank: of this process.
        interval_s: seconds between two readings of a GPU.
        folder: takes gpu.jsonl.
        alarm: told of GPUs that are lost and of critical errors: by the rank that reads the GPU at once, by
            rank 0 of those that others read at the next log point.
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
        # Ranks may share a GPU: it has one place, and the description by its first rank.
        first = {device["uuid"] or device["rank"]: device for device in reversed(devices)}
        self._rows = sorted(first.values(), key=lambda device: int(device["rank"]))
        self._fields = _GPU_FIELDS if self._on_gpu else _PROCESS_FIELDS
        key = "reader" if self._on_gpu else "rank"
        self._places = [place for place, device in enumerate(self._rows) if device[key] == rank]
        self._told = [0] * len(self._rows)
        self._processor = ProcessorSampler()
        reads = self._on_gpu and self._places
        self._file = _SharedLines(folder.gpu) if reads or rank == 0 else None
        self._sampler = GpuSampler(
            [
                {key: self._rows[place][key] for key in ("host", "index", "uuid", "name")}
                for place in (self._places if self._on_gpu else ())
            ],
            interval_s,
            self._file.write if self._file else None,
            pids=[device["pid"] for device in devices if device["host"] == devices[rank]["host"]],
            alarm=alarm,
        )

    def start(self) -> None:
        """Begins to read."""
        self._sampler.start()

    def stop(self) -> None:
        """Ends the reading."""
        self._sampler.stop()
        if self._file is not None:
            self._file.close()

    def read(self) -> list[float]:
        """Returns this rank's numbers, 0 in the places of others and NaN where a reading is unknown."""
        width = len(self._fields)
        values = [0.0] * (len(self._rows) * width)
        rows = self._sampler.means() if self._on_gpu else [self._processor.means()]
        for place, row in zip(self._places, rows, strict=True):
            values[place * width : (place + 1) * width] = [
                math.nan if row[field] is None else float(row[field]) for field in self._fields
            ]
        return values

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Returns the gpus rows of a train record, and on CPUs the processes rows."""
        width = len(self._fields)
        rows = []
        for place, device in enumerate(self._rows):
            numbers = {
                field: None if math.isnan(number) else round(number, 1)
                for field, number in zip(
                    self._fields, totals[place * width : (place + 1) * width], strict=True
                )
            }
            if not self._on_gpu:
                rows.append({key: device[key] for key in ("rank", "host")} | numbers)
                continue
            row = {key: device[key] for key in ("host", "index", "uuid", "name", "memory_total_mib")}
            rows.append(row | numbers)
            self._tell_of_others(place, row | numbers)
        return {"gpus": rows} if self._on_gpu else {"gpus": [], "processes": rows}

    def _tell_of_others(self, place: int, row: Mapping[str, Any]) -> None:
        events = int(row["critical_events"] or 0)
        if self._rank == 0 and place not in self._places and events > self._told[place]:
            self._alarm(
                f"GPU {row['index']} ({row['name']}, {row['uuid']}) on {row['host']}: a critical error; "
                "gpu.jsonl has its Xid, or that the GPU is lost"
            )
        self._told[place] = events


class _SharedLines:
    """Appends records to a JSONL file to which other nodes append too.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, each a line, at once."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        # NFS appends where this node believes the end to be; with the lock it asks the server. Not every
        # file system has locks, and those without them append to the true end.
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            self._file.write(text.encode())
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _gather_devices(parts: Parts) -> list[dict[str, Any]]:
    """Returns rank, host, process, device, GPU and who reads it, for every rank. Every rank calls this."""
    own: dict[str, Any] = {"rank": parts.rank, "host": socket.gethostname(), "pid": os.getpid()}
    own |= _describe(parts.accelerator.device)
    devices: list[dict[str, Any]] = gather_object([own]) if parts.world_size > 1 else [own]
    return _assign(devices)


def _describe(device: torch.device) -> dict[str, Any]:
    """Returns what a rank says of its device, and in `reach` the UUIDs of all GPUs that NVML shows it."""
    described: dict[str, Any] = {"device": str(device), "name": "CPU", "uuid": None}
    if device.type != "cuda":
        return described
    properties = torch.cuda.get_device_properties(device)
    place: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    bus = None if None in place else "{:08x}:{:02x}:{:02x}.0".format(*place)
    with nvml.session():  # the others join it
        gpu = nvml.gpu_of_device(str(properties.uuid), bus)
        reach = [each.uuid for each in nvml.node_gpus()]
    known = nvml.Gpu(-1, f"GPU-{properties.uuid}", properties.name, None) if gpu is None else gpu
    return described | {
        "name": known.name,
        "uuid": known.uuid,
        "index": None if gpu is None else gpu.index,
        "minor": known.minor,
        "memory_total_mib": known.memory_total_mib,
        "reach": reach,
    }


def _assign(devices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the devices with the rank that reads each GPU: the first one of its host that may see it.

    A task that is given one GPU of a node sees no other, and to each of them it is GPU 0: then indexes are
    the numbers of the device files.
    """
    assigned = []
    for device in devices:
        neighbours = [other for other in devices if other["host"] == device["host"]]
        readers = [other["rank"] for other in neighbours if device["uuid"] in other.get("reach", ())]
        own = {key: value for key, value in device.items() if key not in ("reach", "minor")}
        if device["uuid"] is not None:
            own["reader"] = min(readers, default=device["rank"])
            names = {(other["index"], other["uuid"]) for other in neighbours}
            if len({index for index, _ in names}) < len({uuid for _, uuid in names}):
                own["index"] = device["index"] if device["minor"] is None else device["minor"]
        assigned.append(own)
    return assigned


def _run_info(
    config: Config,
    folder: RunFolder,
    parts: Parts,
    index: Index,
    devices: list[dict[str, Any]],
    choices: dict[str, Choice],
) -> RunInfo:
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items())
    names = sorted({device["name"] for device in devices})
    if devices[0]["uuid"] is None:
        count = "1 process" if len(devices) == 1 else f"{len(devices)} processes"
        where = f"{count}, CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each"
    else:
        where = f"{len(devices)} x {' / '.join(names)}"
    return RunInfo(
        name=config.name,
        run_dir=str(folder.path),
        model=config.model.name,
        parameters=parameter_count(parts.bare_model),
        data=f"{index.name} {splits}, {index.channels}x{index.height}x{index.width}, "
        f"cache {choices['cache'].value}",
        devices=where,
        precision=choices["precision"].value,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        steps_per_epoch=parts.plan.steps_per_epoch,
        samples_per_epoch=parts.plan.samples_per_epoch,
    )


def _environment(
    parts: Parts, index: Index, devices: list[dict[str, Any]], choices: dict[str, Choice]
) -> dict[str, Any]:
    """Returns the content of env.json."""
    packages = ("torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow", "safetensors")
    return {
        "disttrain": __version__,
        "command": os.environ.get(COMMAND) or shlex.join(sys.orig_argv),
        "directory": str(Path.cwd()),
        "started_at": utc_now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "git": _git(),
        "world_size": parts.world_size,
        "devices": devices,
        "communication": _communication(parts),
        "threads": torch.get_num_threads(),
        "flops_per_image": parts.flops_per_image,
        "device_peak_flops_per_s": parts.peak_flops_per_s,
        "choices": {name: str(choice) for name, choice in choices.items()},
        "data": {
            "name": index.name,
            "digest": index.digest,
            "shape": [index.channels, index.height, index.width],
            "classes": index.classes,
            "mean": index.mean,
            "std": index.std,
            **{name: split.samples for name, split in index.splits.items()},
        },
    }


def _communication(parts: Parts) -> dict[str, Any] | None:
    """Returns what ranks speak through, and the variables that set it, or None for a single process."""
    if not torch.distributed.is_initialized():
        return None
    on_gpu = parts.accelerator.device.type == "cuda"
    prefixes = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_")
    return {
        "backend": torch.distributed.get_backend(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)},
    }


def _git() -> dict[str, Any] | None:
    """Returns commit and state of the working folder's repository, or None."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = [
            subprocess.run(
                ["git", *args], capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return {"commit": output[0], "modified": bool(output[1])}
    return None
