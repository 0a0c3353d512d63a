"""What the loops call: who is told what happens, what saves, who asks to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.training.phases import Phases
from disttrain.training.saver import RunSaver


class Observer(Protocol):
    """Told what happens; every rank has one."""

    def train(self, record: TrainRecord) -> None:
        """Takes the means since the last log point."""

    def evaluate(self, record: EvalRecord) -> None:
        """Takes the result of an evaluation."""

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        """Takes the ids that this rank trains on in a step; epoch and step count from 1."""

    def bad_batch(self, epoch: int, step: int, ids: Sequence[int]) -> str:
        """Writes down the samples of a global batch whose loss is not finite.

        Returns:
            Where they can be read.
        """


class Gauges(Protocol):
    """Readings of all ranks that travel with the loss in its one reduction."""

    def read(self) -> Sequence[float]:
        """Returns this rank's numbers, 0 in the places of others; NaN is unknown. As long on every rank."""

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Turns the numbers summed over the ranks into fields of the train record."""


@dataclass(frozen=True)
class Callbacks:
    """What the loops call; `phases` is told of every phase that begins: heartbeat and clock."""

    observer: Observer
    gauges: Gauges
    saver: RunSaver
    stop_requested: Callable[[], bool]
    phases: Phases = field(default_factory=Phases)
