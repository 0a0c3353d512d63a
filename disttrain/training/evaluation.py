"""The evaluation, in training and of what was trained: integers over a split, on any number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config import TrainConfig
from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids, rank_slice
from disttrain.heartbeat import Phase
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
from disttrain.training.exactly_once import Seen, seen_by_rank
from disttrain.training.state import Progress, TrainState, Validation, cudnn_heuristics, eager

Augmentation = Literal["none", "flip", "multi_view"]

_LARGEST_BATCH = 1024  # images in a batch of evaluation, where it may be larger than in training


@dataclass(frozen=True)
class EvalTask:
    """What is evaluated, as one rank sees it.

    Attributes:
        network: on the device of the rank, not wrapped.
        normalize: uint8 [B, H, W, C] to float32 [B, C, H, W].
        split: the samples.
        group: the ranks.
        batch_size: images that go through the network at once.
        autocast: gives the context of the forward pass.
        places: of each class of the split among the scores, int64 [classes] on the device; None is the same.
    """

    network: nn.Module
    normalize: Callable[[Tensor], Tensor]
    split: Validation
    group: Group
    batch_size: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    places: Tensor | None = None


def evaluate(
    state: TrainState, tta: Augmentation, progress: Progress, callbacks: Callbacks
) -> Evaluation | None:
    """Evaluates the model, or its moving average, on the validation split. Every rank calls this.

    Returns:
        What was found; None if a rank was asked to stop meanwhile.

    Raises:
        DataError: the ranks together did not see every sample.
    """
    for network in state.networks:
        average_buffers(state.group, network)
    size = batch_size(state.config.train, state.world_size)
    step = progress.step
    normalize, autocast = state.augment.normalize, state.accelerator.autocast
    task = EvalTask(state.networks[-1], normalize, state.val, state.group, size, autocast)

    def go_on(number: int) -> bool:
        callbacks.phases.enter(Phase.EVALUATE, step, number)
        # Collective: every rank, also one that has no batch left.
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
    """Evaluates; every rank calls this.

    Args:
        task: what is evaluated.
        tta: the test-time augmentation.
        step: optimizer steps taken so far.
        epoch: epochs completed.
        go_on: asked before each batch, as often on every rank; False ends the evaluation.

    Returns:
        What was found; None if it was ended.

    Raises:
        DataError: the ranks together did not see every sample.
    """
    group, split = task.group, task.split
    metrics = EvalMetrics(group.device, len(split.classes))
    if not score(task, tta, metrics.add, go_on):
        return None
    sums = reduce_record(group, Phase.EVALUATE, step, metrics.sums())
    sums.check(split.ids, "the evaluation saw")
    if group.world_size > 1:
        dist.all_reduce(metrics.confusion)
    total, correct, plain = int(sums.samples), int(sums.correct), int(sums.plain_correct)
    record = EvalRecord(
        loss=sums.loss / total,
        accuracy=correct / total,
        correct=correct,
        total=total,
        skipped=split.skipped,
        step=step,
        epoch=epoch,
    )
    if tta != "none":
        record.tta, record.plain_accuracy, record.plain_correct = tta, plain / total, plain
    mistakes = sorted(chain.from_iterable(gather(group, metrics.mistakes())), reverse=True)
    return Evaluation(
        record=record,
        top5_correct=int(sums.top5_correct),
        classes=split.classes,
        confusion=metrics.confusion.view(len(split.classes), -1).tolist(),
        mistakes=mistakes[:MISTAKES],
    )


def batch_size(config: TrainConfig, world_size: int) -> int:
    """Returns the images that go through the network at once in an evaluation."""
    # Nothing is kept for a backward pass, so that more fits than in training.
    size = max(1, config.batch_size // (world_size * config.accumulate))
    return max(size, min(4 * size, _LARGEST_BATCH))


def score(
    task: EvalTask,
    tta: Augmentation,
    take: Callable[[Batch, Tensor, Tensor], None],
    go_on: Callable[[int], bool],
) -> bool:
    """Puts this rank's samples through the network; returns whether all were seen.

    Args:
        task: what is evaluated.
        tta: the test-time augmentation.
        take: is given each batch, its scores float32 [B, classes], and its scores without augmentation.
        go_on: as of `measure`.
    """
    network, size, ids = task.network, task.batch_size, task.split.ids
    own = rank_slice(range(len(ids)), task.group.rank, task.group.world_size)
    windows = (slice(begin, min(begin + size, own.stop)) for begin in range(own.start, own.stop, size))
    most = len(rank_slice(range(len(ids)), 0, task.group.world_size))  # of all ranks
    training = network.training
    network.eval()
    with (
        torch.inference_mode(),
        task.autocast(),
        contextlib.closing(task.split.data.batches(ids, windows)) as batches,
    ):
        for number in range(-(-most // size)):
            if not go_on(number):
                return False
            batch = next(batches, None)
            if batch is None:
                continue
            batch = batch.to(task.group.device)
            if task.places is not None:
                batch = batch._replace(labels=task.places[batch.labels])
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


@dataclass
class EvalSums(Seen):
    """What an evaluation adds up over samples and ranks, with which samples they were; exact in float64.

    Attributes:
        loss: cross entropy.
        correct: samples that were predicted right.
        plain_correct: those without test-time augmentation.
        top5_correct: whose class is among the five best.
    """

    loss: float
    correct: float
    plain_correct: float
    top5_correct: float


class EvalMetrics:
    """What a rank counts over the samples that it has seen, on its device.

    Args:
        device: of the rank.
        classes: their number.

    Attributes:
        confusion: int64 [classes * classes], row by row the predictions for each true class.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self._hits = torch.zeros(3, dtype=torch.int64, device=device)  # correct, without augmentation, top 5
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._classes = classes
        self.confusion = torch.zeros(classes**2, dtype=torch.int64, device=device)
        self._seen: list[Ids] = []
        self._wrong: list[tuple[Ids, list[Tensor]]] = []  # of each batch the columns of its mistakes

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch, without a synchronisation; arguments as `score` gives them."""
        labels, predicted = batch.labels, logits.argmax(1)
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, self._classes)).indices
        hits = (predicted == labels, plain.argmax(1) == labels, (best == labels[:, None]).any(1))
        self._hits += torch.stack(hits).sum(1)
        pairs = labels * self._classes + predicted
        self.confusion.index_add_(0, pairs, torch.ones_like(pairs))  # bincount would wait for a GPU
        chances = logits.softmax(1).amax(1).where(predicted != labels, -1.0)
        worst = chances.topk(min(MISTAKES, len(labels)))
        places = worst.indices
        self._wrong.append((batch.ids, [worst.values, places, labels[places], predicted[places]]))
        self._seen.append(batch.ids)

    def mistakes(self) -> list[Mistake]:
        """Returns the most confident ones of each batch of this rank; waits for the device."""
        return [
            Mistake(chance, int(ids[place]), label, predicted)
            for ids, columns in self._wrong
            for chance, place, label, predicted in zip(*(c.tolist() for c in columns), strict=True)
            if chance >= 0  # a batch may have fewer mistakes
        ]

    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""
        correct, plain_correct, top5_correct = self._hits.tolist()
        return EvalSums(
            **vars(seen_by_rank(self._seen)),
            loss=self._loss.item(),
            correct=correct,
            plain_correct=plain_correct,
            top5_correct=top5_correct,
        )


def tta_views(images: Tensor, tta: Augmentation) -> Iterator[tuple[Tensor, float]]:
    """Yields the images as each pass of a test-time augmentation sees them, with the weight of its scores.

    The first are the images as they are. multi_view is that of Jordan 2024 (airbench): the mirrored images
    too, and both shifted by a pixel to the upper left and to the lower right with half the weight.

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
