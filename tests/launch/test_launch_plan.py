"""Plans and their command lines, by exact values."""

import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from disttrain.errors import UsageError
from disttrain.launch import plan as planning
from disttrain.launch.plan import plan_nodes, plan_processes
from disttrain.monitor.nvml import Gpu
from disttrain.slurm_env import Node
from kit.plans import ONE

GPUS = tuple(Gpu(index, f"GPU-{index}", "NVIDIA H100", 81559) for index in (3, 1))
TWO = replace(ONE, processes=2, threads=1)
FOUR = replace(ONE, processes=4, threads=1)
TWO_GPUS = replace(ONE, device="cuda", processes=2, gpus=GPUS)
SECOND_NODE = replace(TWO_GPUS, nodes=2, node_rank=1, master_addr="gpu03", master_port=29500)
WORKER = ["disttrain.worker", "a.yaml", "--run-dir", "runs/a"]
HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("gpus", "procs", "visible", "environ", "expected"),
    [
        (None, None, (), {}, ("cpu", 1, (), 8)),
        (None, None, GPUS, {}, ("cuda", 2, GPUS, 4)),
        (1, None, GPUS, {}, ("cuda", 1, GPUS[:1], 8)),
        (2, None, GPUS, {}, ("cuda", 2, GPUS, 4)),
        (None, 2, GPUS, {}, ("cpu", 2, (), 4)),
        (None, 3, (), {}, ("cpu", 3, (), 2)),
        (None, 16, (), {}, ("cpu", 16, (), 1)),
        (None, 2, (), {"OMP_NUM_THREADS": "3"}, ("cpu", 2, (), 3)),
        (None, 2, (), {"OMP_NUM_THREADS": ""}, ("cpu", 2, (), 4)),
    ],
)
def test_processes_of_a_node(gpus, procs, visible, environ, expected):
    assert plan_processes(gpus=gpus, procs=procs, visible=visible, cores=8, environ=environ) == expected


@pytest.mark.parametrize(
    ("gpus", "procs", "visible", "environ", "message"),
    [
        (1, 1, GPUS, {}, "--gpus and --procs cannot be combined; use --gpus N or, "
                         "to train on the CPU, --procs N"),
        (1, None, (), {}, "--gpus 1: this machine has no usable GPU; train on the CPU with --procs N"),
        (4, None, GPUS, {}, "--gpus 4: this machine has only 2 visible; lower --gpus, "
                            "or use --procs N to train on the CPU"),
        (4, None, GPUS, {"CUDA_VISIBLE_DEVICES": "3,1"},
         "--gpus 4: this machine has only 2 visible (CUDA_VISIBLE_DEVICES=3,1); lower --gpus, "
         "or use --procs N to train on the CPU"),
        (None, 1, (), {"OMP_NUM_THREADS": "4,2"},
         "OMP_NUM_THREADS=4,2: expected a positive whole number; correct or unset it"),
        (None, 1, (), {"OMP_NUM_THREADS": "0"},
         "OMP_NUM_THREADS=0: expected a positive whole number; correct or unset it"),
    ],
)  # fmt: skip
def test_what_a_node_does_not_have(gpus, procs, visible, environ, message):
    with pytest.raises(UsageError) as caught:
        plan_processes(gpus=gpus, procs=procs, visible=visible, cores=8, environ=environ)
    assert str(caught.value) == message


def nodes(nodes=None, node_rank=None, master_addr=None, master_port=None, environ=()):
    return plan_nodes(
        nodes=nodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        environ=dict(environ),
    )


