"""Checks before a run starts that config, data, device and run folder fit together.

The launcher checks before it starts any process. Every worker checks again, because other launchers can start
it too. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from disttrain.config import Config, TrainConfig
from disttrain.errors import DataError, StorageError, UsageError
from disttrain.files import free_bytes
from disttrain.runs.manifest import size, step_of
from disttrain.shards.index import Index, check_decoded_side, data_root, load_index, server_root

_SHARED_BYTES = 2 * 9_637_888
"""Shared memory that NCCL uses per process of a node, in /dev/shm: one segment in each of at least two rings.
The size is from its messages (github.com/NVIDIA/nccl/issues/342: Docker's 64 MiB fail with four GPUs)."""

UNIFORM_REMEDY = "use data.sampling=uniform, or pack the data without this class"
"""What to do about a class without samples where all are drawn equally often."""

_LEAST_BYTES = 2**24
"""Least free space to start a run: enough for records, logs and a checkpoint of the smallest network."""


def check_machine(
    config: Config,
    device: Literal["cuda", "cpu"],
    local_processes: int,
    world_size: int,
    say: Callable[[str], None],
) -> Index:
    """Checks that the processes can train an experiment, and returns the index of its data set.

    Raises:
        DisttrainError: device, shared memory, batch size or data set do not fit.
    """
    check_device(config, device)
    check_reproducible(config.train)
    check_shared_memory(device, local_processes)
    split_batch(config, world_size)
    return open_index(config, say)


def split_batch(config: Config, world_size: int) -> int:
    """Returns the samples of a micro-batch: one forward pass of one process.

    Raises:
        UsageError: the global batch is not divisible.
    """
    batch, accumulate = config.train.batch_size, config.train.accumulate
    if config.train.reproducible:
        return _split_for_virtual_ranks(config.train, world_size)
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


def _split_for_virtual_ranks(train: TrainConfig, world_size: int) -> int:
    batch, parts = train.batch_size, train.virtual_ranks
    if batch % parts:
        sizes = " or ".join(str(n) for n in (batch - batch % parts, batch + parts - batch % parts) if n)
        fits = ", ".join(str(n) for n in range(1, min(batch, 64) + 1) if batch % n == 0)
        raise UsageError(
            f"train.batch_size = {batch} cannot be divided by train.virtual_ranks = {parts}; use a "
            f"train.batch_size of {sizes}, or a train.virtual_ranks of {fits}"
        )
    if world_size > parts:
        raise UsageError(
            f"train.reproducible: {world_size} processes are more than train.virtual_ranks = {parts}; use at "
            f"most {parts}, or start a new experiment with train.virtual_ranks={world_size} or more"
        )
    return batch // parts


def check_reproducible(train: TrainConfig) -> None:
    """Raises UsageError if a setting does not go with `train.reproducible`."""
    if train.reproducible and train.compile is True:
        raise UsageError(
            "train.reproducible does not go with train.compile = true, because the compiler times kernels to "
            "choose among them; set train.compile=false"
        )


def check_device(config: Config, device: Literal["cuda", "cpu"]) -> None:
    """Raises UsageError if the device does not support `train.precision`."""
    if device == "cpu" and config.train.precision in {"fp16", "tf32"}:
        raise UsageError(
            f"train.precision = {config.train.precision} needs a GPU; use bf16, fp32 or auto on the CPU"
        )


def check_trackers(config: Config) -> None:
    """Raises UsageError if a tracker is not installed or `monitor.prometheus_dir` is not writable."""
    for name in config.monitor.trackers:
        found = importlib.util.find_spec(name)
        if found is None or not found.has_location:  # a folder ./wandb is not the package
            raise UsageError(
                f'monitor.trackers: {name} is not installed; run pip install "disttrain[{name}]" or remove it'
            )
    folder = config.monitor.prometheus_dir
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise UsageError(
            f"monitor.prometheus_dir: {folder} is not a writable folder; create it, and start "
            "node_exporter with --collector.textfile.directory"
        )


def check_mirror(config: Config) -> None:
    """Raises UsageError if `checkpoint.mirror` is no address to write to, or its package is not installed."""
    if config.checkpoint.mirror is not None:
        from disttrain.shards.stores import open_place

        open_place(config.checkpoint.mirror, timeout_s=1)


def open_index(config: Config, say: Callable[[str], None]) -> Index:
    """Returns the index of the configured data set; packs the built-in digits on first use.

    Raises:
        DataError: the data set is missing or damaged.
        UsageError: the data set does not match the config.
    """
    name, root = config.data.name, config.data.root
    if name == "digits" and server_root(root) is None and not (data_root(root) / name).exists():
        from disttrain.shards.datasets import prepare  # imports numpy, which a launcher rarely needs
        from disttrain.shards.pack import Options

        prepare(name, None, root, Options(say=say))
    index = load_index(name, root, strict=config.data.on_error == "stop")
    data = config.data
    check_decoded_side(data.decoded_side, data.image_size, config.augment.resized_crop)
    index = index.cropped(data.image_size, config.eval.crop_pct, data.decoded_side)
    if "val" not in index.splits:
        raise DataError(f"{index.base or index.folder}: has no val split, which evaluation needs; add one")
    classes = len(index.classes)
    if config.model.num_classes not in (None, classes):
        raise UsageError(
            f"model.num_classes = {config.model.num_classes}, but {name} has {classes} classes; "
            f"set it to {classes} or remove it"
        )
    check_label_keys(config, index)
    for key, metric in _chosen_metrics(config).items():
        if metric == "top5" and classes <= 5:
            raise UsageError(
                f"{key} = top5 needs more than 5 classes, but {name} has {classes}; use accuracy"
            )
    relative_class_weights(config.train, index)
    if config.data.sampling == "balanced":
        counts = index.splits["train"].class_counts
        expect_every_class(index, counts, "data.sampling = balanced", UNIFORM_REMEDY)
    smallest = min(index.height, index.width)
    if config.augment.crop_padding >= smallest:
        raise UsageError(
            f"augment.crop_padding = {config.augment.crop_padding} is too large for images of "
            f"{index.width}x{index.height}; use at most {smallest - 1}"
        )
    return index


def _chosen_metrics(config: Config) -> dict[str, str | None]:
    """Returns the metrics that decide something, by the keys that choose them."""
    rule = config.train.stop_early
    return {"eval.best": config.eval.best, "train.stop_early.metric": rule.metric if rule else None}


def check_label_keys(config: Config, index: Index) -> None:
    """Raises UsageError if a key does not suit a data set with one label a sample, or with any number."""
    loss, sampling, metrics = config.train.loss, config.data.sampling, _chosen_metrics(config)
    if not index.multi_label:
        keys = {"train.loss": (loss == "bce", "bce", "cross_entropy")}
        keys |= {key: (metric == "map", "map", "accuracy") for key, metric in metrics.items()}
        what = "multi-label data, but each sample of {0} has one label"
    else:
        keys = {
            "train.loss": (loss == "cross_entropy", loss, "bce"),
            "data.sampling": (sampling == "balanced", sampling, "uniform"),
        }
        keys |= {key: (metric == "top5", "top5", "map") for key, metric in metrics.items()}
        what = "samples of one label, but those of {0} have several"
    for key, (wrong, value, instead) in keys.items():
        if wrong:
            raise UsageError(f"{key} = {value} is for {what.format(index.name)}; use {key}={instead}")


def expect_every_class(index: Index, counts: Sequence[int], key: str, remedy: str) -> None:
    """Raises UsageError if a class has no training sample; `counts` are those of the classes."""
    empty = [name for name, count in zip(index.classes, counts, strict=True) if count == 0]
    if empty:
        raise UsageError(
            f"{key}: class {empty[0]} has no sample in the train split of {index.name}; {remedy}"
        )


def relative_class_weights(train: TrainConfig, index: Index) -> list[float] | None:
    """Returns the weight of each class in the training loss; None if all samples count the same.

    The mean over the samples of the train split is 1. In multi-label data, a weight is that of the samples
    that have the label, and stays as it is.

    Raises:
        UsageError: `train.class_weights` does not suit the data set.
    """
    if train.class_weights is None:
        return None
    counts = index.splits["train"].class_counts
    if train.class_weights == "balanced":
        remedy = f"give a list with a weight for each of the {len(counts)} classes"
        expect_every_class(index, counts, "train.class_weights = balanced", remedy)
        samples = index.splits["train"].samples
        weights = [(max(1, samples - count) if index.multi_label else 1) / count for count in counts]
    else:
        weights = list(train.class_weights)
    if len(weights) != len(counts):
        raise UsageError(
            f"train.class_weights has {len(weights)} numbers, but {index.name} has {len(counts)} classes; "
            f"give one for each, in the order of `disttrain data inspect {index.name}`"
        )
    if index.multi_label:
        return weights
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)
    if mean == 0:
        raise UsageError(
            "train.class_weights: no training sample has a weight above 0; raise that of a class with samples"
        )
    return [weight / mean for weight in weights]


