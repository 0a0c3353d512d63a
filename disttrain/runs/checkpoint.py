"""Checkpoints that are complete or absent, and that notice a flipped bit.

A checkpoint is a folder: safetensors for tensors, JSON for everything else, and the MANIFEST.json of
`manifest.py`. It is written under a temporary name, synced, verified and renamed; only then do the `latest`
and `best` links move and older checkpoints get deleted. A complete one always exists. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from disttrain.errors import CheckpointError, StorageError, TrainingError
from disttrain.files import holds, move, persist, storage_error, sync_folder, write_new
from disttrain.runs.manifest import (
    MANIFEST,
    STATE,
    entry,
    list_steps,
    point_to,
    pointed_to,
    read,
    replaced,
    write_manifest,
)
from disttrain.runs.tensorfile import file_pieces

_BLOCK_BYTES = 4096  # a file takes whole blocks
_HEADER_BYTES = 128  # of a tensor in a safetensors file, besides its name


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        path: its folder.
        parts: nested data of every part (model, optimizer, ema); tensors are on the CPU.
        state: the JSON state: progress, best accuracy, scaler.
    """

    path: Path
    parts: dict[str, Any]
    state: dict[str, Any]

    def value(self, key: str) -> Any:
        """Returns a value of the state.

        Raises:
            CheckpointError: it was not saved.
        """
        if key not in self.state:
            raise CheckpointError(f"{self.path / STATE}: has no {key}; use another checkpoint")
        return self.state[key]

    def part(self, name: str) -> Any:
        """Returns the data of a part.

        Raises:
            CheckpointError: it was not saved.
        """
        if name not in self.parts:
            raise CheckpointError(f"{self.path}: has no {name}; use another checkpoint")
        return self.parts[name]


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of a run, which training no longer changes.

    Attributes:
        step: optimizer steps taken; names the checkpoint.
        skeletons: name of each part -> its nested data without the tensors.
        tensors: name of each part -> its tensors, on the device they were on.
        state: JSON values.
        ready: CUDA event recorded after the copies on a GPU, or None.
        buffers: name of each part -> the tensors of it that may be infinite.
        files: name of each further file -> its content.
    """

    step: int
    skeletons: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    ready: torch.cuda.Event | None
    buffers: Mapping[str, Collection[str]] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def snapshot(
    step: int,
    parts: Mapping[str, Any],
    state: Mapping[str, Any],
    buffers: Mapping[str, Collection[str]] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Snapshot:
    """Copies the content of a checkpoint without waiting for the device.

    Args:
        step: optimizer steps taken; names the checkpoint.
        parts: name of each part -> nested dicts and lists of tensors and JSON values, such as a state_dict.
            No tensor may be NaN, and only those of `buffers` may be infinite.
        state: JSON values.
        buffers: name of each part -> the names of its tensors that may be infinite.
        files: name of each further file -> its content.
    """
    skeletons, views = _take_apart(parts)
    # Cloned because training changes the originals; contiguous, as in a file.
    tensors = {
        part: {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}
        for part, named in views.items()
    }
    ready = None
    if any(tensor.is_cuda for part in tensors.values() for tensor in part.values()):
        ready = torch.cuda.Event()
        ready.record()
    return Snapshot(step, skeletons, tensors, dict(state), ready, buffers or {}, files or {})


def write(folder: Path, taken: Snapshot, *, keep: int, best: bool) -> Path:
    """Writes a checkpoint, points the links to it, and deletes all but the newest `keep`.

    Only rank 0 calls this, with the checkpoints folder of the run. Returns the folder of the checkpoint.

    Raises:
        TrainingError: a tensor is not finite.
        StorageError: it cannot be written. Both errors leave the earlier checkpoints unchanged.
    """
    target = folder / f"step_{taken.step:08d}"
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        parts = {}
        for part, tensors in taken.tensors.items():
            host = _on_host(tensors, taken.ready)
            _check_finite(part, host, taken)
            name = f"{part}.safetensors"
            parts[name] = _write_part(partial / name, *file_pieces(host))
        for name, content in ({STATE: _document(taken.skeletons, taken.state)} | dict(taken.files)).items():
            parts[name] = _write_part(partial / name, content)
        _check_written(partial / MANIFEST, write_manifest(partial, parts))
        sync_folder(partial)
        _put_in_place(partial, target)
        point_to(folder / "latest", target)
        if best:
            point_to(folder / "best", target)
        sync_folder(folder)
        _rotate(folder, keep)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # before the free space is counted
        needed = _bytes(taken.skeletons, taken.tensors, taken.state)
        raise storage_error(target, error, needed) from None
    except CheckpointError as damage:
        raise StorageError(f"{target}: was not written correctly; check the disk: {damage}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_part(path: Path, *data: bytes | memoryview) -> dict[str, Any]:
    """Writes a part of a checkpoint, reads it back, and returns its entry in the manifest."""
    write_new(path, *data)
    _check_written(path, *data)
    return entry(path.name, *data)


def _check_written(path: Path, *data: bytes | memoryview) -> None:
    if not holds(path, *data):
        raise CheckpointError(f"{path}: damaged: the data read back differs from the data written")


def _put_in_place(partial: Path, target: Path) -> None:
    """Renames a complete checkpoint to its final name, and checks that it is visible there."""
    manifest = (partial / MANIFEST).read_bytes()
    old = replaced(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        move(target, old)  # under this name it still counts as a checkpoint
    try:
        move(partial, target)
    except OSError:
        if old.exists():
            move(old, target)
        raise

    def look() -> None:
        if (target / MANIFEST).read_bytes() != manifest:
            raise OSError(errno.ESTALE, "another checkpoint is still visible in its place")

    persist(look)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_finite(part: str, tensors: Mapping[str, Tensor], taken: Snapshot) -> None:
    if _surely_finite(tensors.values()):
        return
    buffers = taken.buffers.get(part, ())
    for name, tensor in tensors.items():
        bad = tensor.isnan() if name in buffers else tensor.isfinite().logical_not_()
        if count := int(bad.sum()):
            raise TrainingError(
                f"{part}: {count:,} of {tensor.numel():,} values of {name} are not finite at step "
                f"{taken.step:,}; nothing was saved, and the last checkpoint is older; lower "
                "optim.lr, set train.grad_clip, or use train.precision=fp32 (continue this run "
                "with --force)"
            )


def _surely_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether the sum of all values is finite; if so, each of them is. It takes one pass."""
    total: Any = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                # NumPy's sum uses one thread and leaves the others to training.
                total = total + (tensor.float() if tensor.itemsize < 4 else tensor).numpy().sum()
        return bool(np.isfinite(total))


