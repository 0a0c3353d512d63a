"""Saves the checkpoints of a run, while training continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from disttrain.runs.checkpoint import Writer, bytes_needed, snapshot
from disttrain.runs.evaluation import FILE, Evaluation
from disttrain.runs.fingerprint import fingerprint
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index
from disttrain.training.collectives import average_buffers
from disttrain.training.optim import state_bytes
from disttrain.training.rank_state import gather_rank_states
from disttrain.training.state import Progress, TrainState
from disttrain.training.virtual_ranks import machine_facts


class RunSaver:
    """Saves the state of a run: gathers it from all ranks, and rank 0 writes it.

    Args:
        state: what to save.
        progress: how far the run is.
        index: the data set.
        folder: the run folder.
        done: called with every complete checkpoint, and whether it is the best.
        writing: the context in which the writing thread writes a checkpoint.
    """

    def __init__(
        self,
        state: TrainState,
        progress: Progress,
        index: Index,
        folder: RunFolder,
        *,
        done: Callable[[Path, bool], None],
        writing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._state = state
        self._progress = progress
        self._facts = {
            "optimizer": state.config.optim.name,
            "arithmetic": {
                **dataclasses.asdict(state.settings),
                "device": state.accelerator.device.type,
                "world_size": state.world_size,
                "machine": machine_facts(state.group.device),
            },
            **fingerprint(state.config, index, state.plan.skipped.tolist()),
        }
        if state.initial_weights is not None:
            self._facts["initial_weights"] = state.initial_weights._asdict()
        self._buffers = {"model": {name for name, _ in state.bare_model.named_buffers()}}
        if state.ema is not None:
            self._buffers["ema"] = {name for name, _ in state.ema.named_buffers()}
        self._writer = Writer(folder.checkpoints, state.config.checkpoint.keep, done, writing)
        self.check = self._writer.check  # raises the error of a failed save
        self.wait = self._writer.wait  # waits until everything is saved

    def save(self, *, best: bool, evaluation: Evaluation | None = None, stopping: bool = False) -> None:
        """Starts to save the current state. Every rank calls this.

        Args:
            best: whether the state is the best so far.
            evaluation: the evaluation of the state, if there was one.
            stopping: whether the run stops at a step at which it would not save otherwise.

        Raises:
            StorageError, TrainingError: the previous save failed.
        """
        state = self._state
        # An uninterrupted run does not average the batch-norm statistics at this step. The resumed run must
        # equal it, so the checkpoint has each rank's statistics.
        ranks = gather_rank_states(state, with_buffers=stopping and state.world_size > 1)
        for network in state.networks:
            average_buffers(state.group, network)
        if state.rank == 0:
            scaler = state.accelerator.scaler
            saved = dataclasses.asdict(self._progress) | self._facts
            saved["scaler"] = scaler.state_dict() if scaler else None
            contents = saved_parts(state) | {"ranks": ranks}
            files = {} if evaluation is None else {FILE: msgspec.json.encode(evaluation)}
            self._writer.begin(snapshot(self._progress.step, contents, saved, self._buffers, files), best)


def saved_parts(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a checkpoint that are the same on all ranks."""
    found = {"model": state.bare_model.state_dict(), "optimizer": state.optimizer.state_dict()}
    return found if state.ema is None else found | {"ema": state.ema.state_dict()}


def checkpoint_bytes(state: TrainState) -> int:
    """Returns the size of a checkpoint on disk, rounded up."""
    names, cells = state.val.classes, min(len(state.val.classes) ** 2, len(state.val.ids))
    evaluation = _MISTAKES_BYTES + _CELL_BYTES * cells + len(msgspec.json.encode(names))
    beside = _RANK_BYTES * state.world_size + evaluation
    return bytes_needed(saved_parts(state)) + state_bytes(state.optimizer) + beside


_RANK_BYTES = 2**14  # the random number generators of a rank
_MISTAKES_BYTES = 2**13  # of an evaluation, and its record
_CELL_BYTES = 20  # of its confusion matrix, which has at most a cell for each sample
