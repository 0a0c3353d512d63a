"""The evaluation loop: integers over a whole split, whatever the number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.config import TrainConfig
from disttrain.data.batches import Batch, Loader
from disttrain.data.plan import Ids, share
from disttrain.heartbeat import Phase
from disttrain.training.collectives import average_buffers, reduce_record, stop_requested_anywhere
from disttrain.training.exactly_once import Seen, seen_by_rank
from disttrain.training.parts import Hooks, Parts, as_written, kernels_by_rule

Augmentation = Literal["none", "flip", "multi_view"]

_LARGEST_BATCH = 1024  # images in a batch of evaluation, where it may be larger than in training


@dataclass(frozen=True)
class Subject:
    """What is evaluated, as one rank sees it.

    Attributes:
        network: on the device of the rank, not wrapped.
        device: of the rank.
        normalise: uint8 [B, H, W, C] to float32 [B, C, H, W].
        data: serves the samples to this rank.
        ids: the samples that all ranks together evaluate, int64 [samples].
        rank: this one.
        world_size: of them.
        batch_size: images that go through the network at once.
        autocast: gives the context of the forward pass.
    """

    network: nn.Module
    device: torch.device
    normalise: Callable[[Tensor], Tensor]
    data: Loader
    ids: Ids
    rank: int
    world_size: int
    batch_size: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]


def evaluate(parts: Parts, tta: Augmentation, *, step: int, hooks: Hooks) -> dict[str, Any] | None:
    """Evaluates the model, or its moving average, on the validation split. Every rank calls this.

    Args:
        parts: what to evaluate with.
        tta: the test-time augmentation.
        step: optimizer steps taken so far.
        hooks: told of what begins, and gives the wish to stop.

    Returns:
        What an EvalRecord has, but for the step and the epoch. None if a rank was asked to stop meanwhile.

    Raises:
        DataError: the ranks together did not see every sample.
    """
    average_buffers(parts.group, parts.bare_model)
    network: nn.Module = parts.bare_model
    if parts.ema is not None:
        average_buffers(parts.group, parts.ema.module)
        network = parts.ema.module
    subject = Subject(
        network,
        parts.accelerator.device,
        parts.augment.plain,
        parts.val_data,
        parts.val_ids,
        parts.rank,
        parts.world_size,
        batch_size(parts.config.train, parts.world_size),
        parts.accelerator.autocast,
    )

    def go_on(number: int) -> bool:
        hooks.phases.enter(Phase.EVALUATE, step, number)
        # Collective: every rank, also one that has no batch left.
        return not parts.look_due(number) or not stop_requested_anywhere(
            parts.group, Phase.EVALUATE, step, hooks.stop_requested()
        )

    tally = Tally(parts.accelerator.device)
    with as_written(parts):
        if not score(subject, tta, tally.add, go_on):
            return None
    sums = reduce_record(parts.group, Phase.EVALUATE, step, tally.sums())
    sums.check(parts.val_ids, "the evaluation saw")
    return summary(sums, tta) | {"skipped": parts.val_skipped}


def batch_size(config: TrainConfig, world_size: int) -> int:
    """Returns the images that go through the network at once in an evaluation."""
    # Nothing is kept for a backward pass, so that more fits than in training.
    size = max(1, config.batch_size // (world_size * config.accumulate))
    return max(size, min(4 * size, _LARGEST_BATCH))


def score(
    subject: Subject,
    tta: Augmentation,
    take: Callable[[Batch, Tensor, Tensor], None],
    go_on: Callable[[int], bool] = lambda number: True,
) -> bool:
    """Puts this rank's samples through the network.

    Args:
        subject: what is evaluated.
        tta: the test-time augmentation.
        take: is given each batch, its scores float32 [B, classes], and its scores without augmentation.
        go_on: asked before each batch, as often on every rank; False ends the evaluation.

    Returns:
        Whether all were seen.
    """
    network, size, samples = subject.network, subject.batch_size, len(subject.ids)
    own = share(range(samples), subject.rank, subject.world_size)
    windows = (slice(begin, min(begin + size, own.stop)) for begin in range(own.start, own.stop, size))
    most = len(share(range(samples), 0, subject.world_size))  # of all ranks
    training = network.training
    network.eval()
    with (
        torch.inference_mode(),
        subject.autocast(),
        contextlib.closing(subject.data.batches(subject.ids, windows)) as batches,
    ):
        for number in range(-(-most // size)):
            if not go_on(number):
                return False
            batch = next(batches, None)
            if batch is None:
                continue
            batch = batch.to(subject.device)
            passes = (
                (network(images).float(), weight)
                for images, weight in views(subject.normalise(batch.images), tta)
            )
            with kernels_by_rule() if len(batch.labels) < size else contextlib.nullcontext():
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
        top5_correct: whose class is among the five best, if that was counted.
    """

    loss: float
    correct: float
    plain_correct: float
    top5_correct: float


class Tally:
    """Sums over the samples that a rank has seen, on its device.

    Args:
        device: of the rank.
        classes: their number, to count each pair of a true and a predicted class too; None does not.

    Attributes:
        confusion: int64 [classes * classes], row by row the predictions for each true class; or None.
    """

    def __init__(self, device: torch.device, classes: int | None = None) -> None:
        self._hits = torch.zeros(3, dtype=torch.int64, device=device)  # correct, without augmentation, top 5
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._classes = classes
        self.confusion: Tensor | None = None
        if classes is not None:
            self.confusion = torch.zeros(classes**2, dtype=torch.int64, device=device)
        self._seen: list[Ids] = []

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch; arguments as `score` gives them."""
        labels = batch.labels
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        predicted = logits.argmax(1)
        hits = [(predicted == labels).sum(), (plain.argmax(1) == labels).sum()]
        if self.confusion is not None and self._classes is not None:
            pairs = labels * self._classes + predicted
            self.confusion.index_add_(0, pairs, torch.ones_like(pairs))  # bincount would wait for a GPU
            best = logits.topk(min(5, self._classes)).indices
            hits.append((best == labels[:, None]).sum())
        self._hits[: len(hits)] += torch.stack(hits)
        self._seen.append(batch.ids)

    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""
        correct, plain_correct, top5_correct = self._hits.tolist()
        seen = seen_by_rank(self._seen)
        return EvalSums(
            samples=seen.samples,
            digest_low=seen.digest_low,
            digest_high=seen.digest_high,
            loss=self._loss.item(),
            correct=correct,
            plain_correct=plain_correct,
            top5_correct=top5_correct,
        )


def summary(sums: EvalSums, tta: Augmentation) -> dict[str, Any]:
    """Returns what an EvalRecord has of what was summed over the ranks."""
    total, correct = int(sums.samples), int(sums.correct)
    record: dict[str, Any] = {
        "loss": sums.loss / total,
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
    }
    if tta != "none":
        plain = int(sums.plain_correct)
        record |= {"tta": tta, "plain_accuracy": plain / total, "plain_correct": plain}
    return record


def views(images: Tensor, tta: Augmentation) -> Iterator[tuple[Tensor, float]]:
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
