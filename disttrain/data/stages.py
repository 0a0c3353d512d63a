"""A user's own stages between the shards and the batches: `data.pipeline`.

The stages are those of a webdataset pipeline: functions from one iterator to the next, of ordinary webdataset
samples. Without stages of one's own `streamed.py` does the same in one go, which takes a tenth less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from disttrain.data.batches import Batch, Window
from disttrain.data.epoch_plan import Ids
from disttrain.data.streamed import PIECE, Streamed, Wanted, cut
from disttrain.errors import DisttrainError, UsageError, describe
from disttrain.parallel import ordered_map
from disttrain.shards.images import ImageError, decode_into
from disttrain.shards.index import Index
from disttrain.shards.reader import Sample, sample_error
from disttrain.shards.tar import IMAGE_EXTENSIONS
from disttrain.user_code import import_target

Stage: TypeAlias = Callable[[Iterable[Any]], Iterator[Any]]


class Stages(NamedTuple):
    """The stages of an epoch. A function of the user's takes them and returns those to use, in order.

    It may put stages of its own between them or in their place, such as `webdataset.map(function)`. Every
    sample that comes in has to come out, once and in its order.

    Attributes:
        source: yields the samples of this rank as webdataset has them: `__key__`, `__url__`, the image file
            under its extension and the label under `cls`, in bytes; and `__id__`, the place in the split.
        decode: puts `image`, uint8 [H, W, C], in the place of the image file, and an int into `cls`.
        batch: collects them into batches.
        threaded: makes a stage of a function of one sample, which the decoding threads call.
    """

    source: Callable[[], Iterator[Sample]]
    decode: Stage
    batch: Stage
    threaded: Callable[[Callable[[Sample], Sample]], Stage]


Pipeline: TypeAlias = Callable[[Stages], Sequence[Callable[..., Any]]]


class Staged(Streamed):
    """A split served from its shards through a user's stages, for one rank.

    Args:
        index: the data set.
        split: train or val.
        device: where batches are wanted.
        batch_size: samples in a usual window; so many are decoded ahead, twice.
        workers: threads that read, and as many that decode; 0 does it when a batch is asked for.
        say: told of downloads.
        pipeline: arranges the stages.
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
        pipeline: Pipeline,
    ) -> None:
        super().__init__(index, split, device, batch_size=batch_size, workers=workers, say=say)
        self._index = index
        self._pipeline = pipeline

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order.

        Raises:
            UsageError: the pipeline fails, or does not give the samples that are due.
        """
        from webdataset.pipeline import DataPipeline  # not where no run needs it

        ahead, due = itertools.tee(self.wanted(order[window]) for window in windows)
        stages = Stages(partial(self._read, ahead), self._decode, partial(self._collect, due), self._threaded)
        try:
            for batch in DataPipeline(*self._pipeline(stages)):
                if not isinstance(batch, Batch):
                    raise UsageError(
                        f"data.pipeline: gives a {type(batch).__name__}; its last stage is stages.batch"
                    )
                yield batch
        except DisttrainError:
            raise
        except Exception as error:
            raise UsageError(f"data.pipeline: {describe(error)}") from error

    def _read(self, wanted: Iterable[Wanted]) -> Iterator[Sample]:
        pieces = (due.unique[piece] for due in wanted for piece in cut(len(due.unique)))
        return itertools.chain.from_iterable(ordered_map(self._reader.samples, pieces, self._workers))

    def _decode(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        return self._in_pieces(self._decode_piece, samples)

    def _threaded(self, function: Callable[[Sample], Sample]) -> Stage:
        return partial(self._in_pieces, lambda piece: list(map(function, piece)))

    def _in_pieces(
        self, work: Callable[[list[Sample]], list[Sample]], samples: Iterable[Sample]
    ) -> Iterator[Sample]:
        source = iter(samples)
        pieces = iter(lambda: list(itertools.islice(source, PIECE)), [])
        return itertools.chain.from_iterable(ordered_map(work, pieces, self._workers, self._ahead))

    def _decode_piece(self, samples: list[Sample]) -> list[Sample]:
        images = np.empty((len(samples), *self._shape), np.uint8)
        files = [sample.pop(next(filter(sample.__contains__, IMAGE_EXTENSIONS))) for sample in samples]
        try:
            decode_into(files, images)
        except ImageError as error:
            bad = samples[error.place]
            raise sample_error(self._index, bad["__url__"], bad["__key__"], error) from None
        for sample, image in zip(samples, images, strict=True):
            sample["image"], sample["cls"] = image, int(sample["cls"])
        return samples

    def _collect(self, wanted: Iterable[Wanted], samples: Iterable[Sample]) -> Iterator[Batch]:
        source = iter(samples)
        for due in wanted:
            given = list(itertools.islice(source, len(due.unique)))
            _check_order(due.unique, given)
            self._fill_from(given, due)
            yield due.batch()
        _check_order(np.empty(0, np.int64), list(itertools.islice(source, 1)))

    def _fill_from(self, samples: Sequence[Sample], due: Wanted) -> None:
        labels = due.labels.numpy()
        try:
            np.stack([sample["image"] for sample in samples], out=due.images.numpy(), casting="no")
            labels[:] = [sample["cls"] for sample in samples]
        except (KeyError, TypeError, ValueError) as error:
            height, width, channels = self._shape
            raise UsageError(
                f"data.pipeline: the batch stage takes samples with `image`, uint8 [{height}, {width}, "
                f"{channels}], and `cls`, an int: {describe(error)}"
            ) from error
        if not 0 <= labels.min() <= labels.max() < (classes := len(self._index.classes)):
            raise UsageError(f"data.pipeline: gives a `cls` outside 0..{classes - 1}")


def open_stream(
    index: Index,
    split: str,
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    say: Callable[[str], None] = lambda text: None,
    pipeline: Pipeline | str | None,
) -> Streamed:
    """Returns what serves a split from its shards.

    Args:
        index: the data set.
        split: train or val.
        device: where batches are wanted.
        batch_size: samples in a usual window; so many are decoded ahead, twice.
        workers: threads that read and decode.
        say: told of downloads.
        pipeline: arranges the stages, a function or its name as `data.pipeline` has it; None needs none.

    Raises:
        UsageError: there is no function of this name.
    """
    if pipeline is None:
        return Streamed(index, split, device, batch_size=batch_size, workers=workers, say=say)
    if isinstance(pipeline, str):
        try:
            pipeline = import_target(pipeline)
        except UsageError as error:
            raise UsageError(f"data.pipeline: {error}") from error.__cause__
    return Staged(index, split, device, batch_size=batch_size, workers=workers, say=say, pipeline=pipeline)


def _check_order(due: Ids, samples: Sequence[Sample]) -> None:
    """Raises UsageError unless the samples are those that are due."""
    found = [sample.get("__id__", "without __id__") for sample in samples]
    if found == due.tolist():
        return
    pairs = itertools.zip_longest(due.tolist(), found)
    expected, other = next((expected, other) for expected, other in pairs if expected != other)
    raise UsageError(
        f"data.pipeline: gives {'no more samples' if other is None else f'sample {other}'} where "
        f"{'no more are' if expected is None else f'sample {expected} is'} due; its stages may change "
        "samples, but neither leave any out nor repeat or reorder them"
    )
