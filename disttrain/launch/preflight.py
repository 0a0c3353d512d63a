"""What must hold before anything starts: config, data, device and run folder against one another.

The launcher asks before it launches, so that a mistake costs no process; every worker asks again, because
it can be started by other launchers. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from disttrain.config import Config, differences, load_config
from disttrain.errors import CheckpointError, DataError, StorageError, UsageError
from disttrain.files import free_bytes
from disttrain.runs.manifest import (
    MANIFEST,
    canonical,
    newest_sound,
    read_state,
    size,
    step_of,
    verify,
)
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index, data_root, load_index, server_root

FREE_KEYS = {
    "data.root",
    "data.cache",
    "data.workers",
    "train.cuda_graph",
    "checkpoint.keep",
    "monitor.gpu_interval_s",
    "monitor.stall_timeout_s",
    "monitor.trackers",
    "monitor.prometheus_dir",
}
"""Keys that may change when a run goes on and differ between nodes: they say nothing about the experiment."""

_SHARED_BYTES = 2 * 9_637_888
"""What NCCL takes of /dev/shm for each process of a node: a segment in each of at least two rings, of the
size in its messages (github.com/NVIDIA/nccl/issues/342: four GPUs do not fit into the 64 MiB of Docker)."""

_LEAST_BYTES = 2**24
"""Free space below which no run begins: records, logs and a checkpoint of the smallest network."""


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
        from disttrain.shards.datasets import prepare  # and with it numpy, which a launcher does not need

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


def check_weights(config: Config) -> None:
    """Checks that the weights to begin with are there.

    Raises:
        UsageError: there is no such file.
    """
    if config.model.weights is not None and not Path(config.model.weights).is_file():
        raise UsageError(f"model.weights: there is no file {config.model.weights}")


def check_shared_memory(
    device: Literal["cuda", "cpu"], local_processes: int, folder: Path = Path("/dev/shm")
) -> None:
    """Checks that NCCL finds the shared memory which it takes between the GPUs of one node.

    Args:
        device: of the processes; on the CPU none of it is used.
        local_processes: processes on this node.
        folder: where the shared memory is mounted.

    Raises:
        StorageError: there is too little.
    """
    if device == "cpu" or local_processes == 1 or os.environ.get("NCCL_SHM_DISABLE") == "1":
        return
    needed, free = local_processes * _SHARED_BYTES, free_bytes(folder)
    if free is not None and free < needed:
        raise StorageError(
            f"{folder}: NCCL takes {needed:,} bytes for {local_processes} GPUs, {free:,} bytes are free; "
            "start the container with --shm-size=1g or --ipc=host, or set NCCL_SHM_DISABLE=1, which is slower"
        )


def check_space(folder: Path, needed_bytes: int, keep: int) -> str | None:
    """Checks that at least one more checkpoint fits.

    Args:
        folder: the checkpoints folder.
        needed_bytes: of one checkpoint.
        keep: checkpoints that are kept besides the best one; one more is there while it is written.

    Returns:
        What to tell the user if there is space for one but not for all that will be kept, else None.

    Raises:
        StorageError: not even one fits.
    """
    free = free_bytes(folder)
    if free is None:
        return None
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: a checkpoint does not fit: {needed_bytes:,} bytes needed, {free:,} bytes free; "
            "free some space or choose another --run-dir"
        )
    missing = keep + 2 - sum(step_of(path) >= 0 for path in folder.glob("step_*"))
    if free < missing * needed_bytes:
        return (
            f"{folder}: {free:,} bytes free are enough for {free // needed_bytes} of the {missing} further "
            f"checkpoints of {needed_bytes:,} bytes that are kept at once"
        )
    return None


def check_room(folder: Path, checkpoint: Path | None) -> None:
    """Checks, before the size of a checkpoint is known, that a run can begin or go on at all.

    Raises:
        StorageError: the disk is as good as full.
    """
    needed = _LEAST_BYTES + (0 if checkpoint is None else size(checkpoint))
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise StorageError(
            f"{folder}: the disk is full: {needed:,} bytes needed, {free:,} bytes free; "
            "free some space or choose another --run-dir"
        )


def identity(config: Config, index: Index, skipped: Sequence[int] | None = ()) -> dict[str, Any]:
    """Returns what tells one experiment from another; it is saved with every checkpoint.

    Args:
        config: the resolved config.
        index: its data set.
        skipped: ids of the train split that are left out; None where that is not known yet.

    Returns:
        `config` and its `config_digest`; `data`: name, digest, samples of each split and what is left out;
        `order`: the digest of what decides the order of the samples of an epoch, None if not known.
    """
    document = config.model_dump(mode="json")
    data: dict[str, Any] = {
        "name": index.name,
        "digest": index.digest,
        **{name: split.samples for name, split in index.splits.items()},
    }
    order = None
    if skipped is not None:
        ids = [int(i) for i in skipped]
        data |= {"skipped": len(ids), "skipped_digest": _digest(ids) if ids else None}
        shards = [shard.samples for shard in index.splits["train"].shards]
        served = [config.data.remainder, config.data.streams, config.data.shuffle_buffer]
        order = _digest([config.seed, config.train.batch_size, *served, shards, ids])
    return {"config": document, "config_digest": _digest(document), "data": data, "order": order}


def saved_identity(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity that the state of a checkpoint holds.

    Raises:
        CheckpointError: it lacks a part of it.
    """
    for key in ("step", "config", "config_digest", "data", "order"):
        if key not in state:
            raise CheckpointError(f"{checkpoint}: has no {key} in its state; use another checkpoint")
    return {key: state[key] for key in ("config", "config_digest", "data", "order")}


