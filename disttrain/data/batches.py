"""The batches of a loader, the interface of the loaders, and the choice between them."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable
from typing import Literal, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor

from disttrain.config import AugmentConfig, Config
from disttrain.data.epoch_plan import Ids
from disttrain.errors import UsageError
from disttrain.shards.crops import Crops, RandomCrops
from disttrain.shards.index import Index
from disttrain.units import mib
from disttrain.userdirs import decoded_folder

Window = slice | Ids
"""Positions in the order of an epoch: a slice, or int64 [B]."""


class Batch(NamedTuple):
    """Stored samples, before augmentation.

    Attributes:
        images: uint8 [B, H, W, C].
        labels: int64 [B]; of multi-label data uint8 [B, classes], with a 1 for each label.
        ids: sample ids, int64 [B], on the host.
    """

    images: Tensor
    labels: Tensor
    ids: Ids

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device; a copy from pinned memory to a GPU is asynchronous."""
        return Batch(
            self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.ids
        )


class Loader(Protocol):
    """Loads the samples of one split for one rank."""

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: Crops | None = None
    ) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order, in device or host memory.

        Host memory for a GPU is pinned.

        Args:
            order: ids, int64 [samples].
            windows: the positions of each batch of this rank. The loader may read some windows ahead.
            crops: chooses the crops of a data set with `data.image_size`; None means those of an evaluation.
        """


def gather_rows(source: Tensor, places: Tensor, *, pinned: bool) -> Tensor:
    """Returns the rows of a tensor at `places`, int64 [B], in pinned memory if `pinned`."""
    if not pinned:
        return source.index_select(0, places)
    rows = torch.empty((len(places), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
    return torch.index_select(source, 0, places, out=rows)


def training_crops(image_size: int | None, resized_crop: float | None, seed: int, epoch: int) -> Crops | None:
    """Returns the crops of the training images in an epoch; None means those of an evaluation.

    Args:
        image_size: `data.image_size`. If it is None, images are not cropped while they are decoded.
        resized_crop: `augment.resized_crop`.
        seed: of the run.
        epoch: from 0.
    """
    if image_size is None or resized_crop is None:
        return None
    return RandomCrops(seed, epoch, resized_crop)


def on_device(config: Config) -> AugmentConfig:
    """Returns the augmentation that is left for the device: the loader makes `training_crops`."""
    if config.data.image_size is None:
        return config.augment
    return config.augment.model_copy(update={"resized_crop": None})


def streaming_reason(index: Index, pipeline: object) -> str | None:
    """Returns why the shards must be read in every epoch, or None: user stages, or images to be cropped.

    Images that are reduced to `data.decoded_side` first need not be.
    """
    if pipeline is not None:
        return "the stages of data.pipeline run"
    if index.image_size is not None and index.decoded_side is None:
        return "images of any size (data.image_size) are decoded and cropped"
    return None


def choose_cache(
    cache: Literal["auto", "device", "host", "none"],
    needed: int,
    device: torch.device,
    *,
    streamed: str | None = None,
    reduced: bool = False,
) -> tuple[Literal["device", "host", "none"], str]:
    """Chooses where a rank's images are cached, and returns the choice and the reason.

    The choice only affects the speed; the order of the samples is the same.

    Args:
        cache: `data.cache` of the config.
        needed: bytes of the decoded splits.
        device: the device of the rank.
        streamed: why the shards must be read in every epoch, or None.
        reduced: whether the images have several sizes, reduced to `data.decoded_side`.

    Raises:
        UsageError: the config asks for a cache that is not possible.
    """
    if streamed:
        if cache not in ("auto", "none"):
            raise UsageError(f"data.cache = {cache}, but {streamed} in every epoch; set it to auto")
        return "none", f"{streamed} in every epoch"
    if reduced and cache == "device":
        raise UsageError(
            "data.cache = device, but the CPU cuts the crops out of images of several sizes; set it to host "
            "or auto"
        )
    size = f"{mib(needed)} decoded"
    if cache == "none":
        return "none", "data.cache = none: read from the shards in every epoch"
    if cache == "auto":
        memory, disk = psutil.virtual_memory().available, _free_disk()
        if needed > 0.5 * memory:
            return "none", f"{size}, more than half of the {mib(memory)} of free memory"
        if needed > 0.8 * disk:
            return "none", f"{size}, more than 80 % of the {mib(disk)} free in {decoded_folder()}"
    if device.type == "cpu" or reduced:
        where = "train images reduced to data.decoded_side" if reduced else "on a CPU"
        return "host", f"{size}; {where}: mapped from the decoded copy, shared by the ranks of the node"
    if cache != "auto":
        return cache, f"data.cache = {cache}"
    free, _ = torch.cuda.mem_get_info(device)
    size += f", {mib(free)} free on the device"
    if needed <= 0.3 * free:
        return "device", f"{size}: at most 30 % of it"
    return "host", f"{size}: more than 30 % of it"


def _free_disk() -> int:
    folder = decoded_folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
