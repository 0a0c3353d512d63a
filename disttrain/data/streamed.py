"""Reads and decodes the shards anew in every epoch, for data sets larger than memory.

A rank reads the samples of its part of each global batch, and nothing else, at their offsets in the shards.
The order of the plan goes through the shards stream by stream, so that the reads of a stream are near one
another; there is nothing to skip when a run resumes. Memory is bounded by the batches under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from disttrain.data.batches import Batch, Window, gather
from disttrain.data.epoch_plan import Ids
from disttrain.parallel import ordered_map
from disttrain.shards.index import Index
from disttrain.shards.reader import Reader

PIECE = 64  # samples that one thread reads and decodes at a time


class Wanted(NamedTuple):
    """A batch that is due.

    Attributes:
        ids: what was asked for, int64 [B].
        unique: the same without repetitions, int64 [U].
        inverse: int64 [B], such that ids = unique[inverse]; None if nothing is repeated.
        images: takes those of `unique`, uint8 [U, H, W, C].
        labels: int64 [U].
    """

    ids: Ids
    unique: Ids
    inverse: npt.NDArray[np.intp] | None
    images: torch.Tensor
    labels: torch.Tensor

    def batch(self) -> Batch:
        """Returns the batch, when `images` and `labels` are filled."""
        images, labels = self.images, self.labels
        if self.inverse is not None:
            places, pinned = torch.from_numpy(self.inverse), images.is_pinned()
            images, labels = (gather(rows, places, pinned=pinned) for rows in (images, labels))
        return Batch(images, labels, self.ids)


class Streamed:
    """A split served from its shards, for one rank.

    Args:
        index: the data set.
        split: train or val.
        device: where batches are wanted.
        batch_size: samples in a usual window; so many are decoded ahead, twice.
        workers: threads that read and decode; 0 does it when a batch is asked for.
        say: told of downloads.

    Attributes:
        index: the data set.
        shape: height, width and channels of an image.
        reader: of its samples.
        workers: threads.
        ahead: pieces of work that may be done or under way before they are asked for.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        device: torch.device,
        *,
        batch_size: int,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        self.index = index
        self.shape = (index.height, index.width, index.channels)
        self.reader = Reader(index, split, say)
        self._pinned = device.type == "cuda"
        self.workers = workers
        self._batch = -(-batch_size // PIECE)  # in pieces
        self.ahead = max(2 * workers, 2 * self._batch)

    @property
    def most_bytes(self) -> int:
        """Memory that decoded samples under way take at most, for windows of the usual size."""
        # A window in which samples are repeated is put together from those that are decoded.
        return (self.ahead + 2) * PIECE * int(np.prod(self.shape)) + self.batch_bytes

    @property
    def batch_bytes(self) -> int:
        """Memory of a batch of the usual size, in whole pieces."""
        return self._batch * PIECE * int(np.prod(self.shape))

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order."""
        wanted = (self.wanted(order[window]) for window in windows)
        pieces = ((due, piece) for due in wanted for piece in cut(len(due.unique)))
        with contextlib.closing(ordered_map(self._fill, pieces, self.workers, self.ahead)) as filled:
            for due, piece in filled:
                if piece.stop == len(due.unique):
                    yield due.batch()

    def wanted(self, ids: Ids) -> Wanted:
        """Makes room for a batch."""
        kept, inverse = unique(ids)
        images = torch.empty((len(kept), *self.shape), dtype=torch.uint8, pin_memory=self._pinned)
        labels = torch.empty(len(kept), dtype=torch.int64, pin_memory=self._pinned)
        return Wanted(ids, kept, inverse, images, labels)

    def _fill(self, work: tuple[Wanted, slice]) -> tuple[Wanted, slice]:
        due, piece = work
        self.reader.decode(due.unique[piece], due.images[piece].numpy(), due.labels[piece].numpy())
        return work


def unique(ids: Ids) -> tuple[Ids, npt.NDArray[np.intp] | None]:
    """Returns each id once, int64 [U], and the places such that ids = kept[places]; None if none repeats."""
    kept, places = np.unique(ids, return_inverse=True)
    return (kept, places) if len(kept) < len(ids) else (ids, None)  # read in the order of the plan


def cut(count: int) -> Iterator[slice]:
    """Cuts a number of samples into what one thread reads and decodes at a time."""
    return (slice(begin, min(begin + PIECE, count)) for begin in range(0, count, PIECE))
