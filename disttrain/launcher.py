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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from disttrain import slurm
from disttrain.errors import TrainingError, UsageError
from disttrain.runfolder import COMMAND, LOCKED_BY_LAUNCHER, RunFolder
from disttrain.telemetry import Gpu

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.2
_GRACE_S = 2.0  # from a rank's error to the end of the others


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


@dataclass
class Outcome:
    """How a launch ended.

    Attributes:
        exit_code: for the shell.
        message: one line for the user; empty when the run itself has said all.
        detail: a traceback or the last lines of the log; may be empty.
    """

    exit_code: int
    message: str = ""
    detail: str = ""


def launch(plan: LaunchPlan, folder: RunFolder, *, max_restarts: int, say: Callable[[str], None]) -> Outcome:
    """Runs the plan to its end and settles status.json. The folder's lock must be held.

    Args:
        plan: what to start.
        folder: the run folder.
        max_restarts: how often to go on from the last checkpoint after a failure.
        say: told about stops and restarts.
    """
    signals: list[int] = []  # the first asks the child to stop, the second ends it at once
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    previous = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in numbers}
    restarts = int(folder.status().get("restarts") or 0)
    try:
        for attempt in range(max_restarts + 1):
            folder.clear_errors()
            if plan.node_rank == 0:  # so that no earlier end is taken for the end of this attempt
                folder.update_status(state="running", exit_code=None, reason=None, rank=None, host=None)
            code, log = _start_and_wait(plan, folder, signals)
            outcome = _judge(code, log, plan, folder, signals)
            again = outcome.exit_code == TrainingError.exit_code and not signals
            if not again or attempt == max_restarts:
                break
            restarts += 1
            say(f"{outcome.message}\nrestart {attempt + 1} of {max_restarts} from the last checkpoint")
            plan = replace(plan, resume="auto")
            folder.update_status(restarts=restarts)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return outcome


def _start_and_wait(plan: LaunchPlan, folder: RunFolder, signals: list[int]) -> tuple[int, list[str]]:
    """Returns the exit code of the processes and what they last printed on standard error."""
    libc = ctypes.CDLL(None, use_errno=True)
    launcher = os.getpid()

    def die_with_launcher() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    variables = os.environ | environment(plan)
    variables |= {LOCKED_BY_LAUNCHER: str(folder.path.resolve()), COMMAND: shlex.join(sys.orig_argv)}
    path = folder.launch_log(plan.node_rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        begin = log.tell()
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then asks for a stop.
        child = subprocess.Popen(
            command(plan), env=variables, stderr=log, start_new_session=True, preexec_fn=die_with_launcher
        )
        asked, failed_at, code = False, None, None
        while code is None:
            if failed_at is None and folder.first_error() is not None:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
                child.kill()  # the other ranks may wait for the dead one in a collective
                child.wait()
                code = 1  # its own end tells nothing: the error file does
            elif len(signals) > 1:
                child.kill()  # the workers ask the kernel to die with it
                code = child.wait()
            else:
                if signals and not asked:
                    child.terminate()
                    asked = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(timeout=_POLL_S)
    return code, _read_tail(path, begin, 60)


def _judge(code: int, log: list[str], plan: LaunchPlan, folder: RunFolder, signals: list[int]) -> Outcome:
    """Finds out how the processes ended, and writes it into status.json on node 0."""

    def settle(**status: Any) -> None:
        if plan.node_rank == 0:
            folder.update_status(**status)

    if len(signals) > 1:
        number = signals[-1]
        reason = f"ended by {signal.Signals(number).name}"
        settle(state="stopped", exit_code=128 + number, reason=reason)
        return Outcome(128 + number, f"{reason}; the last checkpoint is intact")
    rank, exit_code = _killed_rank("\n".join(log)) or (None, code)
    error = folder.first_error()
    if error is not None and exit_code >= 0:  # a rank killed by a signal leaves none, only its victims do
        reason = error["message"] if error["traceback"] is None else f"{error['type']}: {error['message']}"
        exit_code = int(error["exit_code"])
        settle(state="failed", exit_code=exit_code, reason=reason, rank=error["rank"], host=error["host"])
        if error["traceback"] is None:
            return Outcome(exit_code, reason)
        return Outcome(
            exit_code, f"rank {error['rank']} on {error['host']} failed: {reason}", error["traceback"]
        )
    status = folder.status()
    if status.get("state") in {"finished", "stopped"}:
        return Outcome(int(status["exit_code"]))
    if signals:
        number = signals[0]
        reason = f"ended by {signal.Signals(number).name} before it could save"
        settle(state="stopped", exit_code=128 + number, reason=reason)
        return Outcome(128 + number, f"{reason}; earlier checkpoints are intact")
    cause = f"ended with exit code {exit_code} and left no report"
    if exit_code < 0:
        cause = f"was killed by {signal.Signals(-exit_code).name}"
    reason = f"{'a process' if rank is None else f'rank {rank}'} {cause}"
    host = socket.gethostname()
    settle(state="failed", exit_code=TrainingError.exit_code, reason=reason, rank=rank, host=host)
    path = folder.launch_log(plan.node_rank)
    return Outcome(TrainingError.exit_code, f"{reason} on {host}; see {path}", "\n".join(log[-15:]))


def _killed_rank(log: str) -> tuple[int, int] | None:
    """Returns a rank that a signal ended and its (negative) exit code, from torchrun's report.

    torchrun itself ends the others with SIGTERM, so that one does not count.
    """
    failures = re.findall(r"rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*(-\d+)", log)
    killed = [(int(rank), int(code)) for rank, code in failures if int(code) != -signal.SIGTERM]
    return killed[0] if killed else None


def _read_tail(path: Path, begin: int, lines: int) -> list[str]:
    """Returns the last lines of a file, none of them from before the byte `begin`."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