def check_shared_memory(
    device: Literal["cuda", "cpu"], local_processes: int, folder: Path = Path("/dev/shm")
) -> None:
    """Raises StorageError if NCCL needs more shared memory for the GPUs of this node than is free."""
    if device == "cpu" or local_processes == 1 or os.environ.get("NCCL_SHM_DISABLE") == "1":
        return
    needed, free = local_processes * _SHARED_BYTES, free_bytes(folder)
    if free is not None and free < needed:
        raise StorageError(
            f"{folder}: NCCL needs {needed:,} bytes for {local_processes} GPUs, but {free:,} bytes are free; "
            "start the container with --shm-size=1g or --ipc=host, or set NCCL_SHM_DISABLE=1, which is slower"
        )


def check_space(folder: Path, needed_bytes: int, keep: int) -> str | None:
    """Checks that at least one more checkpoint of this size fits on the disk.

    Returns:
        A warning if one fits, but not all that exist at the same time: those kept, the best one, and one
        being written. Otherwise None.

    Raises:
        StorageError: not even one fits.
    """
    free = _free(folder, needed_bytes, "a checkpoint does not fit")
    missing = keep + 2 - sum(step_of(path) >= 0 for path in folder.glob("step_*"))
    if free is not None and free < missing * needed_bytes:
        return (
            f"{folder}: {free:,} bytes free are enough for only {free // needed_bytes} of the {missing} "
            f"further checkpoints ({needed_bytes:,} bytes each) that the run keeps"
        )
    return None


def check_room(folder: Path, checkpoint: Path | None) -> None:
    """Raises StorageError if the disk is almost full; used before the size of a checkpoint is known."""
    needed = _LEAST_BYTES + (0 if checkpoint is None else size(checkpoint))
    _free(folder, needed, "the disk is full")


def _free(folder: Path, needed_bytes: int, problem: str) -> int | None:
    """Returns the free bytes, or None if unknown; raises StorageError if there are too few."""
    free = free_bytes(folder)
    if free is not None and free < needed_bytes:
        raise StorageError(
            f"{folder}: {problem}: {needed_bytes:,} bytes needed, {free:,} bytes free; "
            "free some space or choose another --run-dir"
        )
    return free
