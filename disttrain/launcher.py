"""From a config and flags to running processes, and from their end to one truthful exit code.

The plan is a plain dataclass; turning it into a command and an environment is pure. A single process is
started directly, several through `accelerate launch`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil

from disttrain import slurm
from disttrain.errors import DisttrainError, HangError, StoppedError, TrainingError, UsageError, error_of
from disttrain.manifest import list_steps, step_of
from disttrain.nvml import Gpu
from disttrain.peers import Channel, meet
from disttrain.runfolder import COMMAND, LOCKED_BY_LAUNCHER, RunFolder
from disttrain.watch import End, Row, Watch, describe, stalled

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37  # linux/prctl.h
_POLL_S = 0.2
_MOST_IDLE_RESTARTS = 3  # in a row without progress
_SAVING_S = 2.0  # for a checkpoint that is being written when another rank fails
_CAUSE_S = 1.0  # for the cause of an error that may be a consequence
_REPORT_S = 1.0  # between two reports of a node on its ranks
_NODE_0_S = 10.0  # by which node 0 is sooner to notice a hang
_ALL_DONE_S = 60.0  # for the other nodes, when the ranks of this one have ended well
_GONE_S = 10.0  # for processes that were killed
_DETAIL = 2**16  # characters of a traceback that are passed on
# What collectives say when a peer is gone: torch's own errors, gloo and NCCL.
_OF_THE_GROUP = re.compile(
    r"gloo|NCCL|TCPStore|^Dist\w*Error|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE
)
_ENDED_BY_TORCHRUN = {-signal.SIGTERM, 128 + signal.SIGTERM}
_OF_TORCHRUN = re.compile(r"[IWE]\d{4} [\d:.]+ +\d+ torch/distributed/|W\d{4} .*torch")


@dataclass(frozen=True)
class LaunchPlan:
    """What one node starts.

    Attributes:
        config_path: the YAML file, as given.
        overrides: `key=value` assignments, as given.
        run_dir: the run folder.
        resume: auto, never or a path.
        device: cuda or cpu.
        processes: processes on this node.
        gpus: the GPUs of this node's processes, in order of local rank; empty on CPUs.
        threads: CPU threads of each process.
        nodes: number of nodes.
        node_rank: of this node.
        master_addr: address of node 0; needed for several nodes.
        master_port: port on node 0; needed for several nodes.
        verbosity: -1 quiet, 0, 1 verbose.
        force: go on although config or data set differ from the checkpoint's.
        stall_timeout_s: how long a rank may make no progress, and how long to wait for other nodes.
    """

    config_path: Path
    overrides: tuple[str, ...]
    run_dir: Path
    resume: str
    device: Literal["cuda", "cpu"]
    processes: int
    gpus: tuple[Gpu, ...]
    threads: int
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    verbosity: int = 0
    force: bool = False
    stall_timeout_s: float = 300.0

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes


def plan_processes(
    *, gpus: int | None, procs: int | None, visible: Sequence[Gpu], cores: int, environ: Mapping[str, str]
) -> tuple[Literal["cuda", "cpu"], int, tuple[Gpu, ...], int]:
    """Decides device, processes on this node, their GPUs and the CPU threads of each.

    Args:
        gpus: `--gpus`, or None.
        procs: `--procs`, or None.
        visible: GPUs of this node.
        cores: CPU cores this process may use.
        environ: for OMP_NUM_THREADS.

    Raises:
        UsageError: the machine does not have what is asked for.
    """
    if gpus is not None and procs is not None:
        raise UsageError(
            "--gpus and --procs exclude each other: give --gpus N or, to train on the CPU, --procs N"
        )
    if gpus is not None and gpus > len(visible):
        if not visible:
            raise UsageError(
                f"--gpus {gpus}: this machine has no usable GPU; train on the CPU with --procs N"
            )
        limit = environ.get("CUDA_VISIBLE_DEVICES")
        of = f" (CUDA_VISIBLE_DEVICES={limit})" if limit is not None else ""
        raise UsageError(
            f"--gpus {gpus}: only {len(visible)} visible on this machine{of}; lower --gpus, "
            "or use --procs N to train on the CPU"
        )
    on_gpu = procs is None and bool(visible)
    processes = (gpus or len(visible)) if on_gpu else (procs or 1)
    wanted = environ.get("OMP_NUM_THREADS") or str(max(1, cores // processes))
    if not re.fullmatch(r"0*[1-9][0-9]*", wanted):
        raise UsageError(f"OMP_NUM_THREADS={wanted}: expected one whole number; correct it or unset it")
    threads = int(wanted)
    return "cuda" if on_gpu else "cpu", processes, tuple(visible[:processes]) if on_gpu else (), threads


def plan_nodes(
    *,
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    environ: Mapping[str, str],
) -> slurm.Node | None:
    """Returns this node's place among several, from the flags or else from Slurm; None for a single node.

    Raises:
        UsageError: a flag is missing or contradicts another.
    """
    if nodes is None:
        if node_rank is not None or master_addr is not None:
            raise UsageError("--node-rank and --master-addr need --nodes N")
        found = slurm.node(environ)
        if found is None or found.nodes == 1:
            return None
        return found if master_port is None else found._replace(master_port=master_port)
    if node_rank is not None and node_rank >= nodes:
        raise UsageError(f"--node-rank {node_rank}: with --nodes {nodes} it must be below {nodes}")
    if nodes == 1:
        return None
    if node_rank is None or master_addr is None or master_port is None:
        raise UsageError(
            f"--nodes {nodes} needs --node-rank R (0..{nodes - 1}), --master-addr HOST (node 0) "
            "and --master-port PORT"
        )
    return slurm.Node(nodes, node_rank, master_addr, master_port)


def worker_command(plan: LaunchPlan) -> list[str]:
    """Returns the module that every rank of a run executes, and its arguments."""
    worker = ["disttrain.worker", str(plan.config_path), *plan.overrides, "--run-dir", str(plan.run_dir)]
    if plan.resume != "auto":
        worker += ["--resume", plan.resume]
    if plan.force:
        worker += ["--force"]
    return worker + {-1: ["--quiet"], 0: []}.get(plan.verbosity, ["--verbose"])


def command(plan: LaunchPlan, worker: Sequence[str] | None = None) -> list[str]:
    """Returns the command line that starts this node's processes.

    Args:
        plan: what to start.
        worker: module and arguments of every rank; None means those of a run.
    """
    worker = worker_command(plan) if worker is None else worker
    if plan.world_size == 1:
        return [sys.executable, "-m", *worker]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(files("disttrain") / "assets" / "accelerate.yaml")]
    launch += ["--num_machines", str(plan.nodes), "--num_processes", str(plan.world_size)]
    launch += ["--num_cpu_threads_per_process", str(plan.threads)]
    launch += ["--log_dir", os.devnull]  # else torchrun leaves a folder in /tmp when it is killed
    if plan.nodes > 1:
        launch += ["--machine_rank", str(plan.node_rank)]
        launch += ["--main_process_ip", str(plan.master_addr), "--main_process_port", str(plan.master_port)]
    else:
        launch += ["--main_process_port", "0"]
    return [*launch, "--module", *worker]


def environment(plan: LaunchPlan) -> dict[str, str]:
    """Returns the variables to set for the command."""
    variables = {"OMP_NUM_THREADS": str(plan.threads)}
    if plan.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if plan.nodes == 1 and plan.world_size > 1:
        # torchrun then binds a free port itself; a port that is picked beforehand may be taken in between.
        variables |= {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    return variables


def shell_line(plan: LaunchPlan) -> str:
    """Returns the command with its variables, as one would type it."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in environment(plan).items()]
    return " ".join([*assignments, shlex.join(command(plan))])


