"""The launch plan of a node: from flags and Slurm's environment to a command and its variables. Pure.

A single process is started directly, several through `accelerate launch`.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from disttrain import slurm_env
from disttrain.errors import UsageError
from disttrain.launch.secret import SECRET
from disttrain.monitor.nvml import Gpu
from disttrain.runs.runfolder import RunFolder

# These say which rank a process is: to torch, Accelerate, MPI or our own worker. A pod, an mpirun or an
# interactive Slurm step around the launcher may have set them for a group that is not the launcher's.
_RANK_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|NODE)_(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|SLURM_(STEP_ID|STEPID|PROCID|LOCALID)|MPI_LOCAL\w+"
    r"|(ACCELERATE|FSDP|PET|TORCHELASTIC|PMI|PMIX|OMPI|MV2)_\w+"
)


class Processes(NamedTuple):
    """The processes of a node; fields as in `LaunchPlan`."""

    device: Literal["cuda", "cpu"]
    processes: int
    gpus: tuple[Gpu, ...]
    threads: int


@dataclass(frozen=True)
class LaunchPlan:
    """What a node starts.

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
        force: resume although the config or data set differs from the checkpoint's.
        profile: which ranks write a trace of a few steps, "rank0" or "all"; None is none.
        config: the checked config as YAML, which the ranks get; empty if they read the file.
        stall_timeout_s: how long a rank may make no progress, and how long to wait for other nodes.
        wait_for_nodes_s: how long a restart waits for a node before it goes on without it; None is never.
        min_nodes: the fewest nodes to go on with.
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
    profile: str | None = None
    config: str = ""
    stall_timeout_s: float = 300.0
    wait_for_nodes_s: float | None = None
    min_nodes: int = 1

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    @property
    def rank_port(self) -> int | None:
        """The port on node 0 for the ranks: that of the launchers, or the next one if they keep theirs."""
        if self.master_port is None or self.wait_for_nodes_s is None:
            return self.master_port
        return self.master_port + 1

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        first = self.node_rank * self.processes
        return range(first, first + self.processes)


