"""Saves the checkpoints of a run beside the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from disttrain.runs.checkpoint import Writer, bytes_needed, snapshot
from disttrain.runs.evaluation import FILE, Evaluation
from disttrain.runs.identity import identity
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index
from disttrain.training.collectives import average_buffers
from disttrain.training.optim import state_bytes
from disttrain.training.parts import Parts, Position
from disttrain.training.rank_state import gather_rank_states


class RunSaver:
    """Saves the state of a run: every rank gives its own, rank 0 writes.

    Args:
        parts: what is saved.
        position: where the run is.
        index: the data set.
        folder: the run folder.
        done: told of every complete checkpoint and whether it is the best.
        writing: around the writing of each, in the thread that writes.
    """

    def __init__(
        self,
        parts: Parts,
        position: Position,
        index: Index,
        folder: RunFolder,
        *,
        done: Callable[[Path, bool], None],
        writing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._parts = parts
        self._position = position
        self._state = {
            "optimizer": parts.config.optim.name,
            "arithmetic": {
                **dataclasses.asdict(parts.settings),
                "device": parts.accelerator.device.type,
                "world_size": parts.world_size,
            },
            **identity(parts.config, index, parts.plan.skipped.tolist()),
        }
        self._buffers = {"model": {name for name, _ in parts.bare_model.named_buffers()}}
        if parts.ema is not None:
            self._buffers["ema"] = {name for name, _ in parts.ema.named_buffers()}
        self._writer = Writer(folder.checkpoints, parts.config.checkpoint.keep, done, writing)
        self.check = self._writer.check  # whether a save has failed in the meantime
        self.wait = self._writer.wait  # until everything is saved

    def save(self, *, best: bool, evaluation: Evaluation | None = None, stopping: bool = False) -> None:
        """Begins to save the state as it is now. Every rank calls this.

        Args:
            best: whether it is the best so far.
            evaluation: of the state, if there was one.
            stopping: whether the run ends here at a step where it would not have saved otherwise; what goes
                on from it must not differ from a run that was never stopped.

        Raises:
            StorageError, TrainingError: the save before could not be completed.
        """
        parts = self._parts
        # At a step where a run that is not stopped saves nothing, each rank's statistics are kept apart.
        ranks = gather_rank_states(parts, with_buffers=stopping and parts.world_size > 1)
        for network in parts.networks:
            average_buffers(parts.group, network)
        if parts.rank == 0:
            scaler = parts.accelerator.scaler
            state = dataclasses.asdict(self._position) | self._state
            state["scaler"] = scaler.state_dict() if scaler else None
            contents = saved_parts(parts) | {"ranks": ranks}
            files = {} if evaluation is None else {FILE: msgspec.json.encode(evaluation)}
            self._writer.begin(snapshot(self._position.step, contents, state, self._buffers, files), best)


def saved_parts(parts: Parts) -> dict[str, Any]:
    """Returns what every rank has alike and a checkpoint holds."""
    found = {"model": parts.bare_model.state_dict(), "optimizer": parts.optimizer.state_dict()}
    return found if parts.ema is None else found | {"ema": parts.ema.state_dict()}


def checkpoint_bytes(parts: Parts) -> int:
    """Returns what a checkpoint will take on the disk, rounded up."""
    beside = _RANK_BYTES * parts.world_size + _MISTAKES_BYTES + _CELL_BYTES * len(parts.val.classes) ** 2
    return bytes_needed(saved_parts(parts)) + state_bytes(parts.optimizer) + beside


_RANK_BYTES = 2**14  # the random number generators of a rank
_MISTAKES_BYTES = 2**13  # of an evaluation, and its record
_CELL_BYTES = 4  # of its confusion matrix; almost all are 0
