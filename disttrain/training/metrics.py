"""What one rank counts in an evaluation: of one label a sample, or of any number of labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids, rank_slice
from disttrain.runs.eval_metrics import BINS, UNITS, calibration_error, class_scores, macro
from disttrain.runs.evaluation import MISTAKES, LabelResult, Mistake
from disttrain.runs.records import EvalRecord
from disttrain.training.collectives import Group, gather
from disttrain.training.exactly_once import Seen, seen_by_rank
from disttrain.training.loss import evaluation_loss, is_correct
from disttrain.training.state import Validation

Cells = list[tuple[int, int, int]]
"""A confusion matrix without its zeros; see `Evaluation.cells`."""


@dataclass
class EvalSums(Seen):
    """The sums of an evaluation over samples and ranks, and which samples they include; exact in float64.

    Attributes:
        correct: samples predicted correctly.
        plain_correct: samples predicted correctly without test-time augmentation.
        top5_correct: samples whose class is among the five best.
        bins: the rows of `calibration_error`, one after the other.
    """

    correct: float
    plain_correct: float
    top5_correct: float
    bins: list[float]


class Metrics(ABC):
    """Counts of one rank, on its device; `EvalMetrics` and `MultiLabelMetrics` are its kinds.

    Args:
        device: of the rank.
        classes: number of classes.
        counts: length of `counts`.

    Attributes:
        counts: int64 [counts] of this rank, to be summed over the ranks before `finish`.
    """

    def __init__(self, device: torch.device, classes: int, counts: int) -> None:
        self.counts = torch.zeros(counts, dtype=torch.int64, device=device)
        self._classes = classes
        self._losses: list[Tensor] = []  # of each batch
        self._seen: list[Ids] = []
        self._wrong: list[tuple[Ids, list[Tensor]]] = []  # the mistakes of each batch, as columns

    @abstractmethod
    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch, without a synchronisation; for the arguments see `take` of `score`."""

    @abstractmethod
    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""

    @abstractmethod
    def finish(
        self, record: EvalRecord, sums: EvalSums, group: Group
    ) -> tuple[Cells, list[LabelResult] | None]:
        """Adds the metrics of the classes to a record. Every rank calls this, with all sums over the ranks.

        Args:
            record: with the loss and the number of samples.
            sums: over all ranks.
            group: the ranks.

        Returns:
            `cells` and `labels` of an `Evaluation`.
        """

    def mistakes(self) -> list[Mistake]:
        """Returns the most confident mistakes of each batch of this rank; waits for the device."""
        return [
            Mistake(chance, int(ids[place]), label, predicted)
            for ids, columns in self._wrong
            for chance, place, label, predicted in zip(*(c.tolist() for c in columns), strict=True)
            if chance >= 0  # a batch may have fewer mistakes
        ]

    def losses(self) -> list[float]:
        """Returns the loss summed over each batch of this rank; waits for the device."""
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        return losses

    def _note(self, batch: Batch, logits: Tensor, confidence: Tensor, *classes: Tensor) -> None:
        """Keeps ids, loss and the most confident mistakes of a batch.

        Args:
            batch: the samples.
            logits: [B, classes].
            confidence: of the mistake in each sample, 0..1; negative without one: [B].
            classes: the true and the predicted class of each sample, as of a `Mistake`: int64 [B] each.
        """
        self._seen.append(batch.ids)
        self._losses.append(evaluation_loss(logits, batch.labels))
        worst = confidence.topk(min(MISTAKES, len(confidence)))
        at = worst.indices
        self._wrong.append((batch.ids, [worst.values, at, *(column[at] for column in classes)]))


def metrics_for(split: Validation, device: torch.device) -> Metrics:
    """Returns what counts in an evaluation of a split."""
    kind = MultiLabelMetrics if split.multi_label else EvalMetrics
    return kind(device, len(split.classes))


class EvalMetrics(Metrics):
    """Counts of samples with one label.

    `counts` is the confusion matrix, int64 [classes * classes], row by row the predictions for each class.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        super().__init__(device, classes, classes**2)
        self._hits = torch.zeros(3, dtype=torch.int64, device=device)  # correct, without augmentation, top 5
        self._bins = torch.zeros(BINS, 3, dtype=torch.int64, device=device)  # see `calibration_error`

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch; see `Metrics`."""
        labels, predicted = batch.labels, logits.argmax(1)
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
        self._note(batch, logits, confidence.where(~right, -1.0), labels, predicted)

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

    def finish(
        self, record: EvalRecord, sums: EvalSums, group: Group
    ) -> tuple[Cells, list[LabelResult] | None]:
        """Adds the metrics of the classes and of the confidences to a record; see `Metrics`."""
        add_metrics(record, self.counts.view(self._classes, -1), sums)
        return self.cells(), None

    def cells(self) -> Cells:
        """Returns the confusion matrix without its zeros; waits for the device."""
        places = self.counts.nonzero()[:, 0]
        true, predicted = places // self._classes, places % self._classes
        cells = torch.stack([true, predicted, self.counts[places]], 1)
        return [(i, j, count) for i, j, count in cells.tolist()]


