"""The micro-batches of a step: which samples they hold, and how these are loaded and augmented."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disttrain.data.batches import Batch, Window, training_crops
from disttrain.data.epoch_plan import Ids, micro_batch_slices
from disttrain.heartbeat import Phase
from disttrain.training.augment import Mix
from disttrain.training.phases import Phases
from disttrain.training.state import TrainState


class MicroBatch(NamedTuple):
    """The samples of one forward and backward pass: a rank's share of a global batch, or a part of it.

    Attributes:
        window: the positions in the epoch to load: a slice of length B, or with mixing int64 [2 B], the
            samples followed by their partners.
        samples: number of samples without partners, B.
        mix: how they are mixed, or None.
        counts: False if the rank has no sample in this step; it then runs one with a weight of zero.
        last: whether it is the rank's last micro-batch of the step. train.reproducible ignores this and
            `counts`: there, a rank may have no micro-batch in a step.
    """

    window: Window
    samples: int
    mix: Mix | None
    counts: bool
    last: bool


def micro_batches(state: TrainState, epoch: int, index: int) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of step `index` of an epoch, at least one.

    With train.reproducible, there is one for each virtual rank of this rank, which may have none.
    """
    places = state.plan.batch(index)
    parts = micro_batch_slices(places, state.rank, state.world_size, state.config.train)
    counts = state.rank < len(places)  # not in a last batch smaller than the world
    mix = state.augment.mix(epoch, index, len(places), *state.image_size)
    for i, part in enumerate(parts):
        window: Window = slice(part.start, part.stop)
        if mix is not None:
            samples = np.arange(part.start, part.stop)
            partners = places.start + (samples - places.start + mix.shift) % len(places)
            window = np.concatenate([samples, partners])
        yield MicroBatch(window, len(part), mix, counts, last=i == len(parts) - 1)


def prefetch(
    state: TrainState, epoch: int, steps: range, order: Ids
) -> Generator[tuple[MicroBatch, Batch], None, None]:
    """Yields this rank's micro-batches of the given steps with their samples, which are loaded ahead."""
    micros, ahead = itertools.tee(micro for index in steps for micro in micro_batches(state, epoch, index))
    windows, crops = (micro.window for micro in ahead), training_crops(state.config, epoch)
    with contextlib.closing(state.train_data.batches(order, windows, crops)) as batches:
        yield from zip(micros, batches, strict=True)


class Inputs(NamedTuple):
    """A micro-batch on the device, ready for the model.

    Attributes:
        micro: the micro-batch.
        images: augmented and normalized, float32 [B, C, H, W].
        labels: int64 [B].
        partners: labels of the images mixed in, int64 [B], or None.
        ids: sample ids without partners, int64 [B].
    """

    micro: MicroBatch
    images: Tensor
    labels: Tensor
    partners: Tensor | None
    ids: Ids


def next_inputs(
    state: TrainState, batches: Iterator[tuple[MicroBatch, Batch]], step: int, number: int, phases: Phases
) -> Inputs:
    """Moves the next micro-batch, the step's number `number`, to the device and augments it."""
    began = phases.enter(Phase.DATA, step, number)
    micro, batch = next(batches)
    state.meter.wait_s += phases.enter(Phase.TO_DEVICE, step, number) - began
    batch = batch.to(state.accelerator.device)
    phases.enter(Phase.AUGMENT, step, number)
    images, labels, partners = augment_micro_batch(state, micro, batch)
    return Inputs(micro, images, labels, partners, batch.ids[: micro.samples])


def augment_micro_batch(
    state: TrainState, micro: MicroBatch, batch: Batch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the augmented images, their labels and, if mixed, the labels of their partners."""
    window, count, mix = micro.window, micro.samples, micro.mix
    if isinstance(window, slice):
        return state.augment.train(batch.images, window), batch.labels, None
    assert mix is not None
    mixed = state.augment.train(batch.images, torch.from_numpy(window))
    images, others = mixed[:count], mixed[count:]
    if mix.box is None:
        images.lerp_(others, 1 - mix.lam)
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, batch.labels[:count], batch.labels[count:]
