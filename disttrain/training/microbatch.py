"""The micro-batches of a step: which samples they hold, and how these are loaded and augmented."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from disttrain.data.batches import Batch, Window, training_crops
from disttrain.data.epoch_plan import Ids, micro_batch_slices
from disttrain.heartbeat import Phase
from disttrain.training.augment import Mix
from disttrain.training.phases import Phases
from disttrain.training.state import TrainState

_PIXELS_TOGETHER = 2**22  # 48 MiB of RGB values in fp32
_ALIGNMENT = 512  # bytes; torch's allocators give a new tensor at most this


class MicroBatch(NamedTuple):
    """The samples of one forward and backward pass: a rank's share of a global batch, or a part of it.

    With train.reproducible, it has the samples of several virtual ranks. They are loaded and augmented
    together, but each virtual rank has its own pass.

    Attributes:
        window: the positions in the epoch to load: a slice of length B, or with mixing int64 [2 B], the
            samples followed by their partners.
        samples: number of samples without partners, B.
        mix: how they are mixed, or None.
        counts: False if the rank has no sample in this step; it then runs one with a weight of zero.
        last: whether it is the rank's last micro-batch of the step. train.reproducible ignores this and
            `counts`: there, a rank may have no micro-batch in a step.
        parts: with train.reproducible, the number of samples of each virtual rank; otherwise empty.
    """

    window: Window
    samples: int
    mix: Mix | None
    counts: bool
    last: bool
    parts: tuple[int, ...] = ()


def micro_batches(state: TrainState, epoch: int, index: int) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of step `index` of an epoch, at least one.

    With train.reproducible, there may be none.
    """
    places = state.plan.batch(index)
    parts = micro_batch_slices(places, state.rank, state.world_size, state.config.train)
    counts = state.rank < len(places)  # not in a last batch smaller than the world
    mix = state.augment.mix(epoch, index, len(places), *state.image_size)
    together = _parts_together(state, parts)
    for i in range(0, len(parts), together):
        own = parts[i : i + together]
        begin, end = own[0].start, own[-1].stop
        window: Window = slice(begin, end)
        if mix is not None:
            samples = np.arange(begin, end)
            partners = places.start + (samples - places.start + mix.shift) % len(places)
            window = np.concatenate([samples, partners])
        sizes = tuple(map(len, own)) if state.config.train.reproducible else ()
        yield MicroBatch(window, end - begin, mix, counts, i + together >= len(parts), sizes)


def _parts_together(state: TrainState, parts: list[range]) -> int:
    """Returns how many parts of a step are loaded and augmented together.

    Only if augmentation gives an image the same bits in a batch of any size.
    """
    if not state.config.train.reproducible or not state.augment.same_in_any_batch or not parts:
        return 1
    return max(1, _PIXELS_TOGETHER // (len(parts[0]) * math.prod(state.image_size)))


def prefetch(
    state: TrainState, epoch: int, steps: range, order: Ids
) -> Generator[tuple[MicroBatch, Batch], None, None]:
    """Yields this rank's micro-batches of the given steps with their samples, which are loaded ahead."""
    micros, ahead = itertools.tee(micro for index in steps for micro in micro_batches(state, epoch, index))
    config = state.config
    crops = training_crops(config.data.image_size, config.augment.resized_crop, config.seed, epoch)
    windows = (micro.window for micro in ahead)
    with contextlib.closing(state.train_data.batches(order, windows, crops)) as batches:
        yield from zip(micros, batches, strict=True)


class Inputs(NamedTuple):
    """What the model gets in one pass, on its device.

    Attributes:
        micro: the micro-batch that it belongs to.
        images: augmented and normalized, float32 [B, C, H, W].
        labels: see `Batch`.
        partners: labels of the images mixed in, or None.
        ids: sample ids without partners, int64 [B].
    """

    micro: MicroBatch
    images: Tensor
    labels: Tensor
    partners: Tensor | None
    ids: Ids


def next_inputs(
    state: TrainState, batches: Iterator[tuple[MicroBatch, Batch]], step: int, number: int, phases: Phases
) -> list[Inputs]:
    """Moves the next micro-batch to the device and augments it; returns the inputs of its passes.

    Args:
        state: what to train with.
        batches: yields this rank's micro-batches.
        step: number of the step, from 1.
        number: passes of the step so far.
        phases: times the phases.
    """
    began = phases.enter(Phase.DATA, step, number)
    micro, batch = next(batches)
    state.meter.wait_s += phases.enter(Phase.TO_DEVICE, step, number) - began
    batch = batch.to(state.accelerator.device)
    phases.enter(Phase.AUGMENT, step, number)
    return augment_micro_batch(state, micro, batch)


def augment_micro_batch(state: TrainState, micro: MicroBatch, batch: Batch) -> list[Inputs]:
    """Returns the inputs of each pass of a micro-batch."""
    window, count, mix, labels = micro.window, micro.samples, micro.mix, batch.labels
    images = state.augment.train(batch.images, window)
    if isinstance(window, slice) and not micro.parts:
        return [Inputs(micro, images, labels, None, batch.ids)]
    passes = []
    begin = 0
    for size in micro.parts or (count,):
        own, others = slice(begin, begin + size), slice(count + begin, count + begin + size)
        part = _as_new(images[own])
        if mix is not None:
            _mix_in(part, images[others], mix)
        partners = None if mix is None else labels[others]
        passes.append(Inputs(micro, part, labels[own], partners, batch.ids[own]))
        begin += size
    return passes


def _as_new(images: Tensor) -> Tensor:
    """Returns images aligned in memory as those of a new tensor: the order of a sum may depend on it."""
    offset = images.storage_offset() * images.element_size()
    return images if offset % _ALIGNMENT == 0 else images.clone()


def _mix_in(images: Tensor, others: Tensor, mix: Mix) -> None:
    """Mixes the images of a pass with their partners, in place. The bits may depend on their number."""
    if mix.box is None:
        images.lerp_(others, 1 - mix.lam)
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
