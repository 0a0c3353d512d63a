"""The results of an evaluation, stored in the checkpoint that was evaluated."""

from __future__ import annotations

from pathlib import Path

import msgspec

from disttrain.runs.manifest import read_part
from disttrain.runs.records import EvalRecord

FILE = "evaluation.json"
"""In a checkpoint that was evaluated."""

MISTAKES = 24
"""How many of the most confident ones are kept."""


class Mistake(msgspec.Struct, order=True, frozen=True):
    """A misclassified sample."""

    probability: float
    """Of the predicted class, 0..1."""
    id: int
    """Sample id."""
    label: int
    """The true class."""
    predicted: int
    """The predicted class."""


class Evaluation(msgspec.Struct):
    """The results of an evaluation over all ranks."""

    record: EvalRecord
    """Its line of metrics.jsonl, without the time."""
    top5_correct: int
    """Samples whose class is among the top five."""
    classes: tuple[str, ...]
    """Their names, in the order of the matrix."""
    confusion: list[list[int]]
    """Confusion matrix, counts by [true class][predicted class]."""
    mistakes: list[Mistake]
    """The most confident ones, the worst first."""


def evaluation_of(checkpoint: Path) -> Evaluation | None:
    """Returns the evaluation of a checkpoint, None if it was not evaluated.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    data = read_part(checkpoint, FILE)
    return None if data is None else msgspec.json.decode(data, type=Evaluation)