def rank_map(plan: LaunchPlan) -> list[tuple[int, str, str]]:
    """Returns (rank, host, device) for every rank; hosts and GPUs of other nodes are not known here."""
    rows = []
    for rank in range(plan.world_size):
        node, local = divmod(rank, plan.processes)
        here = node == plan.node_rank
        device = f"cuda:{local}" if plan.device == "cuda" else "cpu"
        if here and plan.gpus:
            gpu = plan.gpus[local]
            device += f" (NVML {gpu.index}, {gpu.name}, {gpu.uuid})"
        rows.append((rank, socket.gethostname() if here else f"node {node}", device))
    return rows


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        exit_code: for the shell.
        message: one line for the user; empty when the run itself has said all.
        detail: a traceback or the last lines of a log; may be empty.
        status: what belongs into status.json; empty when the run itself has written its end.
        victim: whether it may be no more than the consequence of a failure that is not known yet.
    """

    exit_code: int
    message: str = ""
    detail: str = ""
    status: dict[str, Any] = field(default_factory=dict, compare=False)
    victim: bool = field(default=False, compare=False)


def launch(
    plan: LaunchPlan,
    folder: RunFolder,
    *,
    max_restarts: int,
    say: Callable[[str], None],
    facts: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs the plan to its end and settles status.json. The folder's lock must be held.

    Nothing that was started is left when it returns, however the run has ended.

    Args:
        plan: what to start.
        folder: the run folder.
        max_restarts: how often to go on from the last checkpoint after a failure.
        say: told about restarts.
        facts: what all nodes must agree on, from `peers.facts`; for several nodes.
    """
    signals: list[int] = []  # the first asks the ranks to stop, the second ends them at once
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    previous = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in numbers}
    restarts = int(folder.status().get("restarts") or 0)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    try:
        for attempt in range(max_restarts + 1):
            folder.clear_errors(_ranks(plan))
            if plan.node_rank == 0:
                outcome_, changes = _begin(folder, by_itself=attempt > 0 or requeued)
                if outcome_ is not None:
                    outcome = outcome_
                    folder.update_status(exit_code=outcome.exit_code, **outcome.status)
                    break
                restarts += requeued and attempt == 0
                # So that no earlier end is taken for the end of this attempt.
                clean = dict.fromkeys(("exit_code", "reason", "rank", "host"))
                folder.update_status(state="running", restarts=restarts, **clean, **changes)
            outcome, stopping = _attempt(plan, folder, signals, facts or {})
            if plan.node_rank == 0 and outcome.status:
                folder.update_status(exit_code=outcome.exit_code, **outcome.status)
            failed = outcome.exit_code in {TrainingError.exit_code, HangError.exit_code}
            again = failed and not stopping and not signals
            if not again or attempt == max_restarts:
                break
            restarts += 1
            say(f"{outcome.message}\nrestart {attempt + 1} of {max_restarts} from the last checkpoint")
            plan = replace(plan, resume="auto")
            if plan.node_rank == 0:
                folder.update_status(restarts=restarts)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return outcome