class Writer:
    """Writes checkpoints one by one in a background thread.

    Args:
        folder: the checkpoints folder of the run.
        keep: as for `write`.
        done: called with each complete checkpoint and whether it is the best, in the thread that calls
            `check` or `wait`.
        writing: context manager around each write, in the background thread.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        done: Callable[[Path, bool], None],
        writing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._done = done
        self._writing = writing
        self._pending: tuple[ThreadPoolExecutor, Future[Path], bool] | None = None

    def begin(self, taken: Snapshot, best: bool) -> None:
        """Starts to write after the previous checkpoint is complete; raises the errors of `wait`."""
        self.wait()
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = thread, thread.submit(self._write, taken, best), best
        thread.shutdown(wait=False)  # the thread ends after the write

    def _write(self, taken: Snapshot, best: bool) -> Path:
        with self._writing():
            return write(self._folder, taken, keep=self._keep, best=best)

    def check(self) -> None:
        """Reports a checkpoint that has become complete; raises the errors of `wait`."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the pending checkpoint, if any, and reports it.

        Raises:
            StorageError, TrainingError: it could not be written; see `write`.
        """
        if self._pending is not None:
            (thread, future, best), self._pending = self._pending, None
            thread.shutdown()  # waits until the thread has ended
            self._done(future.result(), best)


def load(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint; `path` is its folder or a link to it.

    Raises:
        CheckpointError: the checkpoint or a part of it is missing or damaged; names the file.
    """
    contents = read(path)
    try:
        document = json.loads(contents[STATE])
        parts = {
            name: _fill(skeleton, load_tensors(contents[f"{name}.safetensors"]))
            for name, skeleton in document["parts"].items()
        }
    except KeyError as missing:
        raise CheckpointError(f"{path}: has no {missing.args[0]}; use another checkpoint") from None
    return Checkpoint(path.resolve(), parts, document["state"])


def bytes_needed(parts: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> int:
    """Returns the disk space of a checkpoint of these parts in bytes, rounded up."""
    return _bytes(*_take_apart(parts), state or {})


def _bytes(
    skeletons: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> int:
    content = sum(
        len(name) + _HEADER_BYTES + tensor.nbytes
        for part in tensors.values()
        for name, tensor in part.items()
    )
    blocks = len(tensors) + 4  # a partial block for each file and both folders
    return content + len(_document(skeletons, state)) + blocks * _BLOCK_BYTES


def _take_apart(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Returns the nested data of each part without the tensors, and the tensors of each part."""
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    return {name: _strip(part, "", tensors[name]) for name, part in parts.items()}, tensors


def _strip(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Returns `node` with its tensors moved to `tensors` and replaced by {"tensor": name}."""
    if isinstance(node, Tensor):
        if place in tensors:  # {"a": {"b": tensor}, "a.b": tensor}
            place = f"{place}#{len(tensors)}"
        tensors[place] = node.detach()
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
    """Returns tensors in host memory, without delaying other work of the device."""
    if ready is None:
        return tensors
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return {name: tensor.to("cpu") for name, tensor in tensors.items()}


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


def _document(skeletons: Mapping[str, Any], state: Mapping[str, Any]) -> bytes:
    return json.dumps({"state": state, "parts": skeletons}, allow_nan=False).encode()


def _rotate(folder: Path, keep: int) -> None:
    _delete_remains(folder)  # left by a process that was killed
    linked = {pointed_to(folder / name).name for name in ("latest", "best")}
    for path in list_steps(folder)[keep:]:
        if path.name not in linked:
            move(path, path.with_name(f".{path.name}.partial"))  # a half-deleted folder is never named step_*
    _delete_remains(folder)


def _delete_remains(folder: Path) -> None:
    for pattern in (".step_*.partial", ".step_*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)  # what is in use is met again at the next save