class MultiLabelMetrics(Metrics):
    """Counts of multi-label data, of each class on its own; a score above 0 predicts the class.

    `counts` are correct predictions, samples and predictions of each class, int64 [3 * classes].
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        super().__init__(device, classes, 3 * classes)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)  # correct, without augmentation
        self._scores: list[tuple[Tensor, Tensor]] = []  # scores and labels of each batch, [B, classes]

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch; see `Metrics`."""
        labels = batch.labels
        predicted, present = logits > 0, labels > 0
        self._hits += torch.stack([is_correct(logits, labels), is_correct(plain, labels)]).sum(1)
        self.counts += torch.stack([predicted & present, present, predicted]).sum(1).flatten()
        self._scores.append((logits, labels))
        chances = logits.sigmoid()
        wrong = torch.where(present, 1 - chances, chances).where(predicted != present, -1.0)
        confidence, worst = wrong.max(1)
        missed = present.gather(1, worst[:, None])[:, 0]
        self._note(batch, logits, confidence, worst.where(missed, -1), worst.where(~missed, -1))

    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""
        correct, plain = self._hits.tolist()
        seen = vars(seen_by_rank(self._seen))
        return EvalSums(**seen, correct=correct, plain_correct=plain, top5_correct=0, bins=[])

    def finish(
        self, record: EvalRecord, sums: EvalSums, group: Group
    ) -> tuple[Cells, list[LabelResult] | None]:
        """Adds the metrics of the classes to a record; see `Metrics`."""
        results = self.results(group)
        add_label_metrics(record, results)
        return [], results

    def results(self, group: Group) -> list[LabelResult]:
        """Returns the result of each class over all ranks. Every rank calls this, after reducing `counts`.

        Each rank gets the scores of all samples, float32 [samples, classes] on the host, and computes the
        average precision of its share of the classes.
        """
        empty = torch.empty((0, self._classes), device=self.counts.device)
        pairs = self._scores or [(empty, empty.byte())]
        scores, labels = (torch.cat(column).cpu().numpy() for column in zip(*pairs, strict=True))
        everywhere = gather(group, (scores, np.packbits(labels, axis=1)))
        all_scores = np.concatenate([scores for scores, _ in everywhere])
        packed = np.concatenate([bits for _, bits in everywhere])
        all_labels = np.unpackbits(packed, axis=1, count=self._classes)
        own = rank_slice(range(self._classes), group.rank, group.world_size)
        precisions = [average_precision(all_scores[:, c], all_labels[:, c]) for c in own]
        found = chain.from_iterable(gather(group, precisions))
        counts = self.counts.view(3, -1).T.tolist()
        return [
            LabelResult(right, samples, predicted, value)
            for (right, samples, predicted), value in zip(counts, found, strict=True)
        ]


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


def add_label_metrics(record: EvalRecord, results: Sequence[LabelResult]) -> None:
    """Adds the metrics of the classes to a record with a loss; no mean is known without a finite loss."""
    counts = [(result.correct, result.samples, result.predicted) for result in results]
    if any(samples or predicted for _, samples, predicted in counts):
        means = macro(class_scores(*row) for row in counts)
        record.macro_precision, record.macro_recall, record.macro_f1 = means
        right, samples, predicted = map(sum, zip(*counts, strict=True))
        record.micro_f1 = class_scores(right, samples, predicted).f1
    known = [result.average_precision for result in results if result.average_precision is not None]
    if known and record.loss is not None and math.isfinite(record.loss):
        record.map = math.fsum(known) / len(known)


def average_precision(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> float | None:
    """Returns the average precision of a class, 0..1; None if no sample has it.

    It is the sum over the thresholds of the precision times the gain in recall, without interpolation, as of
    scikit-learn. Samples with the same score count together, so their order does not matter.

    Args:
        scores: of the class, [n].
        labels: 1 for the samples that have it, [n].
    """
    positives = int(labels.sum())
    if not positives:
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of equal scores
    right = np.cumsum(labels[order], dtype=np.int64)[ends]
    gains = np.diff(right, prepend=0)
    return math.fsum((gains * right / (ends + 1)).tolist()) / positives
