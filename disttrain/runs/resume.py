"""Where a run starts: from scratch, or from the newest valid checkpoint of the same experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config import load_config
from disttrain.errors import CheckpointError, UsageError
from disttrain.runs.fingerprint import changes_since, refuse, saved_fingerprint
from disttrain.runs.manifest import MANIFEST, latest_valid, pointed_to, read_state, step_of, verify_checkpoint
from disttrain.runs.runfolder import STOPPED_EARLY, RunFolder


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to resume from, or None to start from scratch.
        step: optimizer steps taken until then.
        finished: whether the run in the folder has already finished.
        notes: lines for the user: what was found, and what was skipped and why.
        changes: differences from the resumed run that `--force` allows, as `key: old -> new`.
    """

    checkpoint: Path | None
    step: int = 0
    finished: bool = False
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def is_finished(folder: RunFolder, now: Mapping[str, Any]) -> bool:
    """Returns whether the run in a folder has this fingerprint and has finished. Any node may call this."""
    if not folder.config.exists() or folder.status().get("state") != "finished":
        return False
    saved = load_config(folder.config).model_dump(mode="json")
    key = "stop_early" if _stopped_early(folder) else "epochs"  # what ended it
    before, after = saved["train"][key], now["config"]["train"].get(key)
    goes_on = before != after if key == "stop_early" else after > before
    return not goes_on and not changes_since({"config": saved}, now)


def finished_text(folder: RunFolder) -> str:
    """Returns what to say of a run that has already finished."""
    text = f"{folder.path}: this run has already finished; nothing to do"
    if _stopped_early(folder):
        text += f". It {folder.status()['reason']}. To train on, set train.stop_early=null or change its keys"
    return text


def _stopped_early(folder: RunFolder) -> bool:
    return str(folder.status().get("reason")).startswith(STOPPED_EARLY)


def resume_point(folder: RunFolder, resume: str, now: Mapping[str, Any], *, force: bool = False) -> Start:
    """Decides where a run starts; changes nothing on disk.

    Args:
        folder: the run folder; need not exist.
        resume: auto, never, or the path of a run folder or checkpoint.
        now: the fingerprint of this run.
        force: resume although config or data set have changed.

    Raises:
        UsageError: the folder holds a run that must not be continued, or one of another config or data set.
        CheckpointError: there is no valid checkpoint at the path.
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
    # The run may have started from another run's checkpoint, and not saved its own first one yet.
    if elsewhere is None and checkpoint is None:
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
        saved = saved_fingerprint(checkpoint, state)
        what, step = f"{checkpoint}: was saved with", state["step"]
    elif saved is not None:
        notes.append(f"{folder.path}: no checkpoint yet; starting from scratch")
    changes = [] if saved is None else changes_since(saved, now)
    if changes and not force:
        raise refuse(what, changes)
    return Start(checkpoint, step, notes=tuple(notes), changes=tuple(changes))


def resume_again(folder: RunFolder, resume: str) -> str:
    """Returns `--resume` for a run that starts again by itself, after a crash or a requeue.

    Once the run has begun, it continues with its own checkpoints and not with what it began from.
    """
    begun = folder.config.exists() or "began_from" in folder.status()
    return "auto" if begun else resume


def _at(path: Path) -> tuple[Path, list[CheckpointError]]:
    """Returns the checkpoint at a path, or the newest valid one if it is a run folder."""
    if (path / "checkpoints").is_dir():
        found, damages = latest_valid(path / "checkpoints")
        if found is not None:
            return found, damages
    elif path.name in {"latest", "best"}:
        path = pointed_to(path)
    if (path / MANIFEST).exists() or step_of(path) >= 0:
        found = path.resolve()
        verify_checkpoint(found)
        return found, []
    raise CheckpointError(f"--resume {path}: neither a run folder with a checkpoint nor a checkpoint")