def _begin(folder: RunFolder, *, by_itself: bool) -> tuple[Outcome | None, dict[str, Any]]:
    """Looks whether a run gets on at all.

    Args:
        folder: the run folder.
        by_itself: whether nobody asked for this attempt: it follows a failure, or Slurm has requeued the job.

    Returns:
        The outcome if it is of no use to begin again; and what to keep in status.json for the next time.
    """
    status = folder.status()
    step = max(map(step_of, list_steps(folder.checkpoints)), default=0)
    idle = int(status.get("idle_restarts") or 0) + 1 if by_itself and status.get("began_at") == step else 0
    if idle <= _MOST_IDLE_RESTARTS:
        return None, {"began_at": step, "idle_restarts": idle}
    reason = (
        f"no progress in {_MOST_IDLE_RESTARTS} restarts: each began at step {step:,} and saved nothing; see "
        "to the failure, or save more often (checkpoint.every_steps), then start it again"
    )
    return Outcome(TrainingError.exit_code, reason, status={"state": "failed", "reason": reason}), {}


def _ranks(plan: LaunchPlan) -> range:
    first = plan.node_rank * plan.processes
    return range(first, first + plan.processes)


def _attempt(
    plan: LaunchPlan, folder: RunFolder, signals: list[int], facts: Mapping[str, str]
) -> tuple[Outcome, bool]:
    """Starts this node's processes, follows them to their end and leaves none behind.

    Returns:
        How it ended, and whether a node was asked to stop.
    """
    with contextlib.ExitStack() as stack:
        channel = None
        if plan.nodes > 1:
            assert plan.master_addr is not None
            assert plan.master_port is not None
            place = slurm.Node(plan.nodes, plan.node_rank, plan.master_addr, plan.master_port)
            try:
                channel = meet(
                    place,
                    plan.processes,
                    facts,
                    timeout_s=plan.stall_timeout_s,
                    interrupted=lambda: bool(signals),
                )
            except DisttrainError as error:
                state = "stopped" if isinstance(error, StoppedError) else "failed"
                status = {"state": state, "reason": str(error)}
                return Outcome(error.exit_code, str(error), status=status), bool(signals)
            stack.callback(channel.close)
        stack.enter_context(_adopting_orphans())
        watch = stack.enter_context(Watch(_ranks(plan).start, plan.processes))
        others = set(psutil.Process().children(recursive=True))
        path = folder.launch_log(plan.node_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(path.open("ab"))
        begin = log.tell()
        variables = os.environ | environment(plan) | watch.environment
        variables |= {LOCKED_BY_LAUNCHER: str(folder.path.resolve()), COMMAND: shlex.join(sys.orig_argv)}
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then asks for a stop.
        child = subprocess.Popen(
            command(plan),
            env=variables,
            stderr=log,
            start_new_session=True,
            preexec_fn=_dying_with_this_process(),
        )
        stack.callback(_end_all, child, others)
        supervisor = _Supervisor(plan, folder, signals, watch, child, channel, begin)
        outcome = supervisor.follow()
        # What rank 0 has begun to save is worth a moment, if it can still be finished.
        deadline = time.monotonic() + _SAVING_S
        failed_elsewhere = outcome.status.get("state") == "failed" and outcome.status.get("rank") != 0
        while plan.node_rank == 0 and failed_elsewhere and watch.saving(0) and time.monotonic() < deadline:
            watch.wait(0.02)
        return outcome, supervisor.stopping


class _Supervisor:
    """Follows the processes of this node, and through the channel those of the others, to one outcome."""

    def __init__(
        self,
        plan: LaunchPlan,
        folder: RunFolder,
        signals: list[int],
        watch: Watch,
        child: subprocess.Popen[bytes],
        channel: Channel | None,
        log_begin: int,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._signals = signals
        self._watch = watch
        self._child = child
        self._channel = channel
        self._log_begin = log_begin
        self._host = socket.gethostname()
        self.stopping = False
        self._asked = False  # by another node; a signal here is still the first one
        self._remote_rows: dict[int, list[Row]] = {}
        self._done: dict[int, int] = {}  # exit codes of the nodes that have ended well
        self._final: Outcome | None = None

    def follow(self) -> Outcome:
        """Returns how the run ended; what of it is still alive is of no use any more."""
        suspect, until, reported = None, 0.0, 0.0
        while True:
            sockets = self._channel.sockets if self._channel else []
            self._watch.wait(_POLL_S, sockets, self._child.pid)
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
            if self._channel and self._plan.node_rank and now - reported > _REPORT_S:
                self._channel.send({"rows": self._watch.rows()})
                reported = now

    def _second_signal(self) -> Outcome | None:
        if len(self._signals) < 2:
            return None
        number = self._signals[-1]
        reason = f"ended by {signal.Signals(number).name}"
        return Outcome(
            128 + number,
            f"{reason}; the last checkpoint is intact",
            status={"state": "stopped", "reason": reason},
        )

    def _stop(self) -> Outcome | None:
        """Hands on the wish to stop; before training has begun there is nothing to save."""
        if self.stopping or not (self._signals or self._asked):
            return None
        self.stopping = True
        if self._channel:
            self._channel.send({"stop": True})
        if self._plan.node_rank == 0 and not self._watch.started and not self._watch.ends:
            reason = "stopped before training began; nothing is lost, the same command goes on"
            code = StoppedError.exit_code
            return Outcome(code, reason, status={"state": "stopped", "reason": reason})
        self._watch.stop()
        return None

    def _listen(self) -> Outcome | None:
        """Takes in what the other nodes say."""
        found = None
        for node, message in self._channel.receive() if self._channel else []:
            match message:
                case {"rows": rows}:
                    self._remote_rows[node] = [Row(*row) for row in rows]
                case {"stop": True}:
                    self._asked = True
                case {"done": code}:
                    self._done[node] = code
                    self._remote_rows[node] = []
                case {"outcome": outcome}:
                    found = _worse(found, Outcome(**outcome))
                case {"final": outcome}:
                    self._final = Outcome(**outcome)
                case {"stacks": rank}:
                    assert self._channel
                    self._channel.send({"answer": self._watch.stacks(rank, self._folder.log(rank))}, node)
        for node in sorted(self._channel.lost - set(self._done)) if self._channel else []:
            assert self._channel
            reason = f"node {node} ({self._channel.hosts[node]}) is gone"
            status = {"state": "failed", "reason": reason, "host": self._channel.hosts[node]}
            found = _worse(found, Outcome(TrainingError.exit_code, reason, status=status))
        return found

    def _local(self) -> Outcome | None:
        """Judges the ends of this node's ranks, and of the process that started them."""
        code = self._child.poll()
        if code is not None and not self._watch.all_ended:
            if code < 0 and self._plan.world_size > 1 and not self._watch.ends:
                return self._end(code)  # its ranks die with it
            self._watch.wait(0.1)  # what its ranks have said may come a moment later
        well = {0, StoppedError.exit_code}
        said = set(self._watch.said.values())
        saved = self.stopping and StoppedError.exit_code in said
        for end in self._watch.ends:
            fell = end.said is None and end.status not in _ENDED_BY_TORCHRUN
            if fell and not saved:  # those that torchrun has ended died of something else
                return self._death(end)
        if said - well and not saved:
            error = self._folder.first_error(_ranks(self._plan))
            if error is not None:
                return _from_error(error)
        return self._end(code) if self._watch.all_ended or code is not None else None

    def _end(self, code: int | None = None) -> Outcome:
        """Judges the end of all ranks of this node, of which none was seen to die.

        Args:
            code: exit code of the process that started them, if it is known.
        """
        said = [end.said for end in self._watch.ends if end.said is not None]
        state = self._folder.status().get("state")
        well = {0, StoppedError.exit_code}
        if self._plan.node_rank and said and set(said) <= well:  # status.json is node 0's
            return Outcome(max(said))
        error = self._folder.first_error(_ranks(self._plan))
        log = _read_tail(self._folder.launch_log(self._plan.node_rank), self._log_begin, 200)
        rank, status = _failed_rank("\n".join(log)) or (None, code)
        killed = rank is not None and status is not None and status < 0
        if error is not None and not killed:
            return _from_error(error)
        if not killed and state in {"finished", "stopped"} and self._plan.node_rank == 0:
            return Outcome(int(self._folder.status()["exit_code"]))
        if rank is None and self._watch.ends:
            end = min(self._watch.ends, key=lambda end: end.said is not None)
            rank, status = end.rank, end.status if end.said is None else end.said
            if end.said not in {None, 0, StoppedError.exit_code}:  # its error file could not be written
                code = type(error_of(end.said or 0, "")).exit_code
                return replace(self._failure(rank, _cause(status), log), exit_code=code)
        return self._failure(rank, _cause(status), log)

    def _death(self, end: End) -> Outcome:
        log = _read_tail(self._folder.launch_log(self._plan.node_rank), self._log_begin, 200)
        status = self._child.poll() if end.status is None and self._plan.world_size == 1 else end.status
        if status is None:
            rank, code = _failed_rank("\n".join(log)) or (None, None)
            status = code if rank == end.rank else None
        return self._failure(end.rank, f"{_cause(status)} {end.doing}", log)

    def _failure(self, rank: int | None, cause: str, log: Sequence[str]) -> Outcome:
        who = "a process" if rank is None else f"rank {rank}"
        reason = f"{who} {cause}"
        status = {"state": "failed", "reason": reason, "rank": rank, "host": self._host}
        message = f"{who} on {self._host} {cause}; see {self._folder.launch_log(self._plan.node_rank)}"
        return Outcome(TrainingError.exit_code, message, "\n".join(_own_words(log)[-15:]), status)

    def _hang(self) -> Outcome | None:
        """Judges who makes no progress: node 0 for all nodes, the others when node 0 is silent."""
        plan = self._plan
        rows = [*self._watch.rows(), *(row for rows in self._remote_rows.values() for row in rows)]
        timeout_s = plan.stall_timeout_s + (_NODE_0_S if plan.node_rank else 0)
        culprits = stalled(rows, timeout_s, cpu_tells=plan.device == "cpu")
        if not culprits:
            return None
        reason = describe(culprits, rows)
        stacks = []
        for row in culprits[:4]:
            node = row.rank // plan.processes
            if node == plan.node_rank:
                stacks.append(self._watch.stacks(row.rank, self._folder.log(row.rank)))
            elif self._channel:
                stacks.append(self._channel.ask(node, "stacks", row.rank, timeout_s=2) or "")
        first = culprits[0]
        status = {"state": "failed", "reason": reason, "rank": first.rank, "host": first.host}
        return Outcome(HangError.exit_code, reason, "\n".join(stacks), status)

    def _agree(self, found: Outcome) -> Outcome:
        """Settles on one outcome with the other nodes."""
        channel = self._channel
        if channel is None or self._final is not None:
            return self._final or found
        well = found.exit_code in {0, StoppedError.exit_code} and not found.status
        word = {"done": found.exit_code} if well else {"outcome": asdict(found)}
        wait_s = _ALL_DONE_S if well else _CAUSE_S + 1
        deadline = time.monotonic() + wait_s
        if self._plan.node_rank:
            channel.send(word)
            while self._final is None and 0 not in channel.lost and time.monotonic() < deadline:
                self._watch.wait(_POLL_S, channel.sockets)
                found = self._second_signal() or found
                self._listen()
            return self._final or found
        while well and len(self._done) < self._plan.nodes - 1 and time.monotonic() < deadline:
            self._watch.wait(_POLL_S, channel.sockets)
            bad = self._second_signal() or self._listen()
            if bad is not None:
                found, well = bad, False
        channel.send({"final": asdict(found)})
        return found


def _worse(one: Outcome | None, other: Outcome) -> Outcome:
    """Returns the outcome that is more likely the cause of the other."""
    return other if one is None or (one.victim and not other.victim) else one


def _from_error(error: Mapping[str, Any]) -> Outcome:
    """Returns the outcome of a run that ended with an error that a rank wrote down."""
    reason = str(error["message"])
    place = {"rank": error["rank"], "host": error["host"]}
    if error["traceback"] is None:
        status = {"state": "failed", "reason": reason, **place}
        return Outcome(int(error["exit_code"]), reason, status=status, victim=error["type"] == "HangError")
    reason = f"{error['type']}: {reason}"
    return Outcome(
        int(error["exit_code"]),
        f"rank {error['rank']} on {error['host']} failed: {reason}",
        str(error["traceback"])[-_DETAIL:],
        {"state": "failed", "reason": reason, **place},
        victim=_OF_THE_GROUP.search(reason) is not None,
    )


def _cause(status: int | None) -> str:
    if status is None:
        return "died without a report"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    if status == 0:
        return "left early with exit code 0 and no report"
    return f"ended with exit code {status} and left no report"


def _dying_with_this_process() -> Callable[[], None]:
    """Returns what a new child does so that it does not outlive this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    launcher = os.getpid()

    def die_with_launcher() -> None:
        # Slurm may send it to every process of a step; those between this one and the ranks know it not.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    return die_with_launcher


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of orphaned descendants, so that it can end them and leaves no zombie."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def _end_all(child: subprocess.Popen[bytes], others: Container[psutil.Process]) -> None:
    """Ends a child and all that descend from it, and returns when they are gone.

    Args:
        child: started by this process.
        others: descendants of this process that are none of its own.
    """
    deadline = time.monotonic() + _GONE_S
    if child.poll() is None:
        child.kill()
    while time.monotonic() < deadline:
        left = [process for process in psutil.Process().children(recursive=True) if process not in others]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            if process.pid != child.pid:
                with contextlib.suppress(ChildProcessError):  # not orphaned yet
                    os.waitpid(process.pid, os.WNOHANG)
        if child.poll() is not None and not left:
            break
        time.sleep(0.005)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a dashboard that was killed leaves the cursor hidden
        sys.stdout.flush()


def _failed_rank(log: str) -> tuple[int, int] | None:
    """Returns a rank that failed and its exit code, negative for a signal, from torchrun's report.

    torchrun itself ends the others with SIGTERM, so that one does not count.
    """
    found = re.findall(r"rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*(-?\d+)", log)
    failures = [(int(rank), int(code)) for rank, code in found]
    failures = [failure for failure in failures if failure[1] not in _ENDED_BY_TORCHRUN]
    return min(failures, key=lambda failure: failure[1] > 0, default=None)


def _own_words(log: Sequence[str]) -> list[str]:
    """Returns the lines of a log before torchrun's report on a failure."""
    begin = next((i for i, line in enumerate(log) if _OF_TORCHRUN.match(line)), len(log))
    return list(log[:begin] or log)


def _read_tail(path: Path, begin: int, lines: int) -> list[str]:
    """Returns the last lines of a file, none of them from before the byte `begin`."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
