"""The launcher's side of supervision: what the ranks of this node do, which have ended, which hang.

Every rank connects to the launcher's socket (see `heartbeat.py`). When a process ends, its connection closes,
so the launcher sees a death at once. A rank that exits normally announces its exit code first. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import NamedTuple

from disttrain.heartbeat import ADDRESS, ROW_BYTES, STACKS, STOP, Phase, doing, unpack

_LOOK_S = 0.25  # interval of reading the progress and /proc
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_FRAMES = 15  # shown of a stack, the latest call first
_EXIT_S = 1.0  # for a process to exit after its connection has closed
_PF_EXITING = 4  # linux/sched.h
_BUSY = 0.5  # cores: a process in an endless loop uses one core, a waiting process almost none
_ALIVE, _ALIVE_S = 0.01, 0.05  # a starting process uses more than these cores and CPU seconds


class Row(NamedTuple):
    """The state of a rank that has not ended.

    Attributes:
        rank: its number.
        host: its host name.
        progress: from `heartbeat.pack`; -1 before it has connected.
        still_s: seconds since its last progress; while it starts, CPU use counts as progress.
        stopped_s: seconds since it was first seen stopped by a signal; 0 if it is not.
        cpu_s: CPU time since its last progress.
    """

    rank: int
    host: str
    progress: int
    still_s: float
    stopped_s: float
    cpu_s: float

    @property
    def phase(self) -> Phase:
        """What it is doing."""
        return unpack(max(self.progress, 0))[0]


class End(NamedTuple):
    """How a rank ended.

    Attributes:
        rank: its number.
        said: the exit code that it announced, or None.
        status: its actual exit code, negative for a signal, or None if unknown.
        doing: what it was doing, in words.
    """

    rank: int
    said: int | None
    status: int | None
    doing: str


def stalled(rows: Sequence[Row], timeout_s: float, *, cpu_tells: bool) -> list[Row]:
    """Returns the ranks that hang, without those that only wait for them; empty if none hangs.

    Sooner or later, all ranks wait for the one that is furthest behind, so only that one is judged. Startup
    is long and has few beats, so a rank hangs there only if no rank shows any progress.

    Args:
        rows: of all ranks.
        timeout_s: how long a rank may make no progress.
        cpu_tells: whether waiting ranks use no CPU, as with gloo. If several ranks are equally far behind,
            the busy one then is the one that hangs.
    """
    stopped = [row for row in rows if row.stopped_s >= timeout_s]
    if stopped or not rows:
        return stopped
    lowest = min(row.progress for row in rows)
    last = [row for row in rows if row.progress == lowest]
    judged = rows if last[0].phase is Phase.START else last
    if any(row.still_s < timeout_s for row in judged):
        return []
    stopped = [row for row in rows if row.stopped_s > 0]
    busy = [row for row in last if cpu_tells and row.cpu_s > _BUSY * row.still_s]
    return stopped or busy or last


def describe_hang(culprits: Sequence[Row], rows: Sequence[Row]) -> str:
    """Returns a sentence on the ranks that hang and on those that wait for them."""
    where = dict.fromkeys(row.host for row in culprits)
    names = " and ".join(
        f"{_ranks(row.rank for row in culprits if row.host == host)} on {host}" for host in where
    )
    first = min(culprits, key=lambda row: row.progress)
    still_s = min(max(row.still_s, row.stopped_s) for row in culprits)
    several = len(culprits) > 1
    text = f"{names} hang{'' if several else 's'}: no progress for {still_s:.0f} s {doing(first.progress)}"
    if any(row.stopped_s > 0 for row in culprits):
        text += " (the processes are stopped)" if several else " (the process is stopped)"
    waiting = [row.rank for row in rows if row not in culprits]
    if waiting:
        text += f"; {_ranks(waiting)} wait{'s' * (len(waiting) == 1)} for {'them' if several else 'it'}"
    return text


def _ranks(numbers: Iterable[int]) -> str:
    words = [str(number) for number in sorted(numbers)]
    if len(words) == 1:
        return f"rank {words[0]}"
    if len(words) > 8:
        words[4:-1] = ["..."]
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"


@dataclass
class _Local:
    """A rank of this node."""

    rank: int
    pid: int | None = None
    connection: socket.socket | None = None
    said: int | None = None
    ended: bool = False
    progress: int = -1
    since: float = 0.0  # clock of `Liveness` at its last progress
    stopped_since: float | None = None
    cpu_at: float = 0.0  # its CPU time at its last progress
    status: int | None = None  # its exit code, as reported by the process that started it


class Liveness:
    """Watches the ranks of this node: `count` ranks from `first` on."""

    def __init__(self, first: int, count: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"disttrain-{secrets.token_hex(16)}"
        self._listener.bind(f"\0{name}")  # an abstract socket leaves no file behind
        self._listener.listen(count + 1)  # the ranks, and the process that starts them
        self.environment = {ADDRESS: f"@{name}"}
        self._memory = os.memfd_create("disttrain-heartbeat")
        os.ftruncate(self._memory, count * ROW_BYTES)
        self._first = first
        self._host = socket.gethostname()
        self._locals = [_Local(first + i) for i in range(count)]
        self._stopping = False
        self._clock, self._looked = 0.0, time.monotonic()
        self.ends: list[End] = []
        """The ranks that have ended, in the order of their ends."""

    def __enter__(self) -> Liveness:
        return self

    def __exit__(self, *_: object) -> None:
        for local in self._locals:
            if local.connection is not None:
                local.connection.close()
        self._listener.close()
        os.close(self._memory)

    @property
    def started(self) -> bool:
        """Whether any rank has begun to train."""
        return any(unpack(max(local.progress, 0))[0] is not Phase.START for local in self._look())

    @property
    def all_ended(self) -> bool:
        """Whether all ranks have ended."""
        return all(local.ended for local in self._locals)

    @property
    def said(self) -> dict[int, int]:
        """The exit codes that ranks have announced."""
        return {local.rank: local.said for local in self._locals if local.said is not None}

    def rows(self) -> list[Row]:
        """Returns the state of each rank that has not ended."""
        return [
            Row(
                local.rank,
                self._host,
                local.progress,
                self._clock - local.since,
                0.0 if local.stopped_since is None else max(self._clock - local.stopped_since, 1e-9),
                0.0 if (state := _process(local.pid)) is None else state.cpu_s - local.cpu_at,
            )
            for local in self._look()
            if not local.ended
        ]

    def saving(self, rank: int) -> bool:
        """Returns whether a rank of this node is alive and writing a checkpoint."""
        local = self._locals[rank - self._first]
        return not local.ended and local.stopped_since is None and self._cells(local)[1] != 0

    def stop(self) -> None:
        """Asks all ranks to stop, including those that connect later."""
        self._stopping = True
        for local in self._locals:
            if local.connection is not None and not local.ended:
                with contextlib.suppress(OSError):
                    local.connection.send(STOP)

    def begin(self, starter: int) -> None:
        """Watches the process that starts the ranks (or is the only rank) in place of unconnected ranks."""
        for local in self._locals:
            local.pid = starter

    def wait(self, timeout_s: float, also: Sequence[socket.socket] = ()) -> None:
        """Waits until a rank connects, sends a message or ends, and processes that.

        Returns at the latest after `timeout_s`, or when one of the sockets in `also` is readable.
        """
        open_ = {local.connection: local for local in self._locals if local.connection and not local.ended}
        for ready in wait_for_any([self._listener, *open_, *also], timeout_s):
            if ready is self._listener:
                self._accept()
            elif ready in open_ and not open_[ready].ended:
                self._hear(open_[ready])
        if time.monotonic() - self._looked > _LOOK_S:
            self._inspect()

    def note_ends(self, codes: Mapping[int, int]) -> None:
        """Records exit codes of ranks, negative for a signal, reported by the process that started them."""
        for rank, code in codes.items():
            local = self._locals[rank - self._first]
            local.status = code
            self._hear_last(local)

    def stacks(self, rank: int, log: Path, timeout_s: float = 1.0) -> str:
        """Asks a rank of this node to write its stacks to its log, and returns that of the main thread."""
        local = self._locals[rank - self._first]
        state = _process(local.pid)
        if local.connection is None or local.pid is None or state is None:
            return f"rank {rank} has not connected yet"
        if state.letter in "Tt":
            return f"rank {rank}, process {local.pid}, is stopped (SIGSTOP or a debugger): no stack"
        begin = log.stat().st_size if log.exists() else 0
        with contextlib.suppress(OSError):
            os.kill(local.pid, STACKS)
        text, deadline = "", time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            time.sleep(0.05)
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(begin)
                before, text = text, file.read().decode(errors="replace")
                if text and text == before:
                    break
        main = text[max(text.rfind("\nThread "), text.rfind("\nCurrent thread "), 0) :].strip().splitlines()
        return "\n".join([f"rank {rank}:", *main[:_FRAMES]]) if main else f"rank {rank} wrote no stack"

    def _cells(self, local: _Local) -> tuple[int, int]:
        row = os.pread(self._memory, 16, (local.rank - self._first) * ROW_BYTES)
        progress, saving = struct.unpack("qq", row)
        return progress, saving

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        if uid not in {os.getuid(), 0}:  # any user of this node can connect to an abstract socket
            connection.close()
            return
        connection.settimeout(5)
        message = None
        with contextlib.suppress(OSError, ValueError):
            message = json.loads(connection.recv(4096))
        by_rank = {local.rank: local for local in self._locals}
        match message:
            case {"rank": int(rank)} if rank in by_rank and by_rank[rank].connection is None:
                self._admit(by_rank[rank], connection, pid)
                return
            case {"ended": list(ended)}:
                self.note_ends(dict(ended))
        connection.close()

    def _admit(self, local: _Local, connection: socket.socket, pid: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended already; the next read shows that
            socket.send_fds(connection, [b"%d" % (local.rank - self._first)], [self._memory])
            if self._stopping:
                connection.send(STOP)
        local.connection, local.pid = connection, pid
        local.progress, local.since, local.cpu_at = 0, self._clock, 0.0

    def _hear(self, local: _Local) -> None:
        assert local.connection is not None
        try:
            message = local.connection.recv(4096)
        except OSError:
            message = b""
        if message:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                local.said = int(json.loads(message)["exit_code"])
        else:
            self._note_end(local)

    def _note_end(self, local: _Local) -> None:
        # The kernel sets the exit code of a process before it closes its files, but Python may close the
        # connection shortly before the process exits.
        deadline = time.monotonic() + _EXIT_S
        pid = local.pid if local.connection is not None else None
        while (state := _process(pid)) and not state.exiting and time.monotonic() < deadline:
            time.sleep(0.005)
        while state is None and pid is not None and local.status is None and local.said is None:
            # Its parent has reaped it, and will report the exit code.
            if not wait_for_any([self._listener], max(0.0, deadline - time.monotonic())):
                break
            self._accept()
        if local.ended:  # with the report
            return
        local.progress = self._cells(local)[0]
        local.ended = True
        status = local.status if state is None else -(state.status & 127) or state.status >> 8
        self.ends.append(End(local.rank, local.said, status, doing(local.progress)))

    def _look(self) -> list[_Local]:
        """Reads the progress of the ranks."""
        for local in self._locals:
            if local.connection is not None and not local.ended:
                progress = self._cells(local)[0]
                if progress != local.progress:
                    local.progress, local.since = progress, self._clock
                    state = _process(local.pid)
                    local.cpu_at = state.cpu_s if state else 0.0
        return self._locals

    def _inspect(self) -> None:
        now = time.monotonic()
        # Time in which this process did not run, because the whole job was suspended, does not count.
        self._clock += min(now - self._looked, 4 * _LOOK_S)
        self._looked = now
        for local in self._look():
            if local.ended:
                continue
            state = _process(local.pid)
            if state is None or state.letter in "ZX":
                if local.connection is not None:  # a child process of the rank may keep it open
                    self._hear_last(local)
                continue
            if state.letter not in "Tt":
                local.stopped_since = None
            elif local.stopped_since is None:
                local.stopped_since = self._clock
            starting = unpack(max(local.progress, 0))[0] is Phase.START
            if starting and state.cpu_s - local.cpu_at > max(_ALIVE_S, _ALIVE * (self._clock - local.since)):
                local.since, local.cpu_at = self._clock, state.cpu_s

    def _hear_last(self, local: _Local) -> None:
        while not local.ended:
            if local.connection is not None and wait_for_any([local.connection], 0):
                self._hear(local)
            else:
                self._note_end(local)


class _State(NamedTuple):
    letter: str
    cpu_s: float
    status: int  # as from waitpid; 0 while it runs
    exiting: bool


def _process(pid: int | None) -> _State | None:
    """Returns the state of a process from /proc, or None if it is gone."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return _State(fields[0], cpu_s, int(fields[49]), bool(int(fields[6]) & _PF_EXITING))