def changes_since(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line `key: old -> new` for each difference between two identities that matters.

    Args:
        saved: of a checkpoint, or with the key `config` alone.
        now: of this run; what it does not know is not compared.
    """
    try:  # keys that were added to the schema since have their defaults
        old = Config.model_validate_json(canonical(saved["config"])).model_dump(mode="json")
    except pydantic.ValidationError:  # of another version: its own keys are differences
        old = dict(saved["config"])
    new = dict(now["config"])
    for key in now["data"].keys() & saved.get("data", {}).keys():
        old["data"] = old["data"] | {key: saved["data"][key]}
        new["data"] = new["data"] | {key: now["data"][key]}
    return [line for line in differences(old, new) if line.partition(":")[0] not in FREE_KEYS]


def refuse(what: str, changes: Sequence[str]) -> UsageError:
    """Returns the error to raise where changes need --force."""
    return UsageError(
        "\n  ".join([f"{what} another config or data set:", *changes])
        + "\nundo the change, choose another --run-dir, or go on all the same with --force"
    )


def _digest(document: Any) -> str:
    return hashlib.sha256(canonical(document)).hexdigest()


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from, or None for the beginning.
        step: optimizer steps taken until then.
        finished: the run in the folder has finished already, there is nothing to do.
        notes: lines for the user: what was found, and what was passed over and why.
        changes: differences from what is gone on with that `--force` lets pass, as `key: old -> new`.
    """

    checkpoint: Path | None
    step: int = 0
    finished: bool = False
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def is_finished(folder: RunFolder, now: Mapping[str, Any]) -> bool:
    """Tells whether the run in a folder is the one of this identity and has finished; any node may ask."""
    if not folder.config.exists() or folder.status().get("state") != "finished":
        return False
    return not changes_since({"config": load_config(folder.config).model_dump(mode="json")}, now)


def resume_point(folder: RunFolder, resume: str, now: Mapping[str, Any], *, force: bool = False) -> Start:
    """Decides where a run begins; changes nothing.

    Args:
        folder: the run folder; need not exist.
        resume: auto, never, or the path of a run folder or checkpoint.
        now: the identity of this run.
        force: go on although config or data set have changed.

    Raises:
        UsageError: the folder holds a run that must not be continued, or one of another config or data set.
        CheckpointError: there is no checkpoint at the path, or none that is sound.
    """
    saved: Mapping[str, Any] | None = None
    if folder.config.exists():
        if resume == "never":
            raise UsageError(f"{folder.path}: holds a run; choose another --run-dir or --resume auto")
        saved = {"config": load_config(folder.config).model_dump(mode="json")}
    if resume == "auto" and is_finished(folder, now):
        return Start(None, finished=True)
    if resume == "never":
        return Start(None)

    elsewhere = None if resume == "auto" else resume
    checkpoint, damages = (None, []) if elsewhere else newest_sound(folder.checkpoints)
    if elsewhere is None and checkpoint is None:  # it may have begun with another run's and have none yet
        elsewhere = folder.status().get("began_from")
    if elsewhere is not None:
        checkpoint, damages = _at(Path(elsewhere))
        inside = checkpoint.resolve().is_relative_to(folder.path.resolve())
        if resume != "auto" and saved is not None and not inside:
            raise UsageError(f"{folder.path}: holds a run already; choose another --run-dir or --resume auto")

    notes = [str(damage) for damage in damages]
    what, step = f"{folder.path}: holds a run of", 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        saved = saved_identity(checkpoint, state)
        what, step = f"{checkpoint}: was saved with", state["step"]
    elif saved is not None:
        notes.append(f"{folder.path}: no checkpoint yet; begins at the beginning")
    changes = [] if saved is None else changes_since(saved, now)
    if changes and not force:
        raise refuse(what, changes)
    return Start(checkpoint, step, notes=tuple(notes), changes=tuple(changes))


def _at(path: Path) -> tuple[Path, list[CheckpointError]]:
    """Returns the checkpoint at a path, or the newest sound one of the run folder there."""
    if (path / "checkpoints").is_dir():
        found, damages = newest_sound(path / "checkpoints")
        if found is not None:
            return found, damages
    elif (path / MANIFEST).exists() or step_of(path) >= 0:
        found = path.resolve()
        verify(found)
        return found, []
    raise CheckpointError(f"--resume {path}: neither a run folder with a checkpoint nor a checkpoint")
