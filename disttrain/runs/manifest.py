"""The files of a checkpoint: manifest, verification, and the search for the newest valid one.

MANIFEST.json names every part with its size, sha256 and format version. It holds a hash of itself and is one
line of canonical JSON, so that a changed bit in it is noticed too. `checkpoint.py` reads the content of the
parts. Nothing here imports torch, because the launcher looks for checkpoints before it starts the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from disttrain.errors import CheckpointError
from disttrain.files import link, move, write_new

FORMAT = 2
"""Format of the manifest."""

PART_FORMATS = {".safetensors": 1, ".json": 1}
"""Format of each kind of part."""

STATE = "state.json"
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.step_(\d{8,})\.replaced")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def canonical(document: Any) -> bytes:
    """Returns the canonical form of a JSON document, independent of the order of its keys."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def entry(name: str, *pieces: bytes | memoryview) -> dict[str, Any]:
    """Returns the manifest entry of a part with these bytes."""
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    return {
        "bytes": sum(map(len, pieces)),
        "sha256": sha256.hexdigest(),
        "format": PART_FORMATS[Path(name).suffix],
    }


def write_manifest(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Writes the manifest of parts that are in the folder, each with its `entry`, and returns its bytes."""
    document = {"format": FORMAT, "parts": parts}
    sha256 = hashlib.sha256(canonical(document)).hexdigest()
    data = canonical(document | {"sha256": sha256})
    write_new(folder / MANIFEST, data)
    return data


def verify_checkpoint(path: Path) -> None:
    """Reads a checkpoint and compares it with its manifest.

    Raises:
        CheckpointError: it is missing, or a part is missing or damaged; names the file and both hashes.
    """
    for name, expected in read_manifest(path).items():
        _read(path / name, expected)


def read(path: Path) -> dict[str, bytes]:
    """Returns the verified bytes of every part of a checkpoint.

    Raises:
        CheckpointError: as `verify_checkpoint` does.
    """
    return {name: _read(path / name, expected) for name, expected in read_manifest(path).items()}


def read_part(path: Path, name: str) -> bytes | None:
    """Returns the bytes of one part of a checkpoint; None if it has none of this name.

    Raises:
        CheckpointError: as `verify_checkpoint` does, but of this part alone.
    """
    parts = read_manifest(path)
    return _read(path / name, parts[name]) if name in parts else None


def read_state(path: Path) -> dict[str, Any]:
    """Returns the JSON state of a checkpoint without its tensors.

    Raises:
        CheckpointError: as `verify_checkpoint` does, but of this part alone.
    """
    data = read_part(path, STATE)
    if data is None:
        raise CheckpointError(f"{path}: has no {STATE}; use an earlier checkpoint")
    state: dict[str, Any] = json.loads(data)["state"]
    return state


def size(path: Path) -> int:
    """Returns the size of a checkpoint in bytes, from its manifest."""
    return sum(part["bytes"] for part in read_manifest(path).values())


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the entry of each part of a checkpoint, without reading the parts.

    Raises:
        CheckpointError: there is no manifest, or it is damaged or of another format.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no checkpoint")
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        document = json.loads(data)
        version = document["format"]
    except OSError as error:
        raise CheckpointError(f"{file}: missing: {error.strerror}; use an earlier checkpoint") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{file}: damaged: not a manifest; use an earlier checkpoint") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {version}; this version reads format {FORMAT}: use the version of "
            "disttrain that wrote it"
        )
    expected = document.pop("sha256", None)
    found = hashlib.sha256(canonical(document)).hexdigest()
    if found != expected or data != canonical(document | {"sha256": expected}):
        _damaged(file, f"sha256 {found}", f"it says {expected}")
    parts: dict[str, dict[str, Any]] = document["parts"]
    for name, part in parts.items():
        if not _NAME.fullmatch(name) or part["format"] != PART_FORMATS.get(Path(name).suffix):
            raise CheckpointError(
                f"{path}: this version does not know the part {name}, format {part['format']}: use the "
                "version of disttrain that wrote it"
            )
    return parts


def _read(path: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: missing: {error.strerror}; expected {expected['bytes']:,} bytes with sha256 "
            f"{expected['sha256']}; use an earlier checkpoint"
        ) from None
    found = entry(path.name, data)
    if found != expected:
        _damaged(
            path,
            f"{found['bytes']:,} bytes with sha256 {found['sha256']}",
            f"the manifest says {expected['bytes']:,} bytes with {expected['sha256']}",
        )
    return data


def _damaged(path: Path, found: str, expected: str) -> NoReturn:
    raise CheckpointError(f"{path}: damaged: found {found}, {expected}; use an earlier checkpoint")


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint's folder, -1 if it is not such a name."""
    match = _STEP.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_steps(folder: Path) -> list[Path]:
    """Returns the checkpoints in a checkpoints folder, newest first, valid or not.

    Includes the old copy of a checkpoint whose replacement was interrupted, under the name from `replaced`.
    """
    try:
        paths = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}; check the folder") from None
    return sorted(paths, key=lambda path: (step_of(path), not path.name.startswith(".")), reverse=True)


