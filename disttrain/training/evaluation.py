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
from disttrain.data.epoch_plan import Ids, rank_slice
from disttrain.heartbeat import Phase
from disttrain.runs.eval_metrics import BINS, UNITS, calibration_error, class_scores, macro
from disttrain.runs.evaluation import MISTAKES, Evaluation, Mistake
from disttrain.runs.records import EvalRecord
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import (
    Group,
    average_buffers,
    gather,
    reduce_record,
    stop_requested_anywhere,
)
from disttrain.training.exactly_once import EvalSums, seen_by_rank
from disttrain.training.loss import evaluation_loss
from disttrain.training.multi_label import MultiLabelMetrics, add_label_metrics
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
    make = MultiLabelMetrics if split.multi_label else EvalMetrics
    metrics = make(group.device, len(split.classes))
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
    if isinstance(metrics, MultiLabelMetrics):
        results = metrics.results(group)
        add_label_metrics(record, results)
        return Evaluation(record, 0, split.classes, [], mistakes, results)
    add_metrics(record, metrics.counts.view(-1, len(split.classes)), sums)
    return Evaluation(
        record=record,
        top5_correct=int(sums.top5_correct),
        classes=split.classes,
        cells=metrics.cells(),
        mistakes=mistakes,
    )


def add_metrics(record: EvalRecord, confusion: Tensor, sums: EvalSums) -> None:
    """Adds the metrics of the classes and of the confidences to a record.

    Args:
        record: with the loss and the number of samples.
        confusion: int64 [classes, classes] over all ranks.
        sums: over all ranks.
    """
    counts = torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)], 1).tolist()
    means = macro(class_scores(*row) for row in counts)
    record.macro_precision, record.macro_recall, record.macro_f1 = means
    if len(counts) > 5:
        record.top5_accuracy = int(sums.top5_correct) / record.total
    if record.loss is not None and math.isfinite(record.loss):
        bins = [int(number) for number in sums.bins]
        record.calibration_error = calibration_error([bins[i : i + 3] for i in range(0, len(bins), 3)])


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
                several = split.multi_label
                labels = labels[:, task.outputs.argsort()] if several else task.outputs[labels]
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


class EvalMetrics:
    """Counts correct predictions and mistakes of one rank, on its device.

    Args:
        device: of the rank.
        classes: number of classes.

    Attributes:
        counts: the confusion matrix, int64 [classes * classes], row by row the predictions for each class.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self._hits = torch.zeros(3, dtype=torch.int64, device=device)  # correct, without augmentation, top 5
        self._bins = torch.zeros(BINS, 3, dtype=torch.int64, device=device)  # see `calibration_error`
        self._losses: list[Tensor] = []  # of each batch
        self._classes = classes
        self.counts = torch.zeros(classes**2, dtype=torch.int64, device=device)
        self._seen: list[Ids] = []
        self._wrong: list[tuple[Ids, list[Tensor]]] = []  # the mistakes of each batch, as columns

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch, without a synchronisation; for the arguments see `take` of `score`."""
        labels, predicted = batch.labels, logits.argmax(1)
        self._losses.append(evaluation_loss(logits, labels))
        best = logits.topk(min(5, self._classes)).indices
        right = predicted == labels
        hits = (right, plain.argmax(1) == labels, (best == labels[:, None]).any(1))
        self._hits += torch.stack(hits).sum(1)
        pairs = labels * self._classes + predicted
        self.counts.index_add_(0, pairs, torch.ones_like(pairs))  # bincount would wait for a GPU
        confidence = logits.softmax(1).amax(1)
        units = (UNITS * confidence.nan_to_num(0.0)).round().long()
        places = ((BINS * units - 1) // UNITS).clamp(0)  # the bins are open below and closed above
        self._bins.index_add_(0, places, torch.stack([torch.ones_like(units), right.long(), units], 1))
        worst = confidence.where(~right, -1.0).topk(min(MISTAKES, len(labels)))
        at = worst.indices
        self._wrong.append((batch.ids, [worst.values, at, labels[at], predicted[at]]))
        self._seen.append(batch.ids)

    def mistakes(self) -> list[Mistake]:
        """Returns the most confident mistakes of each batch of this rank; waits for the device."""
        return [
            Mistake(chance, int(ids[place]), label, predicted)
            for ids, columns in self._wrong
            for chance, place, label, predicted in zip(*(c.tolist() for c in columns), strict=True)
            if chance >= 0  # a batch may have fewer mistakes
        ]

    def cells(self) -> list[tuple[int, int, int]]:
        """Returns the confusion matrix without its zeros; waits for the device."""
        places = self.counts.nonzero()[:, 0]
        true, predicted = places // self._classes, places % self._classes
        cells = torch.stack([true, predicted, self.counts[places]], 1)
        return [(i, j, count) for i, j, count in cells.tolist()]

    def losses(self) -> list[float]:
        """Returns the cross entropy summed over each batch of this rank; waits for the device."""
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        return losses

    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""
        hits = torch.cat([self._hits, self._bins.flatten()]).tolist()
        correct, plain_correct, top5_correct, *bins = hits
        return EvalSums(
            **vars(seen_by_rank(self._seen)),
            correct=correct,
            plain_correct=plain_correct,
            top5_correct=top5_correct,
            bins=bins,
        )


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
