"""Nodes and tasks of a Slurm job: the only module that reads SLURM_* variables."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from disttrain.errors import UsageError


class Node(NamedTuple):
    """The rank of this node, and the address of node 0."""

    nodes: int
    node_rank: int
    master_addr: str
    master_port: int


class Allocation(NamedTuple):
    """The job that this process belongs to.

    Attributes:
        job: the job id.
        step: the step id, or None in the batch script and in a shell of salloc.
        nodes: number of nodes of the job.
        cpus_per_task: as requested, or None.
    """

    job: str
    step: str | None
    nodes: int
    cpus_per_task: int | None


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Returns the job that this process belongs to, or None outside a job."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    cpus = environ.get("SLURM_CPUS_PER_TASK")
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    return Allocation(job, environ.get("SLURM_STEP_ID"), nodes, int(cpus) if cpus else None)


def requeued(environ: Mapping[str, str]) -> bool:
    """Tells whether this job ran before and went back into the queue."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0) > 0


def will_requeue(environ: Mapping[str, str], stopped_by: int | None) -> bool:
    """Tells whether slurm/train.sh puts this job back into the queue after a stop by this signal."""
    return stopped_by == signal.SIGUSR2 and int(environ.get("DISTTRAIN_REQUEUES_LEFT") or 0) > 0


def node(environ: Mapping[str, str]) -> Node | None:
    """Returns this node's rank in a job step with one task per node, or None outside a step.

    Raises:
        UsageError: the step has several tasks per node.
    """
    step = environ.get("SLURM_STEP_ID")
    if step is None or "SLURM_NODEID" not in environ:
        return None
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    tasks = _tasks(environ)
    if tasks != nodes:
        raise UsageError(
            f"Slurm started {tasks} tasks on {nodes} nodes, but `disttrain run` starts the processes of each "
            "node itself; use srun --ntasks-per-node=1, run `python -m disttrain.worker` in every task, "
            "or train on this node only with --nodes 1"
        )
    return Node(nodes, int(environ["SLURM_NODEID"]), _first_host(environ), _port(environ))


def task_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that torch reads, for a worker that srun started as one of several tasks.

    Empty if torch's variables are already set or the step has one task. LOCAL_RANK counts the tasks of the
    node even if each task sees only its own GPU: the device is LOCAL_RANK modulo the visible GPUs.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ or _tasks(environ) < 2:
        return {}
    local_size = _tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ["SLURM_NODEID"]))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(_tasks(environ)),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR", _first_host(environ)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(_port(environ))),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or environ.get("SLURM_CPUS_PER_TASK", "1"),
    }


def task_is_rank(environ: Mapping[str, str]) -> bool:
    """Returns whether srun started this rank directly, as a task with its own cores."""
    return "SLURM_STEP_ID" in environ and _tasks(environ) == int(environ.get("WORLD_SIZE", "1")) > 1


def task_cores(environ: Mapping[str, str]) -> int | None:
    """Returns the CPU cores that Slurm allocated to this task, or None if unknown.

    Not every cluster binds a task to them.
    """
    cores = environ.get("SLURM_CPUS_PER_TASK")
    return int(cores) if cores else None


def job_folders(environ: Mapping[str, str]) -> list[Path]:
    """Returns the node-local folders that a job may have, the preferred one first; empty outside a job."""
    if "SLURM_JOB_ID" not in environ:
        return []
    return [Path(environ[name]) for name in ("SLURM_TMPDIR", "TMPDIR") if environ.get(name)]


def _tasks(environ: Mapping[str, str]) -> int:
    """Returns the tasks of this step. SLURM_NTASKS may be that of the job (srun --preserve-env, salloc)."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))


def _first_host(environ: Mapping[str, str]) -> str:
    """Returns the first host of a list such as gpu[03-05,9],login1, like `scontrol show hostnames`."""
    hosts = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    first_of_each = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts)
    return first_of_each.partition(",")[0]


def _port(environ: Mapping[str, str]) -> int:
    """Returns a port derived from job and step, so that jobs on the same node do not collide."""
    step = environ["SLURM_STEP_ID"]
    return 20000 + (int(environ["SLURM_JOB_ID"]) * 8 + int(step)) % 12000


def _tasks_on_node(counts: str, node_rank: int) -> int:
    """Returns the tasks of a node from Slurm's run-length form: "4(x2),3" means 4, 4, 3 tasks."""
    sizes: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found, counts
        sizes += [int(found[1])] * int(found[2] or 1)
    return sizes[node_rank]