def plan_processes(
    *, gpus: int | None, procs: int | None, visible: Sequence[Gpu], cores: int, environ: Mapping[str, str]
) -> Processes:
    """Decides on the device, the processes on this node, their GPUs and the CPU threads of each.

    `--gpus`, `--procs` and OMP_NUM_THREADS take precedence. The defaults are all visible GPUs, and an equal
    share of the cores.

    Raises:
        UsageError: the flags contradict each other, or the machine has fewer GPUs.
    """
    if gpus is not None and procs is not None:
        raise UsageError(
            "--gpus and --procs cannot be combined; use --gpus N or, to train on the CPU, --procs N"
        )
    if gpus is not None and gpus > len(visible):
        if not visible:
            raise UsageError(
                f"--gpus {gpus}: this machine has no usable GPU; train on the CPU with --procs N"
            )
        limit = environ.get("CUDA_VISIBLE_DEVICES")
        of = f" (CUDA_VISIBLE_DEVICES={limit})" if limit is not None else ""
        raise UsageError(
            f"--gpus {gpus}: this machine has only {len(visible)} visible{of}; lower --gpus, "
            "or use --procs N to train on the CPU"
        )
    on_gpu = procs is None and bool(visible)
    processes = (gpus or len(visible)) if on_gpu else (procs or 1)
    wanted = environ.get("OMP_NUM_THREADS") or str(max(1, cores // processes))
    if not re.fullmatch(r"0*[1-9][0-9]*", wanted):
        raise UsageError(f"OMP_NUM_THREADS={wanted}: expected a positive whole number; correct or unset it")
    if on_gpu:
        return Processes("cuda", processes, tuple(visible[:processes]), int(wanted))
    return Processes("cpu", processes, (), int(wanted))


def plan_nodes(
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    environ: Mapping[str, str],
) -> slurm_env.Node | None:
    """Returns the rank of this node and the address of node 0, from the flags or Slurm; None for one node.

    Raises:
        UsageError: a flag is missing or contradicts another.
    """
    if nodes is None:
        if node_rank is not None or master_addr is not None:
            raise UsageError("--node-rank and --master-addr need --nodes N")
        found = slurm_env.node(environ)
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
    return slurm_env.Node(nodes, node_rank, master_addr, master_port)


def plan_run_dir(name: str, node: slurm_env.Node | None, environ: Mapping[str, str]) -> Path | None:
    """Returns the default run folder if several nodes must agree on it; None for a single node.

    Raises:
        UsageError: outside Slurm, the nodes have no common name for it.
    """
    if node is None:
        return None
    if "SLURM_JOB_ID" not in environ:
        raise UsageError(f"--nodes {node.nodes} needs a --run-dir that all nodes share")
    return Path("runs") / name / f"slurm-{environ['SLURM_JOB_ID']}"


def plan_secret(run_dir: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Returns the file for the secret of a run, which all nodes know before they have read the config.

    `run_dir` is as on the command line. Returns None if the nodes have no common name for a file.
    """
    if run_dir is not None:
        return RunFolder(run_dir).secret
    job = slurm_env.allocation(environ)
    return None if job is None else Path("runs") / f".secret-{job.job}"


def worker_command(plan: LaunchPlan) -> list[str]:
    """Returns the module that every rank of a run executes, and its arguments."""
    # `accelerate launch` cannot pass on a single -.
    path = "/dev/stdin" if str(plan.config_path) == "-" else str(plan.config_path)
    worker = ["disttrain.worker", path, *plan.overrides, "--run-dir", str(plan.run_dir)]
    if plan.resume != "auto":
        worker += ["--resume", plan.resume]
    if plan.force:
        worker += ["--force"]
    if plan.profile:
        worker += ["--profile", plan.profile]
    return worker + {-1: ["--quiet"], 0: []}.get(plan.verbosity, ["--verbose"])


def command(plan: LaunchPlan, worker: Sequence[str] | None = None) -> list[str]:
    """Returns the command line that starts the processes of this node; `worker` replaces the run's module."""
    worker = worker_command(plan) if worker is None else worker
    if plan.world_size == 1:
        return [sys.executable, "-m", *worker]
    launch = [sys.executable, "-m", "disttrain.launch.accelerate_launch"]
    launch += ["--config_file", str(files("disttrain") / "assets" / "accelerate.yaml")]
    launch += ["--num_machines", str(plan.nodes), "--num_processes", str(plan.world_size)]
    launch += ["--num_cpu_threads_per_process", str(plan.threads)]
    launch += ["--log_dir", os.devnull]  # otherwise torchrun leaves a folder in /tmp when it is killed
    if plan.nodes > 1:
        launch += ["--machine_rank", str(plan.node_rank)]
        launch += ["--main_process_ip", str(plan.master_addr), "--main_process_port", str(plan.rank_port)]
    else:
        launch += ["--main_process_port", "0"]
    return [*launch, "--module", *worker]


def environment(plan: LaunchPlan) -> dict[str, str]:
    """Returns the environment variables to set for the command."""
    variables = {"OMP_NUM_THREADS": str(plan.threads)}
    if plan.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if plan.nodes == 1 and plan.world_size > 1:
        # torchrun then binds a free port itself. A port picked here could be taken before torchrun binds it.
        variables |= {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    return variables


def child_environment(plan: LaunchPlan, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the command: `environ` without the variables of another group of ranks.

    The secret of the launchers is left out too: the ranks do not need it, and programs report environments.
    """
    inherited = {name: value for name, value in environ.items() if not _RANK_VARIABLES.fullmatch(name)}
    inherited.pop(SECRET, None)
    return inherited | environment(plan)


def shell_line(plan: LaunchPlan) -> str:
    """Returns the command with its variables, as typed in a shell."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in environment(plan).items()]
    return " ".join([*assignments, shlex.join(command(plan))])


def rank_map(plan: LaunchPlan) -> list[tuple[int, str, str]]:
    """Returns (rank, host, device) for every rank; hosts and GPUs of other nodes are unknown here."""
    rows = []
    for rank in range(plan.world_size):
        node, local = divmod(rank, plan.processes)
        here = node == plan.node_rank
        device = f"cuda:{local}" if plan.device == "cuda" else "cpu"
        if here and plan.gpus:
            gpu = plan.gpus[local]
            place = f"NVML {gpu.index}, " if gpu.index >= 0 else ""
            device += f" ({place}{gpu.name}, {gpu.uuid})"
        rows.append((rank, socket.gethostname() if here else f"node {node}", device))
    return rows
