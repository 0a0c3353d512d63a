"""Copies of the checkpoints of a run in another place (`checkpoint.mirror`): an object store, or a folder.

    MIRROR/<name of the experiment>/<name of the run folder>/run.json
                                                             step_00001000/{model.safetensors, ...}

run.json names the run, the process that writes here, and the checkpoints `latest` and `best`. MANIFEST.json
is copied last, so a half copy is never taken for whole. Only rank 0 uses a mirror, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.errors import CheckpointError, DisttrainError, StoppedError, StorageError, UsageError
from disttrain.files import move, storage_error, write_atomically
from disttrain.runs.manifest import (
    MANIFEST,
    list_steps,
    point_to,
    pointed_to,
    read_manifest,
    step_of,
    verify_checkpoint,
)
from disttrain.runs.runfolder import RunFolder, utc_now
from disttrain.shards.stores import failure, open_place

_RUN = "run.json"
_TIMEOUT_S = 20.0  # to connect, and for each read
_AGAIN_S = 30.0  # after a failure
_SOON_S = 1.0  # not worth a line


class _UnreachableError(Exception):
    """The mirror does not answer, or refuses; it may do better later."""


class _TakenError(Exception):
    """Another run, or another process of this one, uses the mirror."""


class Mirror:
    """The mirror of one run.

    Args:
        address: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or the path of a folder.
        name: of the experiment.
        folder: the run folder; its lock is held.
        keep: checkpoints to keep besides the best one.

    Raises:
        UsageError: the address is wrong, or its package is not installed.
    """

    def __init__(self, address: str, name: str, folder: RunFolder, keep: int) -> None:
        self._system, root = open_place(address, _TIMEOUT_S)
        place = f"{name}/{folder.path.resolve().name}"
        self._root, self._shown = f"{root}/{place}", f"checkpoint.mirror: {address.rstrip('/')}/{place}"
        self._address = address
        self._folder = folder
        self._keep = keep
        self._id_file = folder.path / ".mirror"
        self._id = self._id_file.read_text().strip() if self._id_file.exists() else ""
        self._writer = ""  # of this process, once the mirror is its own
        self._failing = False
        self._say: Callable[[str], None] = print
        self._changed = threading.Condition()
        self._due = self._ending = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def begin(self, *, resume: bool) -> list[str]:
        """Connects this run with its mirror, and fetches its checkpoints if the run folder has none.

        Args:
            resume: whether this process continues a run that it finds.

        Returns:
            Lines for the user.

        Raises:
            UsageError: another run is mirrored at this place.
            StorageError, CheckpointError: it cannot fetch them.
        """
        notes: list[str] = []
        new = uuid.uuid4().hex
        try:
            known = self._known()
            if known is not None and resume and not list_steps(self._folder.checkpoints):
                self._id = self._id or known["id"]  # a fresh node: the mirror is all that is left of the run
                self._check(known)
                notes = self._fetch(known.get("best"))
            self._id = self._id or new
            self._claim(known)
        except _TakenError as taken:
            raise UsageError(f"{taken}; choose another --run-dir or checkpoint.mirror") from None
        except OSError as error:
            raise storage_error(self._folder.checkpoints, error) from None
        except _UnreachableError as gone:
            self._failing = True
            notes = [f"{gone}; the run begins without it"]
        self._id = self._id or new
        write_atomically(self._id_file, self._id)
        return notes

    @contextlib.contextmanager
    def copying(self, say: Callable[[str], None], limit_s: float) -> Iterator[None]:
        """Copies in the background, and waits at the end until the last checkpoint is copied.

        Args:
            say: called in that thread when copying begins to fail, and when it works again.
            limit_s: longest time to wait. After a failure of the run, there is no wait.
        """
        self._say = say
        self._thread.start()
        try:
            yield
        except StoppedError:
            self._close(limit_s)
            raise
        self._close(limit_s)

    def wake(self) -> None:
        """Tells that there is another checkpoint."""
        with self._changed:
            self._due = True
            self._changed.notify()

    def _close(self, limit_s: float) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(_SOON_S)
        if self._thread.is_alive():
            self._say(f"{self._shown}: copying the last checkpoint, for at most {limit_s:g} s")
            self._thread.join(limit_s)
        if self._thread.is_alive() or self._failing:
            self._say(f"{self._shown}: not complete; the run folder has every checkpoint")

    def _run(self) -> None:
        ending = False
        while not ending:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._ending, _AGAIN_S if self._failing else None)
                due, self._due, ending = self._due or self._failing, False, self._ending
            if not due:
                continue
            try:
                self._copy()
            except _TakenError as taken:
                self._say(f"{taken}; this process copies nothing more")
                return
            except (_UnreachableError, CheckpointError, OSError) as gone:
                if not self._failing:
                    self._say(f"{gone}; training goes on, and copying is tried again")
                self._failing = True
            else:
                if self._failing:
                    self._say(f"{self._shown}: works again")
                self._failing = False

    def _copy(self) -> None:
        """Makes the mirror equal to the run folder."""
        self._claim(self._known())
        folder = self._folder.checkpoints
        linked = {name: pointed_to(folder / name).name for name in ("latest", "best")}
        steps = [path for path in list_steps(folder) if path.name.startswith("step_")]
        wanted = [path for at, path in enumerate(steps) if at < self._keep or path.name in linked.values()]
        if not wanted:
            return
        for path in wanted:
            try:
                self._upload(path)
            except (CheckpointError, FileNotFoundError):  # deleted meanwhile, because there are newer ones
                if path == wanted[0]:
                    what = f"too slow: {path.name} was deleted before its copy was complete; a larger"
                    raise _UnreachableError(f"{self._shown}: {what} checkpoint.keep helps") from None
        self._write_run(linked)
        for name in self._steps():
            if name not in {path.name for path in wanted}:
                with self._reaching():
                    self._system.rm(f"{self._root}/{name}", recursive=True)

    def _upload(self, path: Path) -> None:
        """Copies a checkpoint, its manifest last."""
        parts = read_manifest(path)
        manifest, place = (path / MANIFEST).read_bytes(), f"{self._root}/{path.name}"
        copied = self._read(f"{path.name}/{MANIFEST}")
        if copied == manifest:
            return
        with self._reaching():
            if copied is not None:  # of other parts
                self._system.rm_file(f"{place}/{MANIFEST}")
            for name in parts:
                if not (path / name).exists():
                    raise CheckpointError(f"{path / name}: was deleted")
                self._system.put_file(str(path / name), f"{place}/{name}")
            self._system.pipe_file(f"{place}/{MANIFEST}", manifest)

    def _fetch(self, best: str | None) -> list[str]:
        """Copies the newest complete checkpoint and the best one into the run folder; returns notes.

        Raises:
            StorageError, CheckpointError: there are checkpoints, but none can be fetched.
        """
        folder, notes, newest = self._folder.checkpoints, [], None
        names = sorted(self._steps(), key=lambda name: step_of(Path(name)), reverse=True)
        try:
            for name in names:
                if newest is not None and name != best:
                    continue
                try:
                    self._download(name)
                except CheckpointError as damage:
                    notes.append(f"{self._shown}: {name} is not whole: {damage}")
                    continue
                notes.append(f"{self._shown}: fetched {name}")
                newest = newest or name
                for link in ("latest",) * (name == newest) + ("best",) * (name == best):
                    point_to(folder / link, folder / name)
        except _UnreachableError as gone:  # a run from scratch would replace them
            raise StorageError(f"{gone}; start again when it answers, or choose another --run-dir") from None
        if names and newest is None:
            what = "no checkpoint is whole; choose another --run-dir"
            raise CheckpointError("\n".join([*notes, f"{self._shown}: {what}"]))
        return notes

    def _download(self, name: str) -> None:
        partial = self._folder.checkpoints / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            manifest = self._read(f"{name}/{MANIFEST}")
            if manifest is None:
                raise CheckpointError("it has no manifest")
            (partial / MANIFEST).write_bytes(manifest)
            for part in read_manifest(partial):
                with self._reaching(), contextlib.suppress(FileNotFoundError):  # verified below
                    self._system.get_file(f"{self._root}/{name}/{part}", str(partial / part))
            verify_checkpoint(partial)
            move(partial, self._folder.checkpoints / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check(self, known: dict[str, Any] | None) -> None:
        """Raises _TakenError if `known`, the content of run.json, is of another run or process."""
        if known is not None and known["id"] != self._id:
            raise _TakenError(f"{self._shown}: has the checkpoints of another run, {known['run_dir']}")
        if known is not None and self._writer not in {"", known["writer"]}:
            raise _TakenError(f"{self._shown}: is now written by {known['run_dir']} on {known['host']}")

    def _claim(self, known: dict[str, Any] | None) -> None:
        """Makes this process the one that writes to the mirror, if no other has become that."""
        self._check(known)
        if not self._writer:
            self._writer = uuid.uuid4().hex
            self._write_run({name: (known or {}).get(name) for name in ("latest", "best")})

    def _write_run(self, linked: Mapping[str, str | None]) -> None:
        place = {"run_dir": str(self._folder.path.resolve()), "host": socket.gethostname(), "time": utc_now()}
        document = {"id": self._id, "writer": self._writer, **linked, **place}
        with self._reaching():
            self._system.pipe_file(f"{self._root}/{_RUN}", json.dumps(document, indent=1).encode())

    def _known(self) -> dict[str, Any] | None:
        data = self._read(_RUN)
        if data is None:
            return None
        try:
            known: dict[str, Any] = json.loads(data)
            return known | {key: known[key] for key in ("id", "writer", "run_dir", "host")}
        except (ValueError, KeyError, TypeError):
            raise _TakenError(f"{self._shown}/{_RUN}: is not ours") from None

    def _steps(self) -> list[str]:
        """Returns the names of the checkpoints in the mirror, complete or not."""
        with self._reaching():
            self._system.invalidate_cache()
            names = [Path(path).name for path in self._system.ls(self._root, detail=False)]
        return [name for name in names if step_of(Path(name)) >= 0]

    def _read(self, name: str) -> bytes | None:
        """Returns the content of a file, or None if there is none."""
        with self._reaching():
            try:
                content: bytes = self._system.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return content

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns the errors of the store into one."""
        try:
            yield
        except (_UnreachableError, DisttrainError):
            raise
        except Exception as error:  # each library has errors of its own
            raise _UnreachableError(f"{self._shown}: {failure(self._address, error)}") from None
