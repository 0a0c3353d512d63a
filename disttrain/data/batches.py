"""What a loader hands to the training loop, and which loader serves a run."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable
from typing import Literal, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor

from disttrain.data.epoch_plan import Ids
from disttrain.errors import UsageError
from disttrain.units import mib
from disttrain.userdirs import decoded_folder

Window = slice | Ids
"""Places in the order of an epoch: a slice, or int64 [B]."""


class Batch(NamedTuple):
    """Samples as they were stored.

    Attributes:
        images: uint8 [B, H, W, C].
        labels: int64 [B].
        ids: what was served, on the host: int64 [B].
    """

    images: Tensor
    labels: Tensor
    ids: Ids

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device; from pinned memory to a GPU the host does not wait for the copy."""
        return Batch(
            self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.ids
        )


class Loader(Protocol):
    """Serves one split to one rank."""

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order, in the memory of the device or else of the host.

        What is in host memory and meant for a GPU is pinned.

        Args:
            order: ids, int64 [samples].
            windows: the places that this rank wants, in the order in which it wants them; may be taken
                some batches ahead.
        """


def gather(source: Tensor, places: Tensor, *, pinned: bool) -> Tensor:
    """Returns the rows of a tensor at some places, int64 [B], in pinned memory if asked."""
    if not pinned:
        return source.index_select(0, places)
    rows = torch.empty((len(places), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
    return torch.index_select(source, 0, places, out=rows)


def choose_cache(
    cache: Literal["auto", "device", "host", "none"],
    needed: int,
    device: torch.device,
    *,
    streamed: bool = False,
) -> tuple[Literal["device", "host", "none"], str]:
    """Decides where the images of a rank come from, and says why.

    The choice changes the speed and nothing else: every place serves the same order.

    Args:
        cache: `data.cache` of the config.
        needed: bytes of the decoded splits.
        device: the device of the rank.
        streamed: whether the data has stages of the user's own, which run in every epoch.

    Raises:
        UsageError: a decoded copy is asked for, but the data has stages of the user's own.
    """
    if streamed:
        if cache not in ("auto", "none"):
            raise UsageError(
                f"data.cache = {cache}, but the stages of data.pipeline run in every epoch; leave it at auto"
            )
        return "none", "data.pipeline: read from the shards in every epoch"
    size = f"{mib(needed)} decoded"
    if cache == "none":
        return "none", "data.cache = none: read from the shards in every epoch"
    if cache == "auto":
        memory, disk = psutil.virtual_memory().available, _free_disk()
        if needed > 0.5 * memory:
            return "none", f"{size}, more than half of the {mib(memory)} of free memory"
        if needed > 0.8 * disk:
            return "none", f"{size}, more than 80 % of the {mib(disk)} free in {decoded_folder()}"
    if device.type == "cpu":
        return (
            "host",
            f"{size}; on a CPU: mapped from the cache, shared by the ranks of the node",
        )
    if cache != "auto":
        return cache, f"data.cache = {cache}"
    free, _ = torch.cuda.mem_get_info(device)
    size += f", {mib(free)} free on the device"
    if needed <= 0.3 * free:
        return "device", f"{size}: fits in 30 % of it"
    return "host", f"{size}: more than 30 % of it"


def _free_disk() -> int:
    folder = decoded_folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
