"""Reads and decodes the shards anew in every epoch, for data sets larger than memory.

A rank reads the samples of its part of each global batch, and nothing else, at their offsets in the shards.
The order of the plan goes through the shards stream by stream, so that the reads of a stream are near one
another; there is nothing to skip when a run resumes. Memory is bounded by the batches under way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from webdataset.pipeline import DataPipeline

from disttrain.data.batches import Batch, Window, gather
from disttrain.data.plan import Ids
from disttrain.parallel import in_order
from disttrain.shards.index import Index
from disttrain.shards.reader import Reader

_PIECE = 64  # samples that one thread reads and decodes at a time


class _Buffer(NamedTuple):
    """A batch that is being filled.

    Attributes:
        ids: what was asked for, int64 [B].
        unique: the same without repetitions, int64 [U].
        inverse: int64 [B], such that ids = unique[inverse]; None if nothing is repeated.
        images: uint8 [U, H, W, C].
        labels: int64 [U].
    """

    ids: Ids
    unique: Ids
    inverse: npt.NDArray[np.intp] | None
    images: torch.Tensor
    labels: torch.Tensor


class Streamed:
    """A split served from its shards, for one rank.

    Args:
        index: the data set.
        split: train or val.
        device: where batches are wanted.
        batch_size: samples in a usual window; so many are decoded ahead, twice.
        workers: threads that read and decode; 0 does it when a batch is asked for.
        say: told of downloads.
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
        self._shape = (index.height, index.width, index.channels)
        self._reader = Reader(index, split, say)
        self._pinned = device.type == "cuda"
        self._workers = workers
        self._batch = -(-batch_size // _PIECE)  # in pieces
        self._ahead = max(2 * workers, 2 * self._batch)

    @property
    def most_bytes(self) -> int:
        """Memory that decoded samples under way take at most, for windows of the usual size."""
        # A window in which samples are repeated is put together from those that are decoded.
        return (self._ahead + 2 + self._batch) * _PIECE * int(np.prod(self._shape))

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order."""
        source = (order[window] for window in windows)
        pipeline = DataPipeline(lambda: source, self._cut, self._decode, self._join)
        batches: Generator[Batch, None, None] = iter(pipeline)
        return batches

    def _cut(self, wanted: Iterable[Ids]) -> Iterator[tuple[_Buffer, slice]]:
        """Makes room for each batch and cuts it into pieces of work."""
        for ids in wanted:
            unique, inverse = np.unique(ids, return_inverse=True)
            repeated = len(unique) < len(ids)
            if not repeated:
                unique = ids  # read in the order of the plan
            count = len(unique)
            images = torch.empty((count, *self._shape), dtype=torch.uint8, pin_memory=self._pinned)
            labels = torch.empty(count, dtype=torch.int64, pin_memory=self._pinned)
            buffer = _Buffer(ids, unique, inverse if repeated else None, images, labels)
            for begin in range(0, count, _PIECE):
                yield buffer, slice(begin, min(begin + _PIECE, count))

    def _decode(self, pieces: Iterable[tuple[_Buffer, slice]]) -> Iterator[tuple[_Buffer, slice]]:
        return in_order(self._fill, pieces, self._workers, self._ahead)

    def _fill(self, work: tuple[_Buffer, slice]) -> tuple[_Buffer, slice]:
        buffer, piece = work
        self._reader.decode(buffer.unique[piece], buffer.images[piece].numpy(), buffer.labels[piece].numpy())
        return work

    def _join(self, pieces: Iterable[tuple[_Buffer, slice]]) -> Iterator[Batch]:
        """Delivers a batch when its last piece has been filled."""
        for buffer, piece in pieces:
            if piece.stop < len(buffer.unique):
                continue
            images, labels = buffer.images, buffer.labels
            if buffer.inverse is not None:
                places = torch.from_numpy(buffer.inverse)
                images, labels = (gather(rows, places, pinned=self._pinned) for rows in (images, labels))
            yield Batch(images, labels, buffer.ids)
