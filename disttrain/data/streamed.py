"""Reads and decodes the shards again in every epoch, for data sets larger than memory.

A rank reads only the samples of its part of each global batch, at their offsets in the shards. The epoch plan
reads the shards in streams, so that the reads of a stream are close together. A resumed run has nothing to
skip. Memory depends only on the number of batches in flight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from disttrain.data.batches import Batch, Window, gather_rows
from disttrain.data.decoded_copy import ReducedSplit
from disttrain.data.epoch_plan import Ids
from disttrain.parallel import ordered_map
from disttrain.shards.crops import Crops
from disttrain.shards.index import Index
from disttrain.shards.reader import Reader

CHUNK = 64  # samples that one thread reads and decodes at a time
_LARGE_CHUNK = 16  # the same if they are cropped from images of any size, which are usually large


class Wanted(NamedTuple):
    """A requested batch.

    Attributes:
        ids: the requested ids, int64 [B].
        unique: the ids at `positions`, int64 [U].
        positions: the requested positions in the order of the epoch without repetitions, int64 [U].
        inverse: int64 [B] with ids = unique[inverse]; None without repetitions.
        images: buffer for the images of `unique`, uint8 [U, H, W, C].
        labels: buffer for the labels of `unique`; see `Batch`.
    """

    ids: Ids
    unique: Ids
    positions: Ids
    inverse: npt.NDArray[np.intp] | None
    images: torch.Tensor
    labels: torch.Tensor

    def batch(self) -> Batch:
        """Returns the batch; call it after `images` and `labels` are filled."""
        images, labels = self.images, self.labels
        if self.inverse is not None:
            places, pinned = torch.from_numpy(self.inverse), images.is_pinned()
            images, labels = (gather_rows(rows, places, pinned=pinned) for rows in (images, labels))
        return Batch(images, labels, self.ids)


class Streamed:
    """Loads a split from its shards, for one rank.

    Args:
        index: the data set.
        split: train or val.
        device: where the batches are used.
        batch_size: samples in a usual window; two of them are decoded ahead.
        workers: threads that read and decode; with 0, the calling thread does it.
        say: called with messages about downloads.
        copy: takes the samples from here instead of the shards.

    Attributes:
        index: the data set.
        shape: height, width and channels of an image.
        reader: reads the samples from the shards.
        workers: number of threads.
        chunk: samples that one thread reads and decodes at a time.
        ahead: number of chunks that are decoded ahead.
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
        copy: ReducedSplit | None = None,
    ) -> None:
        self.index = index
        self.shape = (index.height, index.width, index.channels)
        self.reader = Reader(index, split, say)
        self._copy = copy
        self._pinned = device.type == "cuda"
        self.workers = workers
        self.chunk = CHUNK if index.image_size is None else _LARGE_CHUNK
        self._batch = -(-batch_size // self.chunk)  # in chunks
        self.ahead = max(2 * workers, 2 * self._batch)

    @property
    def most_bytes(self) -> int:
        """The most memory that decoded samples take at once, for windows of the usual size."""
        # A window with repeated samples is copied from the decoded ones, into one more batch.
        return (self.ahead + 2) * self.chunk * int(np.prod(self.shape)) + self.batch_bytes

    @property
    def batch_bytes(self) -> int:
        """Memory of a batch of the usual size, in whole chunks."""
        return self._batch * self.chunk * int(np.prod(self.shape))

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: Crops | None = None
    ) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order; see `Loader`."""
        wanted = (self.wanted(order, window) for window in windows)
        chunks = ((due, part) for due in wanted for part in chunk_slices(len(due.unique), self.chunk))
        fill = partial(self._fill, crops)
        with contextlib.closing(ordered_map(fill, chunks, self.workers, self.ahead)) as filled:
            for due, chunk in filled:
                if chunk.stop == len(due.unique):
                    yield due.batch()

    def wanted(self, order: Ids, window: Window) -> Wanted:
        """Allocates the buffers of the batch at a window of an order."""
        positions = np.arange(*window.indices(len(order))) if isinstance(window, slice) else window
        kept, inverse = unique(positions)
        ids = order[window]
        images = torch.empty((len(kept), *self.shape), dtype=torch.uint8, pin_memory=self._pinned)
        labels = torch.from_numpy(self.index.empty_labels(len(kept)))
        if self._pinned:
            labels = labels.pin_memory()
        return Wanted(ids, order[kept], kept, inverse, images, labels)

    def _fill(self, crops: Crops | None, work: tuple[Wanted, slice]) -> tuple[Wanted, slice]:
        due, part = work
        images, labels = due.images[part].numpy(), due.labels[part].numpy()
        ids, positions = due.unique[part], due.positions[part]
        if self._copy is None or crops is None:
            self.reader.decode(ids, images, labels, positions, crops)
        else:
            self._copy.decode(ids, images, labels, positions, crops)
        return work


def unique(positions: Ids) -> tuple[Ids, npt.NDArray[np.intp] | None]:
    """Returns each position once, int64 [U], and `inverse` with positions = unique[inverse].

    Without repetitions, the positions keep their order, and the inverse is None.
    """
    kept, inverse = np.unique(positions, return_inverse=True)
    return (kept, inverse) if len(kept) < len(positions) else (positions, None)


def chunk_slices(count: int, size: int) -> Iterator[slice]:
    """Yields the chunks, of `size` samples, of `count` samples."""
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))
