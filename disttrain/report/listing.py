"""The runs below a folder, one row each, read again when their files change.

A run that cannot be read is a row with the reason. Links are not followed, so nothing outside is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

import msgspec

from disttrain import __version__
from disttrain.config import load_config
from disttrain.errors import UsageError, reason
from disttrain.files import stamp
from disttrain.runs.jsonl import parts
from disttrain.runs.records import CURVES, EvalRecord
from disttrain.runs.runfolder import RunFolder
from disttrain.units import ago, duration, number, percent, utc

_FILES = ("config.yaml", "env.json", "status.json", "metrics.jsonl", "gpu.jsonl")
_KEPT_S = 1.0  # several viewers share a listing this old


class _Status(msgspec.Struct):
    """The keys of status.json that a row needs."""

    state: str = "unknown"
    reason: str | None = None
    step: int | None = None
    epoch: int | None = None
    world_size: int | None = None
    started_at: datetime | None = None
    updated_at: datetime | None = None


@dataclass
class Row:
    """A run in the list; None is unknown.

    Attributes:
        path: below the folder, with slashes; "" is the folder itself.
        about: the model and the data set.
        state: that of status.json, or `silent`, `unknown`.
        accuracy: of the last evaluation, 0..1; of multi-label data the mAP.
        best: the highest accuracy or mAP, 0..1.
        multi_label: whether the data set has several labels per sample.
        loss: the training loss at the last log point.
        started_s: UTC, seconds since 1970.
        note: why it ended, or why it cannot be read.
        version: changes whenever its report does.
    """

    path: str
    name: str
    about: str = ""
    state: str = "unknown"
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    accuracy: float | None = None
    best: float | None = None
    multi_label: bool = False
    loss: float | None = None
    started_s: float | None = None
    duration_s: float | None = None
    world_size: int | None = None
    note: str = ""
    version: str = ""


def _epoch(row: Row) -> str:
    whole = "" if row.epoch is None or row.epochs is None else f" of {row.epochs:,d}"
    return number(row.epoch, ",d") + whole


def _score(row: Row, value: float | None) -> tuple[float | None, str]:
    return value, percent(value) + " mAP" * (row.multi_label and value is not None)


COLUMNS: dict[str, Callable[[Row], tuple[Any, str]]] = {
    "state": lambda row: (row.state, row.state),
    "accuracy": lambda row: _score(row, row.accuracy),
    "best accuracy": lambda row: _score(row, row.best),
    "training loss": lambda row: (row.loss, number(row.loss, ".4f")),
    "epoch": lambda row: (row.epoch, _epoch(row)),
    "step": lambda row: (row.step, number(row.step, ",d")),
    "started, UTC": lambda row: (row.started_s, "n/a" if row.started_s is None else utc(row.started_s)[:-7]),
    "duration": lambda row: (row.duration_s, duration(row.duration_s)),
    "ranks": lambda row: (row.world_size, number(row.world_size, ",d")),
}
"""Title of a column -> its value, to sort by, and the text for it."""


class Listing:
    """The runs below a folder, at any depth. Its methods may be called from several threads.

    Args:
        folder: is searched, without hidden folders and without following links.

    Attributes:
        folder: without links in its path.
        closed: set to True to end a search.

    Raises:
        UsageError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give the folder of your runs")
        self.folder = folder.resolve()
        self.closed = False
        self._runs: dict[str, _Run] = {}
        self._rows: list[Row] = []
        self._read_s = -_KEPT_S
        self._lock = Lock()

    def rows(self) -> list[Row]:
        """Returns the rows of all runs, in order of their paths."""
        with self._lock:
            if time.monotonic() - self._read_s >= _KEPT_S:
                found = dict(self._search())
                self._runs = {path: self._runs.get(path) or _Run(self.folder, path) for path in found}
                self._rows = [run.row(found[path]) for path, run in sorted(self._runs.items())]
                self._read_s = time.monotonic()
            return self._rows

    def find(self, path: str) -> Row | None:
        """Returns the row of one run as of now, or None if there is no such run."""
        if path not in self._runs:
            self.rows()
        with self._lock:
            run = self._runs.get(path)
            return None if run is None else run.row()

    def _search(self) -> Iterator[tuple[str, str]]:
        """Yields (path, problem) of each run, and of each folder that cannot be read."""
        below = [""]
        while below and not self.closed:
            path = below.pop()
            try:
                with os.scandir(self.folder / path) as entries:
                    kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError as error:
                yield path, f"cannot be read: {reason(error)}"
                continue
            if kinds.keys() & {"status.json", "metrics.jsonl"} or kinds.keys() >= {"config.yaml", "logs"}:
                yield path, ""
            else:
                folders = (name for name, is_folder in kinds.items() if is_folder and name[0] != ".")
                below += (f"{path}/{name}" if path else name for name in folders)


