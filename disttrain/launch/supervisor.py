"""Supervises the processes of all nodes and decides on one outcome."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from disttrain.errors import HangError, StoppedError, TrainingError, error_of
from disttrain.launch.liveness import Liveness, Row, describe_hang, stalled
from disttrain.launch.plan import LaunchPlan
from disttrain.launch.rendezvous import Channel
from disttrain.runs.runfolder import RunFolder

_POLL_S = 0.2
_CAUSE_S = 1.0  # to wait for the cause of an error that may be only a consequence
_REPORT_S = 1.0  # interval at which a node reports on its ranks
_NODE_0_S = 10.0  # the other nodes wait this much longer than node 0 before they judge a hang
_ALL_DONE_S = 60.0  # to wait for the other nodes when the ranks of this one have succeeded
_DETAIL = 2**16  # characters of a traceback that are sent to other nodes
# The errors of collectives whose peer is gone, from torch, gloo and NCCL.
_COLLECTIVE_ERROR = re.compile(
    r"gloo|NCCL|TCPStore|^Dist\w*Error|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE
)
_SUCCESS = {0, StoppedError.exit_code}
_ENDED_BY_TORCHRUN = {-signal.SIGTERM, 128 + signal.SIGTERM}


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        exit_code: for the shell.
        message: one line for the user; empty if the run has already printed it.
        detail: a traceback or the last lines of a log; may be empty.
        status: changes to status.json; empty if the run has already written them.
        victim: whether it may be only the consequence of a failure that is not known yet.
        signal: the first one that asked the run to stop, if any.
    """

    exit_code: int
    message: str = ""
    detail: str = ""
    status: dict[str, Any] = field(default_factory=dict, compare=False)
    victim: bool = field(default=False, compare=False)
    signal: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, code: int, reason: str, message: str = "", detail: str = "", **status: Any) -> Outcome:
        """Returns an outcome that the run has not recorded itself; its state is failed unless given."""
        return cls(code, message or reason, detail, {"state": "failed", "reason": reason, **status})


