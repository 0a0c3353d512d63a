"""What an evaluation has found: a file of the checkpoint whose weights it was of."""

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
    """A sample that was taken for another class."""

    probability: float
    """Of the predicted class, 0..1."""
    id: int
    """Of the sample."""
    label: int
    """Its class."""
    predicted: int
    """The class it was taken for."""


class Evaluation(msgspec.Struct):
    """What an evaluation has found, over all ranks."""

    record: EvalRecord
    """Its line of metrics.jsonl, without the time."""
    top5_correct: int
    """Samples whose class is among the five best."""
    classes: tuple[str, ...]
    """Their names, in the order of the matrix."""
    confusion: list[list[int]]
    """For each true class how often each class was predicted; the sum of a row is the class's samples."""
    mistakes: list[Mistake]
    """The most confident ones, the worst first."""


def evaluation_of(checkpoint: Path) -> Evaluation | None:
    """Returns the evaluation of a checkpoint, None if it was not evaluated.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    data = read_part(checkpoint, FILE)
    return None if data is None else msgspec.json.decode(data, type=Evaluation)
