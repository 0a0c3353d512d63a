"""Runs a function in several processes outside any run, and returns its result or raises its first error.

`plan_job` decides on the processes and `run_job` starts them. Each process calls `serve` with the function.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.errors import DisttrainError, TrainingError, error_of
from disttrain.files import write_atomically
from disttrain.launch.plan import LaunchPlan, child_environment, command
from disttrain.launch.prepare import processes_here
from disttrain.lifetime import end_with_parent
from disttrain.runs.runfolder import RunFolder
from disttrain.terminal import hide_pillow_warnings

Values = dict[str, Any]


def plan_job(*, gpus: int | None, procs: int | None) -> LaunchPlan:
    """Returns a plan for processes on this node, outside any run.

    Args:
        gpus: how many to use; None means all visible ones.
        procs: processes on the CPU, instead of GPUs.

    Raises:
        UsageError: the machine has fewer GPUs.
    """
    return LaunchPlan(Path(), (), Path(), "never", *processes_here(gpus=gpus, procs=procs))


def run_job(plan: LaunchPlan, module: str, request: Mapping[str, Any]) -> Values:
    """Runs a module that calls `serve` in the processes of a plan, and returns the result of rank 0.

    Args:
        plan: device and processes, on a single node.
        module: its name.
        request: JSON values for every rank.

    Raises:
        DisttrainError: the error of the first rank that failed, or a process died without one.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            command(plan, [module, name]),
            env=child_environment(plan, os.environ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if (error := RunFolder(folder).first_error()) is not None:
            if error["traceback"] is None:
                raise error_of(error["exit_code"], error["message"])
            raise DisttrainError(f"rank {error['rank']} failed\n{error['traceback']}")
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-30:])
            raise TrainingError(f"{module} ended with exit code {done.returncode}\n{last}")
        result: Values = json.loads((folder / "result.json").read_text())
        return result


def serve(answer: Callable[[Values], Values]) -> None:
    """Runs a function as one rank of a job, then exits this process. Every rank calls this."""
    end_with_parent()
    hide_pillow_warnings()
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    code = 0
    try:
        result = answer(json.loads((folder / "request.json").read_text()))
        if rank == 0:
            write_atomically(folder / "result.json", json.dumps(result))
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:
        RunFolder(folder).write_error(rank, error)
        code = 1
    sys.stderr.flush()
    os._exit(code)  # does not wait for the threads of a broken process group
