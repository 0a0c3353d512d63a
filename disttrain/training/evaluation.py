"""Evaluation of a network on a split, during and after training, with one result for any world size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import counter_rng
from disttrain.config import TrainConfig
from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import rank_slice
from disttrain.heartbeat import Phase
from disttrain.runs.evaluation import MISTAKES, Evaluation
from disttrain.runs.records import EvalRecord
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import (
    Group,
    average_buffers,
    gather,
    reduce_record,
    stop_requested_anywhere,
)
from disttrain.training.metrics import metrics_for
from disttrain.training.rng import seed_all
from disttrain.training.state import Progress, TrainState, Validation, cudnn_heuristics, eager

Augmentation = Literal["none", "flip", "multi_view"]

_SEED = 26  # the stream of random numbers that seeds the batches of a reproducible evaluation
_LARGEST_BATCH = 1024  # images per evaluation batch, unless the training batch is larger


@dataclass(frozen=True)
class EvalTask:
    """What one rank evaluates.

    Attributes:
        network: on the device of the rank, not wrapped.
        normalize: turns uint8 [B, H, W, C] into float32 [B, C, H, W].
        split: the samples.
        group: the ranks.
        batch_size: images per forward pass.
        autocast: returns the context of the forward pass.
        outputs: the network's output for each class of the split, int64 [classes] on the device, or None if
            both have the same order.
        fixed: whether the batches are the same on any number of ranks, as train.reproducible needs.
        seed: of the random numbers of each batch if they are fixed, for networks that draw some.
    """

    network: nn.Module
    normalize: Callable[[Tensor], Tensor]
    split: Validation
    group: Group
    batch_size: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    outputs: Tensor | None = None
    fixed: bool = False
    seed: int = 0


def evaluate(
    state: TrainState, tta: Augmentation, progress: Progress, callbacks: Callbacks
) -> Evaluation | None:
    """Evaluates the model, or its moving average, on the validation split. Every rank calls this.

    Returns:
        The result, or None if a rank was asked to stop meanwhile.

    Raises:
        DataError: the ranks did not see every sample exactly once.
    """
    for network in state.networks:
        average_buffers(state.group, network)
    config, step = state.config, progress.step
    size = batch_size(config.train, state.world_size)
    normalize, autocast = state.augment.normalize, state.accelerator.autocast
    task = EvalTask(
        state.networks[-1],
        normalize,
        state.val,
        state.group,
        size,
        autocast,
        fixed=config.train.reproducible,
        seed=counter_rng.derive(config.seed, _SEED, step),
    )

    def go_on(number: int) -> bool:
        callbacks.phases.enter(Phase.EVALUATE, step, number)
        # Collective: every rank calls this, also one that has no batch left.
        return not state.should_poll_stop(number) or not stop_requested_anywhere(
            state.group, Phase.EVALUATE, step, callbacks.stop_requested()
        )

    with eager(state):
        return measure(task, tta, step=step, epoch=progress.epoch, go_on=go_on)


def measure(
    task: EvalTask,
    tta: Augmentation,
    *,
    step: int = 0,
    epoch: int = 0,
    go_on: Callable[[int], bool] = lambda number: True,
) -> Evaluation | None:
    """Evaluates a network on a split. Every rank calls this.

    Args:
        task: what to evaluate.
        tta: the test-time augmentation.
        step: optimizer steps taken so far.
        epoch: epochs completed.
        go_on: called before each batch, equally often on every rank; False ends the evaluation.

    Returns:
        The result, or None if `go_on` ended the evaluation.

    Raises:
        DataError: the ranks did not see every sample exactly once.
    """
    group, split = task.group, task.split
    metrics = metrics_for(split, group.device)
    if not score(task, tta, metrics.add, go_on):
        return None
    sums = reduce_record(group, Phase.EVALUATE, step, metrics.sums())
    sums.check(split.ids, "the evaluation saw")
    if group.world_size > 1:
        dist.all_reduce(metrics.counts)
    total, plain = int(sums.samples), int(sums.plain_correct)
    found = gather(group, (metrics.mistakes(), metrics.losses()))
    loss = math.fsum(chain.from_iterable(losses for _, losses in found))  # exact, so in any order
    record = EvalRecord(
        loss=loss / total,
        accuracy=int(sums.correct) / total,
        correct=int(sums.correct),
        total=total,
        skipped=split.skipped,
        step=step,
        epoch=epoch,
    )
    if tta != "none":
        record.tta, record.plain_accuracy, record.plain_correct = tta, plain / total, plain
    mistakes = sorted(chain.from_iterable(mistakes for mistakes, _ in found), reverse=True)[:MISTAKES]
    cells, labels = metrics.finish(record, sums, group)
    return Evaluation(
        record=record,
        top5_correct=int(sums.top5_correct),
        classes=split.classes,
        cells=cells,
        mistakes=mistakes,
        labels=labels,
    )


def batch_size(config: TrainConfig, world_size: int) -> int:
    """Returns the images per forward pass in an evaluation."""
    # Without a backward pass, a larger batch fits than in training.
    parts = config.virtual_ranks if config.reproducible else world_size * config.accumulate
    size = max(1, config.batch_size // parts)
    return max(size, min(4 * size, _LARGEST_BATCH))


def score(
    task: EvalTask,
    tta: Augmentation,
    take: Callable[[Batch, Tensor, Tensor], None],
    go_on: Callable[[int], bool],
) -> bool:
    """Scores this rank's samples; returns False if `go_on` ended it.

    Args:
        task: what to evaluate.
        tta: the test-time augmentation.
        take: called with each batch, its scores float32 [B, classes], and its scores without augmentation.
        go_on: see `measure`.
    """
    network, size, split = task.network, task.batch_size, task.split
    windows, most = eval_windows(task)
    # Of multi-label data: the class of the split for each output.
    columns = task.outputs.argsort() if task.outputs is not None and split.multi_label else None
    training = network.training
    network.eval()
    with (
        torch.inference_mode(),
        task.autocast(),
        contextlib.closing(split.data.batches(split.ids, windows)) as batches,
    ):
        for number in range(most):
            if not go_on(number):
                return False
            batch = next(batches, None)
            if batch is None:
                continue
            if task.fixed:
                seed_all(counter_rng.derive(task.seed, windows[number].start), task.group.device)
            batch = batch.to(task.group.device)
            if task.outputs is not None:
                labels = batch.labels
                labels = labels[:, columns] if columns is not None else task.outputs[labels]
                batch = batch._replace(labels=labels)
            passes = (
                (network(images).float(), weight)
                for images, weight in tta_views(task.normalize(batch.images), tta)
            )
            with cudnn_heuristics() if len(batch.labels) < size else contextlib.nullcontext():
                plain, weight = next(passes)
                logits = weight * plain
                for scores, weight in passes:
                    logits += weight * scores
            take(batch, logits, plain)
    network.train(training)
    return True


def eval_windows(task: EvalTask) -> tuple[list[slice], int]:
    """Returns the positions of this rank's batches in the split, and the most batches of any rank."""
    samples, size, (rank, world_size, _) = len(task.split.ids), task.batch_size, task.group
    if task.fixed:  # the split is cut into batches, which go to the ranks
        batches = [slice(begin, min(begin + size, samples)) for begin in range(0, samples, size)]
        own, first = (rank_slice(range(len(batches)), number, world_size) for number in (rank, 0))
        return batches[own.start : own.stop], len(first)
    own, first = (rank_slice(range(samples), number, world_size) for number in (rank, 0))
    windows = [slice(begin, min(begin + size, own.stop)) for begin in range(own.start, own.stop, size)]
    return windows, -(-len(first) // size)


def tta_views(images: Tensor, tta: Augmentation) -> Iterator[tuple[Tensor, float]]:
    """Yields the images for each pass of a test-time augmentation, and the weight of its scores.

    The first pass has the original images. multi_view follows Jordan 2024 (airbench): the images and their
    mirror images, and both shifted by one pixel to the upper left and the lower right with half the weight.

    Args:
        images: [B, C, H, W].
        tta: the test-time augmentation.
    """
    if tta == "none":
        yield images, 1.0
        return
    shifted = []
    if tta == "multi_view":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    for seen, weight in ((images, 0.5 if shifted else 1.0), *((one, 0.25) for one in shifted)):
        yield seen, weight / 2
        yield seen.flip(3), weight / 2
