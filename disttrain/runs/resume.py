"""Where a run begins: at the beginning, or at the newest sound checkpoint of the same experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config import load_config
from disttrain.errors import CheckpointError, UsageError
from disttrain.runs.fingerprint import changes_since, refuse, saved_identity
from disttrain.runs.manifest import MANIFEST, latest_valid, read_state, step_of, verify
from disttrain.runs.runfolder import RunFolder


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from, or None for the beginning.
        step: optimizer steps taken until then.
        finished: the run in the folder has finished already, there is nothing to do.
        notes: lines for the user: what was found, and what was passed over and why.
        changes: differences from what is gone on with that `--force` lets pass, as `key: old -> new`.
    """

    checkpoint: Path | None
    step: int = 0
    finished: bool = False
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def is_finished(folder: RunFolder, now: Mapping[str, Any]) -> bool:
    """Tells whether the run in a folder is the one of this identity and has finished; any node may ask."""
    if not folder.config.exists() or folder.status().get("state") != "finished":
        return False
    saved = load_config(folder.config).model_dump(mode="json")
    longer = now["config"]["train"]["epochs"] > saved["train"]["epochs"]
    return not longer and not changes_since({"config": saved}, now)


def resume_point(folder: RunFolder, resume: str, now: Mapping[str, Any], *, force: bool = False) -> Start:
    """Decides where a run begins; changes nothing.

    Args:
        folder: the run folder; need not exist.
        resume: auto, never, or the path of a run folder or checkpoint.
        now: the identity of this run.
        force: go on although config or data set have changed.

    Raises:
        UsageError: the folder holds a run that must not be continued, or one of another config or data set.
        CheckpointError: there is no checkpoint at the path, or none that is sound.
    """
    saved: Mapping[str, Any] | None = None
    if folder.config.exists():
        if resume == "never":
            raise UsageError(f"{folder.path}: holds a run; choose another --run-dir or --resume auto")
        saved = {"config": load_config(folder.config).model_dump(mode="json")}
    if resume == "auto" and is_finished(folder, now):
        return Start(None, finished=True)
    if resume == "never":
        return Start(None)

    elsewhere = None if resume == "auto" else resume
    checkpoint, damages = (None, []) if elsewhere else latest_valid(folder.checkpoints)
    if elsewhere is None and checkpoint is None:  # it may have begun with another run's and have none yet
        elsewhere = folder.status().get("began_from")
    if elsewhere is not None:
        checkpoint, damages = _at(Path(elsewhere))
        inside = checkpoint.resolve().is_relative_to(folder.path.resolve())
        if resume != "auto" and saved is not None and not inside:
            raise UsageError(f"{folder.path}: holds a run already; choose another --run-dir or --resume auto")

    notes = [str(damage) for damage in damages]
    what, step = f"{folder.path}: holds a run of", 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        saved = saved_identity(checkpoint, state)
        what, step = f"{checkpoint}: was saved with", state["step"]
    elif saved is not None:
        notes.append(f"{folder.path}: no checkpoint yet; begins at the beginning")
    changes = [] if saved is None else changes_since(saved, now)
    if changes and not force:
        raise refuse(what, changes)
    return Start(checkpoint, step, notes=tuple(notes), changes=tuple(changes))


def _at(path: Path) -> tuple[Path, list[CheckpointError]]:
    """Returns the checkpoint at a path, or the newest sound one of the run folder there."""
    if (path / "checkpoints").is_dir():
        found, damages = latest_valid(path / "checkpoints")
        if found is not None:
            return found, damages
    elif (path / MANIFEST).exists() or step_of(path) >= 0:
        found = path.resolve()
        verify(found)
        return found, []
    raise CheckpointError(f"--resume {path}: neither a run folder with a checkpoint nor a checkpoint")
