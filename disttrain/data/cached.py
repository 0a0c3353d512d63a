"""Takes the samples of each batch from the decoded copy of a split, in host memory or on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Literal

import torch

from disttrain.data.batches import Batch, Window, gather_rows
from disttrain.data.decoded_copy import DecodedSplit
from disttrain.data.epoch_plan import Ids
from disttrain.shards.crops import Crops


class Cached:
    """Loads a decoded split from device or host memory, for one rank.

    Args:
        split: the decoded split.
        device: where the batches are used.
        place: device copies the split to the device; host keeps it in host memory.
    """

    def __init__(self, split: DecodedSplit, device: torch.device, place: Literal["device", "host"]) -> None:
        home = device if place == "device" else torch.device("cpu")
        self._images = torch.from_numpy(split.images).to(home)
        self._labels = torch.from_numpy(split.labels).to(home)
        self._pinned = home.type == "cpu" and device.type == "cuda"

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: Crops | None = None
    ) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order; its images are not cropped."""
        home = self._images.device
        ids = torch.from_numpy(order).to(home)
        for window in windows:
            chosen = ids[
                window if isinstance(window, slice) else torch.from_numpy(window).to(home, non_blocking=True)
            ]
            images, labels = (
                gather_rows(source, chosen, pinned=self._pinned) for source in (self._images, self._labels)
            )
            yield Batch(images, labels, order[window])
