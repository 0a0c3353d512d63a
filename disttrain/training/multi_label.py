"""The metrics of an evaluation on multi-label data. The scores of each class are judged on their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids, rank_slice
from disttrain.runs.eval_metrics import class_scores, macro
from disttrain.runs.evaluation import MISTAKES, LabelResult, Mistake
from disttrain.runs.records import EvalRecord
from disttrain.training.collectives import Group, gather
from disttrain.training.exactly_once import EvalSums, seen_by_rank
from disttrain.training.loss import correct, evaluation_loss

Scores = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]
"""Scores of some samples and their labels, [n, classes] each."""


class MultiLabelMetrics:
    """Counts the predictions of one rank for each class, on its device. A score above 0 predicts the class.

    Args:
        device: of the rank.
        classes: number of classes.

    Attributes:
        counts: int64 [3 * classes]: correct predictions, samples and predictions of each class.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self.counts = torch.zeros(3 * classes, dtype=torch.int64, device=device)
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)  # correct, without augmentation
        self._classes = classes
        self._losses: list[Tensor] = []  # of each batch
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._seen: list[Ids] = []
        self._wrong: list[tuple[Ids, list[Tensor]]] = []  # the mistakes of each batch, as columns

    def add(self, batch: Batch, logits: Tensor, plain: Tensor) -> None:
        """Adds a batch, without a synchronisation; for the arguments see `take` of `score`."""
        labels = batch.labels
        predicted, present = logits > 0, labels > 0
        self._losses.append(evaluation_loss(logits, labels))
        self._hits += torch.stack([correct(logits, labels), correct(plain, labels)]).sum(1)
        self.counts += torch.stack([predicted & present, present, predicted]).sum(1).flatten()
        self._scores.append((logits, labels))
        chances = logits.sigmoid()
        wrong = torch.where(present, 1 - chances, chances).where(predicted != present, -1.0)
        confidence, classes = wrong.max(1)
        worst = confidence.topk(min(MISTAKES, len(labels)))
        at = worst.indices
        missed = present[at, classes[at]]
        self._wrong.append((batch.ids, [worst.values, at, classes[at], missed]))
        self._seen.append(batch.ids)

    def mistakes(self) -> list[Mistake]:
        """Returns the most confident mistake of each of the worst samples; waits for the device."""
        return [
            Mistake(chance, int(ids[place]), label if missed else -1, -1 if missed else label)
            for ids, columns in self._wrong
            for chance, place, label, missed in zip(*(c.tolist() for c in columns), strict=True)
            if chance >= 0  # a batch may have fewer mistakes
        ]

    def losses(self) -> list[float]:
        """Returns the loss summed over each batch of this rank; waits for the device."""
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        return losses

    def sums(self) -> EvalSums:
        """Returns the sums of this rank; waits for the device."""
        hits, plain = self._hits.tolist()
        seen = vars(seen_by_rank(self._seen))
        return EvalSums(**seen, correct=hits, plain_correct=plain, top5_correct=0, bins=[])

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
