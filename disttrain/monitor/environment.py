"""Facts about a run and its environment, for the console and env.json."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from disttrain import __version__
from disttrain.config import Config
from disttrain.models import parameter_count
from disttrain.monitor.dashboard import RunInfo
from disttrain.runs.runfolder import COMMAND, RunFolder, utc_now
from disttrain.shards.index import Index
from disttrain.training.autotune import Choice
from disttrain.training.state import TrainState
from disttrain.units import gib
from disttrain.urls import shown_command

_PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow", "safetensors")
_COMMUNICATION = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_")  # prefixes of the variables that configure it


def run_info(
    config: Config,
    folder: RunFolder,
    state: TrainState,
    index: Index,
    devices: Sequence[Mapping[str, Any]],
    choices: Mapping[str, Choice],
) -> RunInfo:
    """Returns the facts of a run that stay the same.

    Args:
        config: of the run.
        folder: of the run.
        state: what it trains with.
        index: of its data set.
        devices: of every rank, from `gauges.gather_devices`.
        choices: the automatically chosen settings.
    """
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items())
    if devices[0]["uuid"] is None:
        threads, several = torch.get_num_threads(), len(devices) > 1
        where = f"{len(devices)} process{'es' * several}, CPU, {threads} thread{'s' * (threads > 1)} each"
        where += f", {gib(psutil.virtual_memory().total)} of memory"
    else:
        where = f"{len(devices)} x {' / '.join(sorted({device['name'] for device in devices}))}"
    return RunInfo(
        name=config.name,
        run_dir=str(folder.path),
        model=config.model.name,
        parameters=parameter_count(state.bare_model),
        data=f"{index.name} {splits}, {index.channels}x{index.height}x{index.width}, "
        f"cache {choices['cache'].value}",
        devices=where,
        precision=choices["precision"].value,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        steps_per_epoch=state.plan.steps_per_epoch,
        samples_per_epoch=state.plan.samples_per_epoch,
        best=config.eval.best,
    )


def environment(
    info: RunInfo,
    state: TrainState,
    index: Index,
    devices: Sequence[Mapping[str, Any]],
    choices: Mapping[str, Choice],
) -> dict[str, Any]:
    """Returns the content of env.json without `forced`; arguments as for `run_info`."""
    return {
        "disttrain": __version__,
        "command": os.environ.get(COMMAND) or shown_command(),
        "directory": str(Path.cwd()),
        "started_at": utc_now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "git": git_state(),
        "world_size": state.world_size,
        "devices": devices,
        "communication": _communication(state),
        "threads": torch.get_num_threads(),
        "flops_per_image": state.flops_per_image,
        "device_peak_flops_per_s": state.peak_flops_per_s,
        "choices": {name: str(choice) for name, choice in choices.items()},
        "data": {
            "name": index.name,
            "digest": index.digest,
            "shape": [index.channels, index.height, index.width],
            "classes": index.classes,
            "multi_label": index.multi_label,
            "mean": index.mean,
            "std": index.std,
            **{name: split.samples for name, split in index.splits.items()},
        },
        "run": dataclasses.asdict(info),
    }


def _communication(state: TrainState) -> dict[str, Any] | None:
    """Returns the communication backend and the variables that configure it; None for a single process."""
    if not torch.distributed.is_initialized():
        return None
    on_gpu = state.accelerator.device.type == "cuda"
    return {
        "backend": torch.distributed.get_backend(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "variables": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith(_COMMUNICATION)
        },
    }


def git_state() -> dict[str, Any] | None:
    """Returns the commit of the working folder's git repository and whether it is modified, or None."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(changes)}
    return None
