"""What must hold before anything starts: config, data, device and run folder against one another.

The launcher asks before it launches, so that a mistake costs no process; every worker asks again, because
it can be started by other launchers. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from disttrain.config import Config, differences, load_config
from disttrain.errors import CheckpointError, DataError, UsageError
from disttrain.runfolder import RunFolder
from disttrain.shards.index import Index, data_root, load_index, server_root

_OF_THE_MACHINE = {
    "data.root",
    "data.cache",
    "data.workers",
    "monitor.trackers",
    "monitor.prometheus_dir",
}
"""Keys that may change when a run goes on: they say where samples come from and where numbers go, no more."""


def split_batch(config: Config, world_size: int) -> int:
    """Returns the samples of one forward pass of one process.

    Raises:
        UsageError: the global batch cannot be divided evenly.
    """
    batch, accumulate = config.train.batch_size, config.train.accumulate
    parts = world_size * accumulate
    if batch % parts == 0:
        return batch // parts
    below, above = batch - batch % parts, batch + parts - batch % parts
    sizes = " or ".join(str(size) for size in (below, above) if size)
    worlds = [n for n in range(1, min(batch, 64) + 1) if batch % (n * accumulate) == 0]
    hint = f", or {', '.join(map(str, worlds))} process{'es' * (worlds != [1])}" if worlds else ""
    by = f"{world_size} process{'es' * (world_size > 1)}" + (
        f" x train.accumulate = {accumulate}" if accumulate > 1 else ""
    )
    raise UsageError(
        f"train.batch_size = {batch} cannot be divided by {by}; use a train.batch_size of {sizes}{hint}"
    )


def check_device(config: Config, device: Literal["cuda", "cpu"]) -> None:
    """Raises UsageError for an arithmetic that the device does not have."""
    if device == "cpu" and config.train.precision in {"fp16", "tf32"}:
        raise UsageError(
            f"train.precision = {config.train.precision} needs a GPU; use bf16, fp32 or auto on the CPU"
        )


def check_trackers(config: Config) -> None:
    """Raises UsageError for a tracker that is not installed or a folder that cannot be written."""
    for name in config.monitor.trackers:
        found = importlib.util.find_spec(name)
        if found is None or not found.has_location:  # a folder ./wandb is no package
            raise UsageError(
                f'monitor.trackers: {name} is not installed; pip install "disttrain[{name}]", or leave it out'
            )
    folder = config.monitor.prometheus_dir
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise UsageError(
            f"monitor.prometheus_dir: {folder} is not a folder that can be written; make it, and start "
            "node_exporter with --collector.textfile.directory"
        )


def open_index(config: Config, say: Callable[[str], None]) -> Index:
    """Returns the index of the configured data set; packs the embedded digits on first use.

    Raises:
        DataError: the data set is missing or damaged.
        UsageError: it does not fit the config.
    """
    name, root = config.data.name, config.data.root
    if name == "digits" and server_root(root) is None and not (data_root(root) / name).exists():
        from disttrain.datasets import prepare  # and with it numpy, which a launcher does not need

        prepare(name, source=None, root=root, say=say)
    index = load_index(name, root, strict=config.data.on_error == "stop")
    if "val" not in index.splits:
        raise DataError(f"{index.base or index.folder}: has no val split to evaluate on; make one")
    classes = len(index.classes)
    if config.model.num_classes not in (None, classes):
        raise UsageError(
            f"model.num_classes = {config.model.num_classes}, but {name} has {classes} classes; "
            "set it to that or leave it out"
        )
    smallest = min(index.height, index.width)
    if config.augment.crop_padding >= smallest:
        raise UsageError(
            f"augment.crop_padding = {config.augment.crop_padding} is too much for images of "
            f"{index.width}x{index.height}; at most {smallest - 1}"
        )
    return index


def resume_point(folder: RunFolder, resume: str, config: Config) -> tuple[Path | None, bool]:
    """Decides where a run begins.

    Args:
        folder: the run folder; need not exist.
        resume: auto, never, or the path of a run folder or checkpoint.
        config: the config of this run.

    Returns:
        The checkpoint to go on from, or None for the beginning; and whether the run in the folder has
        finished already, so that there is nothing to do.

    Raises:
        UsageError: the folder holds a run of another config, or one that must not be continued.
        CheckpointError: there is no checkpoint at the path.
    """
    if resume not in {"auto", "never"}:
        found = find_checkpoint(Path(resume))
        if found is None:
            raise CheckpointError(
                f"--resume {resume}: neither a run folder with a checkpoint nor a checkpoint"
            )
        if folder.config.exists() and not found.resolve().is_relative_to(folder.path.resolve()):
            raise UsageError(f"{folder.path}: holds a run already; choose another --run-dir or --resume auto")
        return found, False
    if not folder.config.exists():
        return None, False
    if resume == "never":
        raise UsageError(f"{folder.path}: holds a run; choose another --run-dir or --resume auto")
    changes = differences(load_config(folder.config), config)
    changes = [change for change in changes if change.partition(":")[0] not in _OF_THE_MACHINE]
    if changes:
        raise UsageError(
            f"{folder.path}: holds a run of another config ({'; '.join(changes)}); "
            "undo the change or choose another --run-dir"
        )
    return find_checkpoint(folder.path), folder.status().get("state") == "finished"


def find_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint at a path: the checkpoint itself, or the latest one of a run folder."""
    steps = sorted((path / "checkpoints").glob("step_*"), reverse=True)
    for candidate in (path, path / "checkpoints" / "latest", *steps):
        if (candidate / "MANIFEST.json").exists():
            return candidate
    return None
