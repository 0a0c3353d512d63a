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
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from disttrain import slurm_env
from disttrain.errors import DisttrainError, HangError, StoppedError, TrainingError
from disttrain.launch.elastic import Leader
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
    requeued, left, again = slurm_env.requeued(os.environ), max_restarts, False
    with (
        received_stops() as signals,
        _meeting(plan, facts or {}, signals, secret or Secret(), say) as connect,
    ):
        while True:
            if plan.node_rank == 0:
                useless, changes = _begin_attempt(folder, by_itself=again or requeued)
                if useless is not None:
                    folder.update_status(exit_code=useless.exit_code, **useless.status)
                    return useless
                restarts += requeued and not again
                # Otherwise the outcome of an earlier attempt could be taken for this one's.
                folder.update_status(**CLEAN, state="running", restarts=restarts, **changes)
            outcome, stopping, left = _attempt(plan, folder, signals, connect, left)
            if plan.node_rank == 0 and outcome.status:
                folder.update_status(exit_code=outcome.exit_code, **outcome.status)
            failed = outcome.exit_code in {TrainingError.exit_code, HangError.exit_code}
            regroup = stopping == "regroup" and outcome.exit_code == StoppedError.exit_code
            again = regroup or (failed and stopping != "stop" and left > 0)
            if signals or not again:
                break
            if failed:
                left, restarts = left - 1, restarts + 1
                count = f"restart {max_restarts - left} of {max_restarts}"
                say(f"{outcome.message}\n{count} from the last checkpoint")
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
    plan: LaunchPlan, folder: RunFolder, signals: list[int], connect: Callable[[int], Channel], left: int
) -> tuple[Outcome, str | None, int]:
    """Connects the nodes, starts the processes of this one and waits until they have ended.

    Returns:
        The outcome, why the ranks were asked to stop (as `Supervisor.stopping`), and how many restarts are
        left.
    """
    with contextlib.ExitStack() as stack:
        try:
            channel = connect(left)
        except DisttrainError as error:
            return _not_connected(error, signals), None, left
        stack.callback(channel.close)
        plan = replace(plan, nodes=len(channel.hosts), node_rank=channel.node_rank)
        folder.clear_errors(plan.ranks)
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
        return outcome, supervisor.stopping, channel.left


@contextlib.contextmanager
def _meeting(
    plan: LaunchPlan,
    facts: Mapping[str, str],
    signals: list[int],
    secret: Secret,
    say: Callable[[str], None],
) -> Iterator[Callable[[int], Channel]]:
    """Yields what waits for the launchers of the other nodes; its argument is how many restarts are left.

    On a single node, its channel has no connections.
    """
    if plan.nodes == 1:
        yield lambda left: Channel({}, [socket.gethostname()], left=left)
        return
    assert plan.master_addr is not None
    assert plan.master_port is not None
    place = slurm_env.Node(plan.nodes, plan.node_rank, plan.master_addr, plan.master_port)

    def interrupted() -> bool:
        return bool(signals)

    def meet(left: int) -> Channel:
        timeout_s = plan.stall_timeout_s
        channel = rendezvous(
            place, plan.processes, facts, secret=secret, timeout_s=timeout_s, interrupted=interrupted, say=say
        )
        if plan.wait_for_nodes_s is None:  # otherwise node 0 has told, to those too that came later
            channel.left = left
        return channel

    if plan.wait_for_nodes_s is None or plan.node_rank:
        yield meet
    else:
        with Leader(plan, place, facts, secret, interrupted, say) as leader:
            yield leader.gather


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
