"""User stages between the shards and the batches: `data.pipeline`.

They are the stages of a webdataset pipeline: functions from one iterator of webdataset samples to the next.
Without user stages, `streamed.py` reads and decodes in one go, which takes a tenth less time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from disttrain.data.batches import Batch, Window
from disttrain.data.decoded_copy import ReducedSplit
from disttrain.data.epoch_plan import Ids
from disttrain.data.streamed import Streamed, Wanted, chunk_slices
from disttrain.errors import DisttrainError, UsageError, error_text
from disttrain.parallel import chunked, ordered_map
from disttrain.shards.crops import Crops
from disttrain.shards.images import ImageError
from disttrain.shards.index import Index
from disttrain.shards.label_format import classes_of
from disttrain.shards.reader import Sample, decode_files, sample_error
from disttrain.shards.tar import IMAGE_EXTENSIONS
from disttrain.user_code import UserCodeError, import_target

Stage: TypeAlias = Callable[[Iterable[Any]], Iterator[Any]]


class Stages(NamedTuple):
    """The stages of an epoch. The user's function takes them and returns the stages to use, in order.

    It may add or replace stages, for example with `webdataset.map(function)`. The stages must return every
    sample once, in the same order.

    Attributes:
        source: yields this rank's samples in webdataset's form: `__key__`, `__url__`, the bytes of the image
            file under its extension and of the label under `cls`; `__id__`, the sample id; and
            `__position__`, its position in the epoch, on which a random crop depends.
        decode: replaces the image file by `image`, uint8 [H, W, C], cropped with `data.image_size`, and makes
            `cls` an int, or in multi-label data a list of them.
        batch: collects the samples into batches.
        threaded: turns a function of one sample into a stage that the decoding threads run.
    """

    source: Callable[[], Iterator[Sample]]
    decode: Stage
    batch: Stage
    threaded: Callable[[Callable[[Sample], Sample]], Stage]


Pipeline: TypeAlias = Callable[[Stages], Sequence[Callable[..., Any]]]


class Staged:
    """Loads a split from its shards through user stages, for one rank.

    Args:
        stream: loads the split without user stages.
        pipeline: returns the stages to use.
    """

    def __init__(self, stream: Streamed, pipeline: Pipeline) -> None:
        self._stream = stream
        self._pipeline = pipeline

    @property
    def most_bytes(self) -> int:
        """The most memory that decoded samples take at once, for windows of the usual size."""
        return self._stream.most_bytes + self._stream.batch_bytes  # plus the batch that they are copied to

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: Crops | None = None
    ) -> Generator[Batch, None, None]:
        """Yields the samples at each window of an order; see `Loader`.

        Raises:
            UsageError: the pipeline fails, or returns other samples than expected.
        """
        from webdataset.pipeline import DataPipeline  # only imported if a run needs it

        ahead, due = itertools.tee(self._stream.wanted(order, window) for window in windows)
        stages = Stages(
            partial(self._read, ahead),
            partial(self._decode, crops),
            partial(self._collect, due),
            self._threaded,
        )
        try:
            for batch in DataPipeline(*self._pipeline(stages)):
                if not isinstance(batch, Batch):
                    raise UsageError(
                        f"data.pipeline: returns a {type(batch).__name__}; end it with stages.batch"
                    )
                yield batch
        except DisttrainError:
            raise
        except Exception as error:
            raise UsageError(f"data.pipeline: {error_text(error)}") from error

    def _read(self, wanted: Iterable[Wanted]) -> Iterator[Sample]:
        chunks = (
            (due.unique[part], due.positions[part])
            for due in wanted
            for part in chunk_slices(len(due.unique), self._stream.chunk)
        )
        read = ordered_map(self._read_chunk, chunks, self._stream.workers)
        return itertools.chain.from_iterable(read)

    def _read_chunk(self, chunk: tuple[Ids, Ids]) -> list[Sample]:
        ids, positions = chunk
        samples = self._stream.reader.samples(ids)
        for sample, position in zip(samples, positions.tolist(), strict=True):
            sample["__position__"] = position
        return samples

    def _decode(self, crops: Crops | None, samples: Iterable[Sample]) -> Iterator[Sample]:
        chunks = chunked(samples, self._stream.chunk)
        decode = partial(self._decode_chunk, crops)
        decoded = ordered_map(decode, chunks, self._stream.workers, self._stream.ahead)
        return itertools.chain.from_iterable(decoded)

    def _threaded(self, function: Callable[[Sample], Sample]) -> Stage:
        workers, ahead = self._stream.workers, self._stream.ahead
        chunk = self._stream.chunk
        return lambda samples: ordered_map(function, samples, workers, ahead, chunk=chunk)

    def _decode_chunk(self, crops: Crops | None, samples: list[Sample]) -> list[Sample]:
        images = np.empty((len(samples), *self._stream.shape), np.uint8)
        files = [sample.pop(_extension(sample)) for sample in samples]
        try:
            positions = np.array([sample.get("__position__", -1) for sample in samples], np.int64)
            if crops is not None and (positions < 0).any():
                raise UsageError("data.pipeline: the decode stage needs samples with `__position__`")
            decode_files(self._stream.index, files, images, positions, crops)
        except ImageError as error:
            bad = samples[error.place]
            raise sample_error(self._stream.index, bad["__url__"], bad["__key__"], error) from None
        for sample, image in zip(samples, images, strict=True):
            sample["image"], sample["cls"] = image, json.loads(sample["cls"])
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
        index = self._stream.index
        kind, classes = "a list of ints" if index.multi_label else "an int", len(index.classes)
        try:
            np.stack([sample["image"] for sample in samples], out=due.images.numpy(), casting="no")
            labels = [tuple(sample["cls"]) if index.multi_label else int(sample["cls"]) for sample in samples]
        except (KeyError, TypeError, ValueError) as error:
            height, width, channels = self._stream.shape
            raise UsageError(
                f"data.pipeline: the batch stage needs samples with `image`, uint8 [{height}, {width}, "
                f"{channels}], and `cls`, {kind}: {error_text(error)}"
            ) from error
        if not all(0 <= label < classes for found in labels for label in classes_of(found)):
            raise UsageError(f"data.pipeline: returns a `cls` outside 0..{classes - 1}")
        due.labels.numpy()[:] = index.label_reader().array(labels)


def open_stream(
    index: Index,
    split: str,
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    say: Callable[[str], None] = lambda text: None,
    pipeline: Pipeline | str | None,
    copy: ReducedSplit | None = None,
) -> Streamed | Staged:
    """Returns a loader that reads a split from its shards, or from a decoded copy.

    Args:
        index: the data set.
        split: train or val.
        device: where the batches are used.
        batch_size: samples in a usual window; two of them are decoded ahead.
        workers: threads that read and decode.
        say: called with messages about downloads.
        pipeline: a function that returns the stages, its name (see `data.pipeline`), or None.
        copy: takes the samples from here, without a pipeline.

    Raises:
        UsageError: there is no function with this name.
    """
    stream = Streamed(index, split, device, batch_size=batch_size, workers=workers, say=say, copy=copy)
    if pipeline is None:
        return stream
    if isinstance(pipeline, str):
        try:
            pipeline = import_target(pipeline)
        except UserCodeError as error:
            raise UserCodeError(f"data.pipeline: {error}", error.module) from error.__cause__
        except UsageError as error:
            raise UsageError(f"data.pipeline: {error}") from error.__cause__
    return Staged(stream, pipeline)


def _extension(sample: Sample) -> str:
    """Returns the key of a sample's image file."""
    for name in IMAGE_EXTENSIONS:
        if name in sample:
            return name
    raise UsageError(
        f"data.pipeline: the decode stage needs samples with an image file: {', '.join(IMAGE_EXTENSIONS)}"
    )


def _check_order(due: Ids, samples: Sequence[Sample]) -> None:
    """Raises UsageError unless the samples have the ids `due`, in this order."""
    found = [sample.get("__id__", "without __id__") for sample in samples]
    if found == due.tolist():
        return
    pairs = itertools.zip_longest(due.tolist(), found)
    expected, other = next((expected, other) for expected, other in pairs if expected != other)
    raise UsageError(
        f"data.pipeline: returns {'no more samples' if other is None else f'sample {other}'}, but "
        f"{'no more samples were' if expected is None else f'sample {expected} was'} expected; stages may "
        "change samples, but must not drop, repeat or reorder them"
    )
