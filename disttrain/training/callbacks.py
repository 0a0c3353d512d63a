"""The callbacks of the training and evaluation loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.training.phases import Phases
from disttrain.training.saver import RunSaver


class Observer(Protocol):
    """Receives the events of training; every rank has one."""

    def train(self, record: TrainRecord) -> None:
        """Receives the means since the last log point."""

    def evaluate(self, record: EvalRecord) -> None:
        """Receives the result of an evaluation."""

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        """Receives the ids that this rank trains on in a step; epoch and step count from 1."""

    def bad_batch(self, epoch: int, step: int, ids: Sequence[int]) -> str:
        """Records the samples of a global batch with a non-finite loss.

        Returns:
            Where they are recorded.
        """


class Gauges(Protocol):
    """Readings of all ranks, which are reduced together with the loss."""

    def read(self) -> Sequence[float]:
        """Returns this rank's numbers, with 0 in the slots of other ranks and NaN for unknown.

        The length is the same on every rank.
        """

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Turns the numbers, summed over the ranks, into fields of the train record."""


@dataclass(frozen=True)
class Callbacks:
    """What the loops call.

    Attributes:
        observer: receives events.
        gauges: read at every log point.
        saver: saves checkpoints.
        stop_requested: returns whether this rank was asked to stop.
        phases: times every phase and beats the heartbeat.
    """

    observer: Observer
    gauges: Gauges
    saver: RunSaver
    stop_requested: Callable[[], bool]
    phases: Phases = field(default_factory=Phases)
