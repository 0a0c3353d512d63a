"""A packed data set for your own training loop: an iterable over its epochs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from disttrain.data.batches import Batch, Loader, choose_cache, streaming_reason, training_crops
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import open_reduced, open_split
from disttrain.data.epoch_plan import Ids, Plan, rank_slice
from disttrain.data.stages import Pipeline, open_stream
from disttrain.errors import DataError, UsageError
from disttrain.parallel import usable_cores
from disttrain.shards.index import check_decoded_side, load_index


@dataclass
class OpenData:
    """Loads a split of a packed data set for one rank. Every rank opens it.

    Each iteration over it is the next epoch; `epoch` returns any epoch. In an epoch, the ranks together get
    every sample exactly once. The order depends only on the seed and the number of the epoch. All ranks get
    the same number of batches.

    Attributes:
        name: name of the data set, like `data.name`.
        split: train or val.
        batch_size: the global batch; each rank gets its share.
        root: folder of the data sets, like `data.root`.
        seed: seed of the order.
        shuffle: None shuffles only train; False keeps the order of the index.
        drop_remainder: drop the samples that do not fill the last batch. Otherwise the last batch is smaller,
            and may be empty on some ranks.
        cache: where the decoded images are kept, like `data.cache`.
        image_size: side of the squares that images are cropped to, like `data.image_size`.
        resized_crop: random crops of the train split, like `augment.resized_crop`; needs `image_size`.
        crop_pct: the crop of the other splits, like `eval.crop_pct`.
        decoded_side: reduces the train split first, like `data.decoded_side`; needs `resized_crop`.
        pipeline: a function that returns the stages which read, decode and batch. `data.pipeline` has its
            name.
        device: where the batches are used.
        rank: this rank; None reads it from torch.distributed or $RANK.
        world_size: number of ranks; None reads it from torch.distributed or $WORLD_SIZE.
        say: called with messages about decoding and downloads.
        index: classes, channels, height, width, mean, std, and the number of samples of each split.

    Raises:
        UsageError: the batch size or the rank is invalid.
        DataError: the data set is missing or damaged, or has no such split.
    """

    name: str
    split: str = "train"
    _: KW_ONLY
    batch_size: int
    root: str | None = None
    seed: int = 0
    shuffle: bool | None = None
    drop_remainder: bool = False
    cache: Literal["auto", "device", "host", "none"] = "auto"
    image_size: int | None = None
    resized_crop: float | None = None
    crop_pct: float = 0.875
    decoded_side: int | None = None
    pipeline: Pipeline | None = None
    device: str | torch.device = "cpu"
    rank: int | None = None
    world_size: int | None = None
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        group = dist.is_available() and dist.is_initialized()
        rank, world_size = self.rank, self.world_size
        if rank is None:
            rank = dist.get_rank() if group else int(os.environ.get("RANK", "0"))
        if world_size is None:
            world_size = dist.get_world_size() if group else int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world_size <= self.batch_size:
            raise UsageError(
                f"rank {rank} of {world_size} with batch_size = {self.batch_size}: the rank must be below "
                "the world size, and batch_size at least the world size"
            )
        side = self.decoded_side if self.split == "train" else None
        check_decoded_side(side, self.image_size, self.resized_crop)
        self.index = load_index(self.name, self.root).cropped(self.image_size, self.crop_pct, side)
        if self.split not in self.index.splits:
            raise DataError(
                f"{self.name}: has no split {self.split!r}; it has {', '.join(self.index.splits)}"
            )
        self._rank, self._world_size, self._device = rank, world_size, torch.device(self.device)
        self._shuffle = self.split == "train" if self.shuffle is None else self.shuffle
        shards = tuple(shard.samples for shard in self.index.splits[self.split].shards)
        self._plan = Plan(self.seed, shards, self.batch_size, self.drop_remainder)
        self._loader = self._open()
        self._next = 0

    def _open(self) -> Loader:
        reason = streaming_reason(self.index, self.pipeline)
        reduced = self.index.decoded_side is not None
        place, _ = choose_cache(
            self.cache, self.index.decoded_bytes, self._device, streamed=reason, reduced=reduced
        )
        none_skipped = np.empty(0, np.int64)
        if place != "none" and not reduced:
            split = open_split(self.index, self.split, none_skipped, self.say)
            return Cached(split, self._device, place)
        return open_stream(
            self.index,
            self.split,
            self._device,
            batch_size=-(-self.batch_size // self._world_size),
            workers=min(8, usable_cores()),
            say=self.say,
            pipeline=self.pipeline,
            copy=open_reduced(self.index, none_skipped, self.say) if place == "host" else None,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a label is a position in this list."""
        return self.index.classes

    def __len__(self) -> int:
        """Returns the number of batches in an epoch, the same on all ranks."""
        return self._plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the next epoch."""
        number, self._next = self._next, self._next + 1
        return self.epoch(number)

    def epoch(self, number: int, first: int = 0) -> Generator[Batch, None, None]:
        """Yields this rank's batches of an epoch: images uint8 [B, H, W, C], labels and ids; see `Batch`.

        Args:
            number: number of the epoch, from 0.
            first: batches to skip, to resume in the middle of an epoch.
        """
        order: Ids = self._plan.order(number) if self._shuffle else self._plan.ids
        places = (self._plan.batch(step) for step in range(first, len(self)))
        shares = [rank_slice(batch, self._rank, self._world_size) for batch in places]
        windows = (slice(own.start, own.stop) for own in shares if own)
        crops = None
        if self.split == "train":
            crops = training_crops(self.image_size, self.resized_crop, self.seed, number)
        with contextlib.closing(self._loader.batches(order, windows, crops)) as batches:
            for batch in batches:
                yield batch.to(self._device)
        if shares and not shares[-1]:  # only the last batch can be smaller than the number of ranks
            shape = (0, self.index.height, self.index.width, self.index.channels)
            images = torch.empty(shape, dtype=torch.uint8, device=self._device)
            yield Batch(images, torch.from_numpy(self.index.empty_labels(0)).to(self._device), order[:0])


open_data = OpenData
