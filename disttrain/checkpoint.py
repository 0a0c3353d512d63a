"""Checkpoints that are complete or absent, and that notice a flipped bit.

A checkpoint is a folder: safetensors for tensors, JSON for everything else, and MANIFEST.json with the size
and sha256 of every part. It is written under a temporary name, synced, verified and renamed; only then do
the `latest` and `best` links move and older checkpoints go. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.errors import CheckpointError, StorageError
from disttrain.files import sync_folder
from disttrain.optim import load_state

FORMAT = 1
_MANIFEST = "MANIFEST.json"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was read from one checkpoint.

    Attributes:
        path: its folder.
        parts: nested data of every part (model, optimizer, ema); tensors are on the CPU.
        state: the JSON state: position, scores, scaler.
    """

    path: Path
    parts: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment, which training no longer changes.

    Attributes:
        step: optimizer steps taken; names the checkpoint.
        skeletons: name of each part -> its nested data without the tensors.
        tensors: name of each part -> its tensors, on the device they were on.
        state: JSON values.
        ready: recorded after the copies on a GPU, or None.
    """

    step: int
    skeletons: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    ready: torch.cuda.Event | None


def snapshot(step: int, parts: Mapping[str, Any], state: Mapping[str, Any]) -> Snapshot:
    """Copies what a checkpoint holds, without waiting for the device.

    Args:
        step: optimizer steps taken.
        parts: name -> nested dicts and lists of tensors and JSON values, such as a state_dict.
        state: JSON values.
    """
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    skeletons = {name: _strip(part, "", tensors[name]) for name, part in parts.items()}
    ready = None
    if any(tensor.is_cuda for part in tensors.values() for tensor in part.values()):
        ready = torch.cuda.Event()
        ready.record()
    return Snapshot(step, skeletons, tensors, dict(state), ready)


def write(folder: Path, taken: Snapshot, *, keep: int, best: bool) -> Path:
    """Writes a checkpoint and makes it the latest. Rank 0 alone calls this.

    Args:
        folder: the checkpoints folder of the run.
        taken: what to write.
        keep: number of checkpoints to keep, besides the best one.
        best: also make it the best.

    Returns:
        The folder of the checkpoint.

    Raises:
        StorageError: it cannot be written; the earlier checkpoints are as they were.
    """
    step = taken.step
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {}
        for name, tensors in taken.tensors.items():
            data = save_tensors(_on_host(tensors, taken.ready))
            files[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", data)
        document = {"state": taken.state, "parts": taken.skeletons}
        files[_STATE] = _write(partial / _STATE, _json(document))
        _write(partial / _MANIFEST, _json({"format": FORMAT, "files": files}))
        sync_folder(partial)
        verify(partial)
        replaced = folder / f".{target.name}.replaced.partial"
        if target.exists():  # left by a run that was resumed from an earlier step
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        sync_folder(folder)
        _link(folder / "latest", target.name)
        if best:
            _link(folder / "best", target.name)
        _rotate(folder, keep)
    except OSError as error:
        raise StorageError(
            f"{target}: the checkpoint cannot be written: {error.strerror or error}; "
            "free some space or fix the folder, then resume the run"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


class Writer:
    """Writes checkpoints one after the other in a thread of its own, beside the training.

    Args:
        folder: the checkpoints folder of the run.
        keep: number of checkpoints to keep, besides the best one.
        done: told of every complete checkpoint and whether it is the best, in the thread that calls `check`
            or `wait`.
    """

    def __init__(self, folder: Path, keep: int, done: Callable[[Path, bool], None]) -> None:
        self._folder = folder
        self._keep = keep
        self._done = done
        self._pending: tuple[Future[Path], bool] | None = None

    def begin(self, taken: Snapshot, best: bool) -> None:
        """Begins to write, when the one before is complete.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(write, self._folder, taken, keep=self._keep, best=best), best
        thread.shutdown(wait=False)  # ends when it is written

    def check(self) -> None:
        """Reports a checkpoint that has become complete.

        Raises:
            StorageError: it could not be written.
        """
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, if any, and reports it.

        Raises:
            StorageError: it could not be written.
        """
        if self._pending is not None:
            (future, best), self._pending = self._pending, None
            self._done(future.result(), best)


def load(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Args:
        path: its folder, or a link to it.

    Raises:
        CheckpointError: it is missing, or a part is missing or damaged; names the file.
    """
    contents = verify(path)
    document = json.loads(contents[_STATE])
    parts = {}
    for name, skeleton in document["parts"].items():
        tensors = load_tensors(contents[f"{name}.safetensors"])
        parts[name] = _fill(skeleton, tensors)
    return Checkpoint(path.resolve(), parts, document["state"])


def verify(path: Path) -> dict[str, bytes]:
    """Checks every part of a checkpoint against its manifest and returns their bytes.

    Raises:
        CheckpointError: a part is missing or damaged; names the file and both hashes.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no checkpoint")
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path / _MANIFEST}: missing or damaged; use an earlier checkpoint") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {version}; this version reads format {FORMAT}")
    contents = {}
    for name, expected in files.items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}; use an earlier checkpoint") from None
        found = hashlib.sha256(data).hexdigest()
        count, sha256 = expected.get("bytes"), expected.get("sha256")
        if (len(data), found) != (count, sha256):
            raise CheckpointError(
                f"{path / name}: damaged: {len(data)} bytes with sha256 {found}, the manifest says "
                f"{count} bytes with {sha256}; use an earlier checkpoint"
            )
        contents[name] = data
    return contents


def size(parts: Mapping[str, Any]) -> int:
    """Returns the bytes that the tensors of a checkpoint of these parts take."""
    tensors: dict[str, Tensor] = {}
    _strip(parts, "", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def _strip(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Returns `node` with its tensors moved to `tensors` and replaced by {"tensor": name}."""
    if isinstance(node, Tensor):
        if place in tensors:  # {"a": {"b": tensor}, "a.b": tensor}
            place = f"{place}#{len(tensors)}"
        tensors[place] = node.detach().clone()  # of its own: safetensors refuses shared memory
        return {"tensor": place}
    if isinstance(node, Mapping):
        return {
            "dict": [
                [key, _strip(value, f"{place}.{key}" if place else str(key), tensors)]
                for key, value in node.items()
            ]
        }
    if isinstance(node, (list, tuple)):
        return {"list": [_strip(value, f"{place}.{i}", tensors) for i, value in enumerate(node)]}
    return {"value": node}


def _on_host(tensors: dict[str, Tensor], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
    """Returns tensors in host memory and in NCHW order, without holding up what the device does."""
    if ready is None:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}


def _fill(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _fill(value, tensors) for key, value in content}
        case "list":
            return [_fill(value, tensors) for value in content]
        case _:
            return content


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False).encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync_folder(link.parent)


def _rotate(folder: Path, keep: int) -> None:
    linked = {(folder / link).resolve().name for link in ("latest", "best")}
    steps = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for path in steps[:-keep]:
        if path.name not in linked:
            doomed = path.with_name(f".{path.name}.partial")  # a half-deleted checkpoint is never a step_*
            path.rename(doomed)
    for path in folder.glob(".step_*.partial"):  # and what a process that was killed has left
        shutil.rmtree(path)


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None
) -> None:
    """Puts the parts of a checkpoint into a model, its optimizer and its moving average.

    Raises:
        CheckpointError: a part is missing, or names or shapes do not fit.
    """
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
