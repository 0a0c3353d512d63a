"""One training process: its log, its stop requests, and how it reports the error that ended it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
import traceback
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from disttrain.errors import DisttrainError, StoppedError, StorageError
from disttrain.heartbeat import STACKS, STOP, Heartbeat, Phase
from disttrain.lifetime import stop_signals
from disttrain.runs.runfolder import RunFolder, utc_now

log = logging.getLogger("disttrain")


_SECOND_S = 1.0  # Ctrl-C in a terminal reaches a rank of torchrun twice: from the terminal and from torchrun


class Rank:
    """This process: its rank, its run folder once that is known, its log and its heartbeat.

    Args:
        number: rank among all processes.
        run_dir: the run folder, if one was given.

    Attributes:
        folder: the run folder, once it is known.
        stop: whether this rank was asked to stop.
        heartbeat: tells the launcher that this rank is alive.
    """

    def __init__(self, number: int, run_dir: Path | None) -> None:
        self.number = number
        self.run_dir = run_dir
        self.folder: RunFolder | None = None
        self.stop = False
        self._began = utc_now()
        self._terminal = os.dup(2)
        if run_dir is not None and (folder := RunFolder(run_dir)).locked_by_launcher():
            self.enter(folder)
        self.heartbeat = Heartbeat.connect(os.environ, number)

    def enter(self, folder: RunFolder) -> None:
        """Starts to log into the folder. All ranks except 0 also redirect stdout and stderr there."""
        self.folder = folder
        path = folder.log(self.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
        form = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
        formatter = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.info("rank %d, process %d on %s", self.number, os.getpid(), socket.gethostname())
        self._stacks = path.open("a")
        faulthandler.register(STACKS, self._stacks)
        if self.number:
            with path.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)

    def listen(self) -> None:
        """Treats SIGTERM, SIGINT, SIGUSR2, SIGHUP and the launcher's message as stop requests.

        A thread receives them, so that they work while the main thread waits for other ranks. It kills this
        process if the launcher dies.
        """
        here, there = socket.socketpair()
        there.setblocking(False)
        self._stops = stop_signals()
        for number in self._stops:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        hear = self._hear_signals if self.heartbeat.connection is None else self._hear_launcher
        threading.Thread(target=hear, args=(here, there), daemon=True).start()

    def _hear_signals(self, here: socket.socket, _there: socket.socket) -> None:
        asked_at = None
        while True:
            for number in self._stops & set(here.recv(64)):
                if asked_at is None and self.heartbeat.place[0] is Phase.START:
                    stop = StoppedError(
                        "stopped before training began; nothing is lost, run the same command again"
                    )
                    self.write_status(state="stopped", exit_code=stop.exit_code, reason=str(stop))
                    if self.number == 0:
                        self._print(f"disttrain: {stop}")
                    os._exit(stop.exit_code)
                now = time.monotonic()
                asked_at = now if asked_at is None else asked_at
                if now - asked_at > _SECOND_S and number != signal.SIGHUP:
                    os._exit(128 + number)
                self.stop = True

    def _hear_launcher(self, here: socket.socket, _there: socket.socket) -> None:
        launcher = self.heartbeat.connection
        assert launcher is not None
        while True:
            for ready in wait_for_any([here, launcher]):
                if ready is launcher:
                    try:
                        word = launcher.recv(64)
                    except OSError:
                        word = b""
                    if word != STOP:
                        os.kill(os.getpid(), signal.SIGKILL)  # the launcher died: nobody would end this rank
                    self.stop = True
                else:
                    stops = self._stops & set(here.recv(64))
                    if signal.SIGTERM in stops and self.heartbeat.place[0] is Phase.START:
                        os._exit(128 + signal.SIGTERM)  # from torchrun: another rank could not start
                    self.stop = self.stop or bool(stops)

    def _print(self, text: str) -> None:
        """Prints a line to the standard error that this process began with, unless that was closed."""
        with contextlib.suppress(OSError):
            os.write(self._terminal, f"{text}\n".encode())

    def write_status(self, **status: Any) -> None:
        """Writes the status of the run to status.json; only rank 0 does."""
        if self.number == 0 and self.folder is not None:
            self.folder.update_status(**status)

    def fail(self, error: BaseException) -> None:
        """Records the error that ended this rank; the first rank to fail prints it and writes status.json."""
        text = str(error) if isinstance(error, DisttrainError) else "".join(traceback.format_exception(error))
        first = self.number == 0
        if self.folder is not None:
            log.error("%s", text)
            with contextlib.suppress(StorageError):  # the terminal and the exit code report the error, too
                self.folder.write_error(self.number, error)
                cause = self.folder.first_error(since=self._began)
                first = cause is not None and cause["rank"] == self.number
                if first and cause is not None:
                    self.folder.update_status(
                        state="failed",
                        exit_code=cause["exit_code"],
                        reason=cause["message"],
                        rank=self.number,
                        host=cause["host"],
                    )
        if first:
            name = f"rank {self.number}: " if self.number else ""
            self._print(f"disttrain: {name}{text.rstrip()}")
