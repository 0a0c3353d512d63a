"""Turns what happens in a run into files and a screen: the observer and the gauges that `train` is handed.

Rank 0 writes metrics, status and environment and drives the console; the first rank of each node reads the
GPUs of that node; every rank writes its own log.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import gather_object

from disttrain import __version__
from disttrain.config import Config
from disttrain.console import Console, RunInfo
from disttrain.errors import StoppedError
from disttrain.files import write_atomically
from disttrain.models import parameter_count
from disttrain.parts import Parts, Position
from disttrain.runfolder import COMMAND, JsonLines, RunFolder, utc_now
from disttrain.shards.index import Index
from disttrain.shards.reader import sample_keys
from disttrain.telemetry import GpuSampler, ProcessorSampler

log = logging.getLogger("disttrain")

_STATUS_INTERVAL_S = 1.0
_GPU_FIELDS = ("index", "utilization_pct", "memory_used_mib", "memory_total_mib", "power_w", "temperature_c")
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
        choices: dict[str, str],
        *,
        verbosity: int,
    ) -> None:
        self._folder = folder
        self._position = position
        self._rank = parts.rank
        self._index = index
        self._last_eval: dict[str, Any] = {}
        self._status_due_s = 0.0
        self._metrics: JsonLines | None = None
        self._trace: JsonLines | None = None
        self._console: Console | None = None
        devices = _gather_devices(parts)
        self.gauges = RunGauges(devices, parts.rank, config.monitor.gpu_interval_s, folder)
        if config.train.trace_samples:
            folder.trace(parts.rank).parent.mkdir(exist_ok=True)
            self._trace = JsonLines(folder.trace(parts.rank))
        if parts.rank == 0:
            self._metrics = JsonLines(folder.metrics)
            info = _run_info(config, folder, parts, index, devices, choices)
            environment = _environment(parts, index, devices, choices) | {"run": dataclasses.asdict(info)}
            write_atomically(folder.env, json.dumps(environment, indent=1) + "\n")
            self._console = Console(
                info, verbosity=verbosity, position=lambda: (position.step, position.samples_seen)
            )

    def __enter__(self) -> RunObserver:
        self.gauges.start()
        if self._console is not None:
            self._console.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gauges.stop()
        if self._console is not None and isinstance(error, StoppedError):
            self._console.finish(str(error), ok=False)
        elif self._console is not None:
            self._console.stop()
        for file in (self._metrics, self._trace):
            if file is not None:
                file.close()

    def train(self, record: dict[str, Any]) -> None:
        """Writes and shows a train record, and keeps status.json current."""
        if self._metrics is None or self._console is None:
            return
        self._metrics.write({"time": utc_now(), **record})
        self._console.train(record)
        now = time.monotonic()
        if now >= self._status_due_s:
            self._status_due_s = now + _STATUS_INTERVAL_S
            self._update_status()

    def evaluate(self, record: dict[str, Any]) -> None:
        """Writes and shows an evaluation."""
        self._last_eval = record
        if self._metrics is None or self._console is None:
            return
        log.info("evaluation: %s", record)
        self._metrics.write({"time": utc_now(), **record})
        self._console.evaluate(record)
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

    def saved(self, path: Path, best: bool) -> None:
        """Tells of a checkpoint; only the best ones are worth a line on the screen."""
        log.info("saved %s%s", path, ", the best" if best else "")

    def note(self, text: str) -> None:
        """Shows a message."""
        log.info("%s", text)
        if self._console is not None:
            self._console.note(text)

    def finished(self) -> None:
        """Shows the outcome."""
        log.info("finished")
        if self._console is not None:
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
    """

    def __init__(
        self, devices: list[dict[str, Any]], rank: int, interval_s: float, folder: RunFolder
    ) -> None:
        self._devices = devices
        self._rank = rank
        self._on_gpu = devices[rank]["uuid"] is not None
        self._fields = _GPU_FIELDS if self._on_gpu else _PROCESS_FIELDS
        host = devices[rank]["host"]
        own = [i for i, device in enumerate(devices) if device["host"] == host]
        self._places = own if self._on_gpu and own[0] == rank else []
        self._processor = ProcessorSampler()
        self._file = JsonLines(folder.gpu) if own[0] == rank else None
        self._sampler = GpuSampler(
            [devices[i]["uuid"].removeprefix("GPU-") for i in self._places],
            interval_s,
            self._file.write if self._file else None,
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
        values = [0.0] * (len(self._devices) * len(self._fields))
        rows = (
            zip(self._places, self._sampler.means(), strict=True)
            if self._on_gpu
            else [(self._rank, self._processor.means())]
        )
        for place, row in rows:
            for i, field in enumerate(self._fields):
                value = row[field]
                values[place * len(self._fields) + i] = (
                    float(value) if isinstance(value, (int, float)) else math.nan
                )
        return values

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Returns the gpus rows of a train record, and on CPUs the processes rows."""
        width = len(self._fields)
        rows = []
        for i, device in enumerate(self._devices):
            numbers = totals[i * width : (i + 1) * width]
            row = {
                field: None if math.isnan(number) else round(number, 1)
                for field, number in zip(self._fields, numbers, strict=True)
            }
            rows.append((device, row))
        if not self._on_gpu:
            return {
                "gpus": [],
                "processes": [{"rank": d["rank"], "host": d["host"], **row} for d, row in rows],
            }
        gpus = {}
        for device, row in rows:
            index = row.pop("index")
            gpus[device["host"], device["uuid"]] = {
                "host": device["host"],
                "index": None if index is None else int(index),
                "uuid": device["uuid"],
                "name": device["name"],
                **row,
            }
        return {"gpus": list(gpus.values())}


def _gather_devices(parts: Parts) -> list[dict[str, Any]]:
    """Returns rank, host, device, name and UUID of every rank's device. Every rank calls this."""
    device = parts.accelerator.device
    own: dict[str, Any] = {"rank": parts.rank, "host": socket.gethostname(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own |= {"name": properties.name, "uuid": f"GPU-{properties.uuid}"}
    else:
        own |= {"name": "CPU", "uuid": None}
    devices: list[dict[str, Any]] = gather_object([own]) if parts.world_size > 1 else [own]
    return devices


def _run_info(
    config: Config,
    folder: RunFolder,
    parts: Parts,
    index: Index,
    devices: list[dict[str, Any]],
    choices: dict[str, str],
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
        f"cache {choices['cache'].partition(':')[0]}",
        devices=where,
        precision=choices["precision"].partition(":")[0],
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        steps_per_epoch=parts.plan.steps_per_epoch,
        samples_per_epoch=parts.plan.samples_per_epoch,
    )


def _environment(
    parts: Parts, index: Index, devices: list[dict[str, Any]], choices: dict[str, str]
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
        "threads": torch.get_num_threads(),
        "choices": choices,
        "data": {
            "name": index.name,
            "digest": index.digest,
            "shape": [index.channels, index.height, index.width],
            **{name: split.samples for name, split in index.splits.items()},
        },
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