def slurm_step(nodes, rank):
    """Returns the variables of a task on one of several nodes."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[03-09]",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes),
        "SLURM_NODEID": str(rank),
    }


def test_a_single_node_needs_no_place():
    assert nodes() is None
    assert nodes(nodes=1) is None
    assert nodes(nodes=1, node_rank=0, master_addr="gpu03") is None
    assert nodes(environ=slurm_step(1, 0)) is None
    assert nodes(nodes=1, environ=slurm_step(2, 1)) is None


def test_the_place_of_a_node_from_the_flags():
    assert nodes(2, 1, "gpu03", 1234) == Node(2, 1, "gpu03", 1234)
    assert nodes(2, 0, "gpu07", 1234, environ=slurm_step(3, 1)) == Node(2, 0, "gpu07", 1234)


def test_the_place_of_a_node_from_slurm():
    place = nodes(environ=slurm_step(2, 1))
    assert place is not None
    assert place[:3] == (2, 1, "gpu03")
    assert nodes(master_port=1234, environ=slurm_step(2, 1)) == place._replace(master_port=1234)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"node_rank": 1}, "--node-rank and --master-addr need --nodes N"),
        ({"master_addr": "gpu03"}, "--node-rank and --master-addr need --nodes N"),
        ({"nodes": 2},
         "--nodes 2 needs --node-rank R (0..1), --master-addr HOST (node 0) and --master-port PORT"),
        ({"nodes": 2, "node_rank": 0, "master_addr": "gpu03"},
         "--nodes 2 needs --node-rank R (0..1), --master-addr HOST (node 0) and --master-port PORT"),
        ({"nodes": 2, "node_rank": 2, "master_addr": "gpu03", "master_port": 1234},
         "--node-rank 2: with --nodes 2 it must be below 2"),
        ({"nodes": 1, "node_rank": 1}, "--node-rank 1: with --nodes 1 it must be below 1"),
    ],
)  # fmt: skip
def test_flags_of_nodes_that_do_not_fit(flags, message):
    with pytest.raises(UsageError) as caught:
        nodes(**flags)
    assert str(caught.value) == message


# --- Command lines ----------------------------------------------------------------------------------


def accelerate(*arguments):
    config_file = Path(planning.__file__).parents[1] / "assets" / "accelerate.yaml"
    assert config_file.exists()
    return [
        sys.executable,
        "-m",
        "disttrain.launch.accelerate_launch",
        "--config_file",
        str(config_file),
        *arguments,
    ]


@pytest.mark.parametrize(
    ("plan", "command"),
    [
        (ONE, [sys.executable, "-m", *WORKER]),
        (replace(ONE, device="cuda", gpus=GPUS[:1]), [sys.executable, "-m", *WORKER]),
        (replace(ONE, verbosity=-1), [sys.executable, "-m", *WORKER, "--quiet"]),
        (replace(ONE, verbosity=1), [sys.executable, "-m", *WORKER, "--verbose"]),
        (replace(ONE, profile="all"), [sys.executable, "-m", *WORKER, "--profile", "all"]),
        (replace(ONE, resume="never"), [sys.executable, "-m", *WORKER, "--resume", "never"]),
        (
            replace(ONE, overrides=("optim.lr=0.1", "name=x y")),
            [sys.executable, "-m", "disttrain.worker", "a.yaml", "optim.lr=0.1", "name=x y", *WORKER[2:]],
        ),
        (
            FOUR,
            accelerate("--num_machines", "1", "--num_processes", "4", "--num_cpu_threads_per_process", "1",
                       "--log_dir", "/dev/null", "--main_process_port", "0", "--module", *WORKER),
        ),
        (
            replace(SECOND_NODE, resume="runs/b", verbosity=1),
            accelerate("--num_machines", "2", "--num_processes", "4", "--num_cpu_threads_per_process", "4",
                       "--log_dir", "/dev/null", "--machine_rank", "1", "--main_process_ip", "gpu03",
                       "--main_process_port", "29500", "--module", *WORKER, "--resume", "runs/b",
                       "--verbose"),
        ),
        (
            replace(SECOND_NODE, processes=1, node_rank=0),
            accelerate("--num_machines", "2", "--num_processes", "2", "--num_cpu_threads_per_process", "4",
                       "--log_dir", "/dev/null", "--machine_rank", "0", "--main_process_ip", "gpu03",
                       "--main_process_port", "29500", "--module", *WORKER),
        ),
    ],
)  # fmt: skip
def test_the_command_of_a_plan(plan, command):
    assert planning.command(plan) == command


@pytest.mark.parametrize(
    ("plan", "variables"),
    [
        (ONE, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}),
        (replace(ONE, device="cuda", gpus=GPUS[:1]), {"OMP_NUM_THREADS": "4"}),
        (TWO_GPUS, {"OMP_NUM_THREADS": "4", "PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}),
        (SECOND_NODE, {"OMP_NUM_THREADS": "4"}),
        (
            FOUR,
            {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PET_STANDALONE": "1",
             "PET_LOCAL_ADDR": "127.0.0.1"},
        ),
    ],
)  # fmt: skip
def test_the_environment_of_a_plan(plan, variables):
    assert planning.environment(plan) == variables


@pytest.mark.parametrize(
    "name",
    [
        *("RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "PMIX_RANK", "PET_NNODES", "SLURM_STEP_ID"),
        "DISTTRAIN_SECRET",
    ],
)
def test_the_variables_of_another_group_and_the_secret_are_dropped(name):
    kept = {"HOME": "/home/me", "SLURM_JOB_ID": "5", "LOCAL_SCRATCH": "/fast", "NCCL_DEBUG": "INFO"}
    assert planning.child_environment(ONE, kept | {name: "1"}) == kept | planning.environment(ONE)


def test_the_shell_line_reads_back_as_command_and_environment():
    plan = replace(FOUR, overrides=("name=it's $HOME", "model.args.x=[1, 2]"), run_dir=Path("my runs/<now>"))
    words = shlex.split(planning.shell_line(plan))
    variables, command = words[:4], words[4:]
    assert command == planning.command(plan)
    assert dict(word.split("=", 1) for word in variables) == planning.environment(plan)


def test_the_ranks_of_a_node_and_their_gpus():
    assert planning.rank_map(ONE) == [(0, HOST, "cpu")]
    assert planning.rank_map(TWO_GPUS) == [
        (0, HOST, "cuda:0 (NVML 3, NVIDIA H100, GPU-3)"),
        (1, HOST, "cuda:1 (NVML 1, NVIDIA H100, GPU-1)"),
    ]


def test_the_ranks_of_other_nodes():
    assert planning.rank_map(SECOND_NODE) == [
        (0, "node 0", "cuda:0"),
        (1, "node 0", "cuda:1"),
        (2, HOST, "cuda:0 (NVML 3, NVIDIA H100, GPU-3)"),
        (3, HOST, "cuda:1 (NVML 1, NVIDIA H100, GPU-1)"),
    ]
