"""From a checkpoint to a run that goes on: whether it is the same one, where it goes on, and its state."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from disttrain.config import Config
from disttrain.data.epoch_plan import Plan
from disttrain.errors import CheckpointError
from disttrain.runs.checkpoint import Checkpoint
from disttrain.runs.fingerprint import changes_since, fingerprint, refuse, saved_identity
from disttrain.shards.index import Index
from disttrain.training.optim import load_state
from disttrain.training.rank import Rank
from disttrain.training.state import Progress, TrainState

log = logging.getLogger("disttrain")


def go_on(checkpoint: Checkpoint, state: TrainState, index: Index, rank: Rank, *, force: bool) -> Progress:
    """Puts a checkpoint into the parts of a run, whose model is not wrapped yet.

    Returns:
        Where the run goes on.

    Raises:
        CheckpointError, UsageError: as `saved_position`, `restore` and `restore_scaler` do.
    """
    progress = saved_position(checkpoint, state.config, index, state.plan, rank, force=force)
    restore(checkpoint, state.model, state.optimizer, state.ema, force=force)
    restore_scaler(checkpoint, state.accelerator.scaler, force=force)
    return progress


def saved_position(
    checkpoint: Checkpoint, config: Config, index: Index, plan: Plan, rank: Rank, *, force: bool
) -> Progress:
    """Returns where a run goes on, after checking that it is the run of the checkpoint.

    Raises:
        CheckpointError: it was saved with another optimizer, or does not say what it was saved with.
        UsageError: config or data set differ, and that is not forced.
    """
    if checkpoint.value("optimizer") != config.optim.name:
        raise CheckpointError(
            f"{checkpoint.path}: was saved with optim.name = {checkpoint.value('optimizer')}, "
            f"the config has {config.optim.name}; resume with the config it was saved with"
        )
    fields = dataclasses.fields(Progress)
    progress = Progress(**{field.name: checkpoint.value(field.name) for field in fields})
    saved = saved_identity(checkpoint.path, checkpoint.state)
    now = fingerprint(config, index, plan.skipped.tolist())  # now that what is left out is known
    changes = changes_since(saved, now)
    if changes and not force:
        raise refuse(f"{checkpoint.path}: was saved with", changes)
    before, left_out = (document["data"].get("skipped", 0) for document in (saved, now))
    if before != left_out and rank.number == 0 and rank.folder is not None:
        rank.folder.record_forced(progress.step, [f"data.skipped: {before} -> {left_out}"])
    if saved["order"] != now["order"] and progress.samples:
        say = print if rank.number == 0 else log.info
        say(f"the samples have another order now: epoch {progress.epoch + 1} begins again")
        progress.samples = 0
    return progress


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer,
    ema: nn.Module | None = None,
    *,
    force: bool = False,
) -> None:
    """Puts the parts of a checkpoint into a model, its optimizer and its moving average, if there is one.

    With `force` a moving average that the config does not use is left out.

    Raises:
        CheckpointError: a part is missing or not used, or names or shapes do not fit.
    """
    if ema is None and "ema" in checkpoint.parts and not force:
        raise CheckpointError(
            f"{checkpoint.path}: has a moving average of the weights (ema), the config has train.ema = null; "
            "resume with the config it was saved with, or leave it out with --force"
        )
    loaders: dict[str, Callable[[Any], Any]] = {
        "model": model.load_state_dict,
        "optimizer": lambda state: load_state(optimizer, state),
    }
    if ema is not None:
        loaders["ema"] = ema.load_state_dict
    for name, load_part in loaders.items():
        if name not in checkpoint.parts:
            raise CheckpointError(f"{checkpoint.path}: has no {name}; it was saved by a run without one")
        try:
            load_part(checkpoint.parts[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{checkpoint.path}: {name} does not fit the config: {reason}; "
                "resume with the config it was saved with"
            ) from None


def restore_scaler(checkpoint: Checkpoint, scaler: GradScaler | None, *, force: bool) -> None:
    """Puts the state of a checkpoint into the gradient scaler.

    Raises:
        CheckpointError: one of the two has a scaler and the other does not.
    """
    saved = checkpoint.value("scaler")
    if scaler is not None:
        if saved is None:
            raise CheckpointError(
                f"{checkpoint.path}: has no gradient scaler, which train.precision = fp16 needs; "
                "resume with the config it was saved with"
            )
        scaler.load_state_dict(saved)
    elif saved is not None and not force:
        raise CheckpointError(
            f"{checkpoint.path}: has a gradient scaler, which is for train.precision = fp16 alone; "
            "resume with the config it was saved with, or leave it out with --force"
        )