def pointed_to(pointer: Path) -> Path:
    """Returns the checkpoint that `latest` or `best` points to; it may be missing.

    A pointer is a symbolic link. It is a text file with a name if the file system has no links, and a copy of
    the checkpoint after `cp -L`, which follows links.
    """
    if pointer.is_symlink():
        return pointer.parent / pointer.readlink()
    try:
        if not pointer.is_dir():
            return pointer.with_name(pointer.read_text().strip())
        manifest = (pointer / MANIFEST).read_bytes()
        for path in list_steps(pointer.parent):
            if (path / MANIFEST).read_bytes() == manifest:
                return path
    except (OSError, ValueError):
        pass
    return pointer


def point_to(pointer: Path, checkpoint: Path) -> None:
    """Makes `latest` or `best` point to a checkpoint beside it.

    Raises:
        OSError: the pointer cannot be written.
    """
    if _is_copy(pointer):
        needless, aside = (
            pointed_to(pointer) != pointer,
            _free_name(pointer.with_name(f"copied_{pointer.name}")),
        )
        move(pointer, aside)
        if needless:
            shutil.rmtree(aside, ignore_errors=True)
    link(pointer, checkpoint.name)


def _free_name(base: Path) -> Path:
    """Returns `base`, or `base` with the first number that is free."""
    path, number = base, 1
    while os.path.lexists(path):
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _is_copy(pointer: Path) -> bool:
    return pointer.is_dir() and not pointer.is_symlink()


def replaced(path: Path) -> Path:
    """Returns the temporary name of a checkpoint that is being replaced."""
    return path.with_name(f".{path.name}.replaced")


def latest_valid(folder: Path) -> tuple[Path | None, list[CheckpointError]]:
    """Finds the checkpoint with the highest step that verifies; links are ignored. The folder may be missing.

    Returns:
        The checkpoint, or None if there never was one; and why each newer one was skipped.

    Raises:
        CheckpointError: there are checkpoints, or a link to one, but none verifies.
    """
    damages: list[CheckpointError] = []
    for path in list_steps(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError as damage:
            damages.append(damage)
        else:
            return path, damages
    latest = folder / "latest"
    if os.path.lexists(latest) and not damages:
        damages.append(CheckpointError(f"{latest}: leads to {pointed_to(latest).name}, which is missing"))
    if damages:
        reasons = "\n".join(str(damage) for damage in damages)
        raise CheckpointError(
            f"{reasons}\n{folder}: no checkpoint is sound; begin a new run in another --run-dir"
        )
    return None, []


def quarantine(chosen: Path, step: int) -> tuple[Path, list[str]]:
    """Renames the checkpoints of a run that are newer than the one it resumes from.

    They are kept as `damaged_step_*` or `abandoned_step_*`, which saves, rotation and resumes ignore. The
    resumed run writes its own checkpoints of those steps.

    Args:
        chosen: the checkpoint to resume from; renamed to match its step if needed.
        step: of that checkpoint.

    Returns:
        The chosen checkpoint, and a line for each renamed one.

    Raises:
        OSError: one cannot be renamed.
    """
    lines = []
    for path in list_steps(chosen.parent):
        if path == chosen or step_of(path) < step:
            continue
        try:
            verify_checkpoint(path)
            kind = "abandoned"
        except CheckpointError:
            kind = "damaged"
        aside = _free_name(path.with_name(f"{kind}_step_{step_of(path):08d}"))
        move(path, aside)
        lines.append(f"{path} is kept as {aside.name}")
    named = chosen.with_name(f"step_{step:08d}")
    if chosen != named:
        move(chosen, named)
    latest, best = named.with_name("latest"), named.with_name("best")
    if pointed_to(latest) != named or _is_copy(latest):
        point_to(latest, named)
    if not pointed_to(best).exists():
        best.unlink(missing_ok=True)
    return named, lines