class _Run:
    """One run, whose files are read again when they change."""

    def __init__(self, root: Path, path: str) -> None:
        self._path = path
        self._folder = RunFolder(root / path)
        self._stamps: dict[Path, list[int] | None] = {}
        self._kept: dict[Path, tuple[Any, str]] = {}
        self._metrics = _Metrics()

    def row(self, problem: str = "") -> Row:
        """Returns the row as of now; `problem` says why the folder cannot be read."""
        row = Row(self._path, self._folder.path.name)
        try:
            row.note = problem or self._fill(row)
        except Exception as error:  # whatever a folder holds, the others are listed
            row.note = f"cannot be read: {reason(error)}"
        return row

    def _fill(self, row: Row) -> str:
        """Sets what the files say, and returns what is wrong with them."""
        folder = self._folder
        if folder.path.resolve() != folder.path:  # replaced by a link since it was found
            return "is a link, which is not followed"
        for name in _FILES:
            file = folder.path / name
            if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                return f"{name} is not a regular file; links are not followed"
        setup, bad_config = self._fresh(folder.config, _setup, "no config.yaml")
        status, bad_status = self._fresh(folder.path / "status.json", _status, "no status.json")
        self._metrics = metrics = _read_on(folder.metrics, self._metrics)
        if setup is not None:
            row.name, row.about, row.epochs = setup
        if status is not None:
            _progress(row, status, folder)
        row.accuracy, row.best, row.loss = metrics.accuracy, metrics.best, metrics.loss
        row.multi_label = metrics.multi_label
        saved = folder.checkpoints.stat().st_mtime_ns if folder.checkpoints.exists() else 0
        seen = (__version__, self._stamps[folder.config], metrics.stamp, row.state, saved)
        row.version = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
        return "; ".join(filter(None, [bad_status, bad_config, row.note]))

    def _fresh(self, file: Path, read: Callable[[Path], Any], missing: str) -> tuple[Any, str]:
        """Returns (content, problem) of a file, which is read only if it has changed."""
        now = stamp(file) if file.exists() else None
        if file not in self._kept or self._stamps[file] != now:
            try:
                self._kept[file] = (None, missing) if now is None else (read(file), "")
            except (UsageError, msgspec.MsgspecError, OSError) as error:
                text = reason(error) if isinstance(error, OSError) else str(error).partition("\n")[0]
                text = text.removeprefix(f"{file.parent}/")
                self._kept[file] = (None, text if text.startswith(file.name) else f"{file.name}: {text}")
            self._stamps[file] = now
        return self._kept[file]


@dataclass
class _Metrics:
    """What a row needs of metrics.jsonl, and how far the file was read.

    Attributes:
        stamp: changes whenever the file does; None without one.
        inode: of the file, which a resumed run may replace.
        end: byte offset of the next line.
    """

    accuracy: float | None = None
    best: float | None = None
    multi_label: bool = False
    loss: float | None = None
    stamp: list[int] | None = None
    inode: int = 0
    end: int = 0


def _read_on(path: Path, seen: _Metrics) -> _Metrics:
    """Reads the lines completed since the last call; all, if the file was replaced."""
    if not path.exists() or (now := stamp(path)) == seen.stamp:
        return seen
    with path.open("rb") as file:  # `parts` passes over a file that cannot be opened
        status = os.fstat(file.fileno())
    if status.st_ino != seen.inode or status.st_size < seen.end:
        seen = _Metrics(inode=status.st_ino)
    for part in parts(path, CURVES, seen.end):
        seen.end = part.end
        for record in part.rows:
            if isinstance(record, EvalRecord):
                seen.multi_label = record.map is not None
                seen.accuracy = record.accuracy if record.map is None else record.map
                seen.best = max(seen.accuracy, seen.best or 0.0)
            else:
                seen.loss = record.loss
    seen.stamp = now
    return seen


def _setup(path: Path) -> tuple[str, str, int]:
    """Returns what a row shows of the config: the name, model and data set, and epochs."""
    config = load_config(path)
    return config.name, f"{config.model.name}, {config.data.name}", config.train.epochs


def _status(path: Path) -> _Status:
    return msgspec.json.decode(path.read_bytes(), type=_Status)


def _progress(row: Row, status: _Status, folder: RunFolder) -> None:
    """Sets what status.json says of a run."""
    row.state, row.step, row.epoch = status.state, status.step, status.epoch
    row.world_size = status.world_size
    begin_s, end_s = _seconds(status.started_at), _seconds(status.updated_at)
    row.started_s = None if math.isnan(begin_s) else begin_s
    row.duration_s = None if math.isnan(end_s - begin_s) else max(0.0, end_s - begin_s)
    silent_s = time.time() - end_s
    if status.state == "running" and folder.has_died(silent_s):
        row.state, row.note = (
            "silent",
            "most likely killed" + f" {ago(silent_s)} ago" * math.isfinite(silent_s),
        )
    elif status.state in ("failed", "stopped") and status.reason:
        row.note = status.reason.strip().partition("\n")[0]


def _seconds(when: datetime | None) -> float:
    return math.nan if when is None else when.timestamp()


def to_json(rows: Iterable[Row]) -> dict[str, Any]:
    """Returns the rows for the page that lists them."""
    return {
        "columns": list(COLUMNS),
        "rows": [
            {
                "path": row.path,
                "link": f"/run/{quote(row.path, errors='surrogateescape')}{'/' * bool(row.path)}report.html",
                "name": row.name,
                "about": row.about,
                "state": row.state,
                "note": row.note,
                "cells": [cell(row) for cell in COLUMNS.values()],
            }
            for row in rows
        ],
    }
