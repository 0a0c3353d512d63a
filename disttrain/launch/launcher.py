"""Starts the processes of a plan, and restarts them after a failure. No process outlives the launcher.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from disttrain import slurm_env
from disttrain.errors import DisttrainError, HangError, StoppedError, TrainingError
from disttrain.launch.liveness import Liveness
from disttrain.launch.plan import LaunchPlan, child_environment, command
from disttrain.launch.rendezvous import Channel, rendezvous
from disttrain.launch.secret import Secret
from disttrain.launch.supervisor import Outcome, Supervisor
from disttrain.lifetime import adopting_orphans, end_with_parent, received_stops
from disttrain.runs.manifest import list_steps, step_of
from disttrain.runs.resume import resume_again
from disttrain.runs.runfolder import CLEAN, COMMAND, CONFIG, LOCKED_BY_LAUNCHER, RunFolder
from disttrain.terminal import is_animated
from disttrain.urls import shown_command

_MOST_IDLE_RESTARTS = 3  # consecutive restarts without progress
_SAVING_S = 2.0  # to finish a checkpoint when another rank has failed
_GONE_S = 10.0  # for killed processes to disappear


def launch(
    plan: LaunchPlan,
    folder: RunFolder,
    *,
    max_restarts: int,
    say: Callable[[str], None],
    facts: Mapping[str, str] | None = None,
    secret: Secret | None = None,
) -> Outcome:
    """Runs the plan until the run ends, and writes the outcome to status.json.

    The caller must hold the lock of the folder. No process is left when this returns, however the run ended.
    After a failure, the run is restarted from the last checkpoint, at most `max_restarts` times. `facts` must
    be the same on all nodes, and so must the `secret`, which a run on one node does not need.
    """
    restarts = int(folder.status().get("restarts") or 0)
    requeued = slurm_env.requeued(os.environ)
    with received_stops() as signals:
        for attempt in range(max_restarts + 1):
            folder.clear_errors(plan.ranks)
            if plan.node_rank == 0:
                useless, changes = _begin_attempt(folder, by_itself=attempt > 0 or requeued)
                if useless is not None:
                    folder.update_status(exit_code=useless.exit_code, **useless.status)
                    return useless
                restarts += requeued and attempt == 0
                # Otherwise the outcome of an earlier attempt could be taken for this one's.
                folder.update_status(**CLEAN, state="running", restarts=restarts, **changes)
            connect = partial(_connect_nodes, plan, facts or {}, signals, secret, say)
            outcome, stopping = _attempt(plan, folder, signals, connect)
            if plan.node_rank == 0 and outcome.status:
                folder.update_status(exit_code=outcome.exit_code, **outcome.status)
            failed = outcome.exit_code in {TrainingError.exit_code, HangError.exit_code}
            again = failed and not stopping and not signals
            if not again or attempt == max_restarts:
                break
            restarts += 1
            say(f"{outcome.message}\nrestart {attempt + 1} of {max_restarts} from the last checkpoint")
            plan = replace(plan, resume=resume_again(folder, plan.resume))
            if plan.node_rank == 0:
                folder.update_status(restarts=restarts)
    return replace(outcome, signal=signals[0]) if signals else outcome


def _begin_attempt(folder: RunFolder, *, by_itself: bool) -> tuple[Outcome | None, dict[str, Any]]:
    """Checks whether a run makes progress, if this attempt is automatic (after a failure or a requeue).

    Returns:
        The outcome if another attempt is useless, else None; and the changes to status.json.
    """
    status = folder.status()
    step = max(map(step_of, list_steps(folder.checkpoints)), default=0)
    idle = int(status.get("idle_restarts") or 0) + 1 if by_itself and status.get("began_at") == step else 0
    if idle <= _MOST_IDLE_RESTARTS:
        return None, {"began_at": step, "idle_restarts": idle}
    reason = (
        f"no progress in {_MOST_IDLE_RESTARTS} restarts: each began at step {step:,} and saved nothing; fix "
        "the failure, or save more often (checkpoint.every_steps), then start the run again"
    )
    return Outcome.of(TrainingError.exit_code, reason), {}


def _attempt(
    plan: LaunchPlan, folder: RunFolder, signals: list[int], connect: Callable[[], Channel]
) -> tuple[Outcome, bool]:
    """Connects the nodes, starts the processes of this one and waits until they have ended.

    Returns:
        The outcome, and whether a node was asked to stop.
    """
    with contextlib.ExitStack() as stack:
        try:
            channel = connect()
        except DisttrainError as error:
            return _not_connected(error, signals), bool(signals)
        stack.callback(channel.close)
        stack.enter_context(adopting_orphans())
        liveness = stack.enter_context(Liveness(plan.ranks.start, plan.processes))
        others = set(psutil.Process().children(recursive=True))
        path = folder.launch_log(plan.node_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(path.open("ab"))
        begin = log.tell()
        variables = child_environment(plan, os.environ) | liveness.environment
        variables |= {
            LOCKED_BY_LAUNCHER: str(folder.path.resolve()),
            COMMAND: shown_command(),
        }
        variables |= {CONFIG: plan.config} if plan.config else {}
        # In its own session, so that Ctrl-C reaches only the launcher, which then asks the ranks to stop.
        child = subprocess.Popen(
            command(plan),
            env=variables,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(_prepare_child, os.getpid()),
        )
        stack.callback(_end_all, child, others)
        liveness.begin(child.pid)
        supervisor = Supervisor(plan, folder, signals, liveness, child, channel, begin)
        outcome = supervisor.follow()
        # If rank 0 is saving a checkpoint and another rank failed, give it time to finish.
        deadline = time.monotonic() + _SAVING_S
        failed_elsewhere = outcome.status.get("state") == "failed" and outcome.status.get("rank") != 0
        while plan.node_rank == 0 and failed_elsewhere and liveness.saving(0) and time.monotonic() < deadline:
            liveness.wait(0.02)
        return outcome, supervisor.stopping


def _connect_nodes(
    plan: LaunchPlan,
    facts: Mapping[str, str],
    signals: list[int],
    secret: Secret | None,
    say: Callable[[str], None],
) -> Channel:
    """Waits for the launchers of the other nodes; on a single node, the channel has no connections."""
    if plan.nodes == 1:
        return Channel({}, [socket.gethostname()])
    assert plan.master_addr is not None
    assert plan.master_port is not None
    place = slurm_env.Node(plan.nodes, plan.node_rank, plan.master_addr, plan.master_port)
    assert secret is not None
    return rendezvous(
        place,
        plan.processes,
        facts,
        secret=secret,
        timeout_s=plan.stall_timeout_s,
        interrupted=lambda: bool(signals),
        say=say,
    )


def _not_connected(error: DisttrainError, signals: list[int]) -> Outcome:
    """Returns the outcome of a run whose nodes could not connect."""
    code, reason = error.exit_code, str(error)
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    if state == "stopped" and signal.SIGTERM in signals and "SLURM_STEP_ID" in os.environ:
        # Not a request to stop: srun terminates all tasks when one fails, or the job was cancelled.
        code, state = 128 + signal.SIGTERM, "failed"
        reason = "ended by SIGTERM before all nodes had joined; see the messages of the other nodes"
    return Outcome.of(code, reason, state=state)


def _prepare_child(launcher: int) -> None:
    """Runs in a new child before exec, so that the child does not outlive the launcher."""
    # Slurm may send USR2 to every process of a step. Those between the launcher and the ranks do not handle
    # it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    end_with_parent(launcher)


def _end_all(child: subprocess.Popen[bytes], others: Container[psutil.Process]) -> None:
    """Kills a child and all its descendants, and waits until they are gone; `others` are spared."""
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
    if is_animated(sys.stdout):
        sys.stdout.write("\x1b[?25h")  # shows the cursor, which a killed dashboard leaves hidden
        sys.stdout.flush()