class Supervisor:
    """Supervises the processes of this node, and through the channel those of the other nodes."""

    def __init__(
        self,
        plan: LaunchPlan,
        folder: RunFolder,
        signals: list[int],
        liveness: Liveness,
        child: subprocess.Popen[bytes],
        channel: Channel,
        log_begin: int,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._signals = signals
        self._liveness = liveness
        self._child = child
        self._channel = channel
        self._log_begin = log_begin
        self._host = socket.gethostname()
        self.stopping: Literal["stop", "regroup"] | None = None
        """Why the ranks were asked to stop: by a signal on any node, or to go on with more nodes."""
        self._asked: set[str] = set()  # what another node asked for; does not count as a signal here
        self._remote_rows: dict[int, list[Row]] = {}
        self._done: dict[int, int] = {}  # exit codes of the nodes that have succeeded
        self._final: Outcome | None = None

    def follow(self) -> Outcome:
        """Waits for the outcome of the run; the caller can kill the processes that are left."""
        suspect, until, reported = None, 0.0, 0.0
        while True:
            self._liveness.wait(_POLL_S, self._channel.sockets)
            now = time.monotonic()
            found = self._second_signal() or self._listen() or self._stop() or self._local() or self._hang()
            if self._final is not None:
                return self._final
            if found is not None and found.victim and (suspect is None or now < until):
                if suspect is None:
                    suspect, until = found, now + _CAUSE_S
                found = None
            if found is None and suspect is not None and now >= until:
                found = suspect
            if found is not None:
                return self._agree(found)
            if self._plan.node_rank and now - reported > _REPORT_S:
                self._channel.send({"rows": self._liveness.rows()})
                reported = now

    def _second_signal(self) -> Outcome | None:
        if len(self._signals) < 2:
            return None
        number = self._signals[-1]
        reason = f"ended by {signal.Signals(number).name}"
        return Outcome.of(128 + number, reason, f"{reason}; the last checkpoint is intact", state="stopped")

    def _stop(self) -> Outcome | None:
        """Forwards a request to stop. Before training has begun, there is nothing to save."""
        before, why = self.stopping, self.stopping
        if self._signals or "stop" in self._asked:
            why = "stop"
        elif "regroup" in self._asked or (self._liveness.started and self._channel.has_newcomers()):
            why = "regroup"
        if why is None or why == before:
            return None
        self.stopping = why
        self._channel.send({why: True})
        if before is not None:
            return None
        if self._plan.node_rank == 0 and not self._liveness.started and not self._liveness.ends:
            reason = "stopped before training began; nothing is lost, run the same command again"
            return Outcome.of(StoppedError.exit_code, reason, state="stopped")
        self._liveness.stop()
        return None

    def _listen(self) -> Outcome | None:
        """Processes the messages of the other nodes."""
        found = None
        for node, message in self._channel.receive():
            match message:
                case {"rows": rows}:
                    self._remote_rows[node] = [Row(*row) for row in rows]
                case {"stop": True} | {"regroup": True}:
                    self._asked |= set(message)
                case {"done": code}:
                    self._done[node] = code
                    self._remote_rows[node] = []
                case {"outcome": outcome}:
                    found = _likelier_cause(found, Outcome(**outcome))
                case {"final": outcome}:
                    self._final = Outcome(**outcome)
                case {"stacks": rank}:
                    self._channel.send({"answer": self._liveness.stacks(rank, self._folder.log(rank))}, node)
        for node in sorted(self._channel.lost - set(self._done)):
            host = self._channel.hosts[node]
            gone = Outcome.of(TrainingError.exit_code, f"node {node} ({host}) is gone", host=host)
            found = _likelier_cause(found, gone)
        return found

    def _local(self) -> Outcome | None:
        """Judges how the ranks of this node, and the process that started them, have ended."""
        code = self._child.poll()
        if code is not None and self._plan.world_size == 1:
            self._liveness.note_ends({0: code})
        elif code is not None and not self._liveness.all_ended:
            if code < 0 and not self._liveness.ends:
                return self._end(code)  # its ranks die with it
            self._liveness.wait(0.1)  # their last messages may arrive a moment later
        said = set(self._liveness.said.values())
        saved = self.stopping and StoppedError.exit_code in said
        for end in self._liveness.ends:
            died = end.said is None and end.status not in _ENDED_BY_TORCHRUN
            if died and not saved:  # ranks that torchrun terminated are not the cause
                return self._failure(end.rank, f"{_cause(end.status)} {end.doing}")
        if said - _SUCCESS and not saved:
            error = self._folder.first_error(self._plan.ranks)
            if error is not None:
                return _from_error(error)
        return self._end(code) if self._liveness.all_ended or code is not None else None

    def _end(self, code: int | None) -> Outcome:
        """Judges the end of all ranks of this node, if none was seen to die.

        `code` is the exit code of the process that started them, or None while it runs.
        """
        said = set(self._liveness.said.values())
        if self._plan.node_rank and said and said <= _SUCCESS:  # only node 0 writes status.json
            return Outcome(max(said))
        if (error := self._folder.first_error(self._plan.ranks)) is not None:
            return _from_error(error)
        status = self._folder.status()
        if status.get("state") in {"finished", "stopped"} and self._plan.node_rank == 0:
            return Outcome(int(status["exit_code"]))
        if not self._liveness.ends:
            return self._failure(None, _cause(code))
        end = min(self._liveness.ends, key=lambda end: end.said is not None)
        failure = self._failure(end.rank, _cause(end.status if end.said is None else end.said))
        if end.said is None or end.said in _SUCCESS:
            return failure
        # Its error file could not be written.
        return replace(failure, exit_code=type(error_of(end.said, "")).exit_code)

    def _failure(self, rank: int | None, cause: str) -> Outcome:
        who = "a process" if rank is None else f"rank {rank}"
        log = self._folder.launch_log(self._plan.node_rank)
        last_words = _read_tail(log, self._log_begin, 15)
        if rank and not last_words.strip():  # ranks other than 0 print to their own log once they have begun
            log = self._folder.log(rank)
            last_words = _read_tail(log, 0, 15)
        return Outcome.of(
            TrainingError.exit_code,
            f"{who} {cause}",
            f"{who} on {self._host} {cause}; see {log}",
            last_words,
            rank=rank,
            host=self._host,
        )

    def _hang(self) -> Outcome | None:
        """Finds ranks without progress: node 0 judges all nodes, the others judge only if node 0 does not."""
        plan = self._plan
        rows = [*self._liveness.rows(), *(row for rows in self._remote_rows.values() for row in rows)]
        timeout_s = plan.stall_timeout_s + (_NODE_0_S if plan.node_rank else 0)
        culprits = stalled(rows, timeout_s, cpu_tells=plan.device == "cpu")
        if not culprits:
            return None
        reason = describe_hang(culprits, rows)
        stacks = []
        for row in culprits[:4]:
            node = row.rank // plan.processes
            if node == plan.node_rank:
                stacks.append(self._liveness.stacks(row.rank, self._folder.log(row.rank)))
            else:
                stacks.append(self._channel.ask(node, "stacks", row.rank, timeout_s=2) or "")
        first, code = culprits[0], HangError.exit_code
        return Outcome.of(code, reason, detail="\n".join(stacks), rank=first.rank, host=first.host)

    def _agree(self, found: Outcome) -> Outcome:
        """Agrees on one outcome with the other nodes; node 0 decides."""
        channel = self._channel
        if self._plan.nodes == 1:
            return found
        succeeded = found.exit_code in _SUCCESS and not found.status
        message = {"done": found.exit_code} if succeeded else {"outcome": asdict(found)}
        wait_s = _ALL_DONE_S if succeeded else _CAUSE_S + 1
        deadline = time.monotonic() + wait_s
        if self._plan.node_rank:
            channel.send(message)
            while self._final is None and 0 not in channel.lost and time.monotonic() < deadline:
                self._liveness.wait(_POLL_S, channel.sockets)
                found = self._second_signal() or found
                self._listen()
            return self._final or found
        while succeeded and len(self._done) < self._plan.nodes - 1 and time.monotonic() < deadline:
            self._liveness.wait(_POLL_S, channel.sockets)
            bad = self._second_signal() or self._listen()
            if bad is not None:
                found, succeeded = bad, False
        channel.send({"final": asdict(found)})
        return found


def _likelier_cause(one: Outcome | None, other: Outcome) -> Outcome:
    """Returns the outcome that more likely caused the other."""
    return other if one is None or (one.victim and not other.victim) else one


def _from_error(error: Mapping[str, Any]) -> Outcome:
    """Returns the outcome for an error that a rank has recorded."""
    code, reason = int(error["exit_code"]), str(error["message"])
    place = {"rank": error["rank"], "host": error["host"]}
    if error["traceback"] is None:
        return replace(Outcome.of(code, reason, **place), victim=error["type"] == "HangError")
    reason = f"{error['type']}: {reason}"
    message = f"rank {error['rank']} on {error['host']} failed: {reason}"
    outcome = Outcome.of(code, reason, message, str(error["traceback"])[-_DETAIL:], **place)
    return replace(outcome, victim=_COLLECTIVE_ERROR.search(reason) is not None)


def _cause(status: int | None) -> str:
    if status is None:
        return "died without a report"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    if status == 0:
        return "exited early with exit code 0 and left no report"
    return f"ended with exit code {status} and left no report"


def _read_tail(path: Path, begin: int, lines: int) -> str:
    """Returns the last lines of a file, starting at the byte `begin` at the earliest."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
