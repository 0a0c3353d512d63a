"""Resumes a run from a checkpoint: checks that it is the same run, and restores its progress and state."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from disttrain.config import Config, differences
from disttrain.data.epoch_plan import Plan
from disttrain.errors import CheckpointError
from disttrain.runs.checkpoint import Checkpoint
from disttrain.runs.fingerprint import changes_since, fingerprint, refuse, saved_fingerprint
from disttrain.shards.index import Index
from disttrain.training.optim import load_state
from disttrain.training.rank import Rank
from disttrain.training.selection import forget_other_rules
from disttrain.training.state import Progress, TrainState
from disttrain.training.virtual_ranks import machine_facts

log = logging.getLogger("disttrain")


def resume(checkpoint: Checkpoint, state: TrainState, index: Index, rank: Rank, *, force: bool) -> Progress:
    """Loads a checkpoint into the state of a run, whose model is not wrapped yet.

    Returns:
        The progress to resume from.

    Raises:
        CheckpointError, UsageError: see `saved_progress`, `restore` and `restore_scaler`.
    """
    progress = saved_progress(checkpoint, state.config, index, state.plan, rank, force=force)
    restore(checkpoint, state.model, state.optimizer, state.ema, force=force)
    restore_scaler(checkpoint, state.accelerator.scaler, force=force)
    if state.config.train.reproducible and rank.number == 0:
        before, now = checkpoint.value("arithmetic").get("machine"), machine_facts(state.group.device)
        if before is not None and before != now:
            changes = "; ".join(differences(before, now))
            print(f"train.reproducible: the bits may differ from here on, because of another {changes}")
    return progress


def saved_progress(
    checkpoint: Checkpoint, config: Config, index: Index, plan: Plan, rank: Rank, *, force: bool
) -> Progress:
    """Returns the progress to resume from, after checking that the checkpoint is from this run.

    Raises:
        CheckpointError: the checkpoint has another optimizer, or no fingerprint.
        UsageError: config or data set differ, without `force`.
    """
    if checkpoint.value("optimizer") != config.optim.name:
        raise CheckpointError(
            f"{checkpoint.path}: was saved with optim.name = {checkpoint.value('optimizer')}, "
            f"but the config has {config.optim.name}; resume with the config it was saved with"
        )
    progress = _progress(checkpoint)
    saved = saved_fingerprint(checkpoint.path, checkpoint.state)
    now = fingerprint(config, index, plan.skipped.tolist())
    changes = changes_since(saved, now)
    if changes and not force:
        raise refuse(f"{checkpoint.path}: was saved with", changes)
    forget_other_rules(progress, saved["config"], config)
    before, left_out = (document["data"].get("skipped", 0) for document in (saved, now))
    if before != left_out and rank.number == 0 and rank.folder is not None:
        rank.folder.record_forced(progress.step, [f"data.skipped: {before} -> {left_out}"])
    if saved["order"] != now["order"] and progress.samples:
        say = print if rank.number == 0 else log.info
        say(f"the order of the samples has changed: epoch {progress.epoch + 1} starts again")
        progress.samples = 0
    return progress


def _progress(checkpoint: Checkpoint) -> Progress:
    if "best_accuracy" in checkpoint.state:  # of an earlier version
        names = ["epoch", "samples", "step", "samples_seen", "evaluation_due"]
        best = checkpoint.value("best_accuracy")
        return Progress(**{name: checkpoint.value(name) for name in names}, best=best)
    return Progress(**{field.name: checkpoint.value(field.name) for field in dataclasses.fields(Progress)})


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer,
    ema: nn.Module | None = None,
    *,
    force: bool = False,
) -> None:
    """Loads a checkpoint into a model, its optimizer and its moving average, if there is one.

    With `force`, a moving average that the config does not use is ignored.

    Raises:
        CheckpointError: a part is missing or unused, or its names or shapes do not match.
    """
    if ema is None and "ema" in checkpoint.parts and not force:
        raise CheckpointError(
            f"{checkpoint.path}: has a moving average of the weights, but the config has train.ema = null; "
            "resume with the config it was saved with, or ignore the average with --force"
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
                f"{checkpoint.path}: the {name} does not match the config: {reason}; "
                "resume with the config it was saved with"
            ) from None


def restore_scaler(checkpoint: Checkpoint, scaler: GradScaler | None, *, force: bool) -> None:
    """Loads the state of the gradient scaler.

    Raises:
        CheckpointError: only one of checkpoint and run has a scaler.
    """
    saved = checkpoint.value("scaler")
    if scaler is not None:
        if saved is None:
            raise CheckpointError(
                f"{checkpoint.path}: has no gradient scaler, but train.precision = fp16 needs one; "
                "resume with the config it was saved with"
            )
        scaler.load_state_dict(saved)
    elif saved is not None and not force:
        raise CheckpointError(
            f"{checkpoint.path}: has a gradient scaler, but only train.precision = fp16 uses one; "
            "resume with the config it was saved with, or ignore the scaler with --force"
        )
