"""Work of a group of processes outside of any run: started, and its result or first error brought back.

`plan_job` says which processes, `run_job` starts them; each of them calls `serve` with the function to run.
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

Values = dict[str, Any]


def plan_job(*, gpus: int | None, procs: int | None) -> LaunchPlan:
    """Returns a plan for processes of this node, of no run: on so many GPUs, on all visible ones, or on CPUs.

    Raises:
        UsageError: the machine does not have what is asked for.
    """
    return LaunchPlan(Path(), (), Path(), "never", *processes_here(gpus=gpus, procs=procs))


def run_job(plan: LaunchPlan, module: str, request: Mapping[str, Any]) -> Values:
    """Runs a module that calls `serve` in the processes of a plan and returns what its rank 0 has found.

    Args:
        plan: device and processes; a single node.
        module: its name.
        request: JSON values, handed to every rank.

    Raises:
        DisttrainError: as the first rank to fail has raised it, or a process died without a word.
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
    """Runs a function as one rank of a job, leaves the group and ends this process. Every rank calls this."""
    end_with_parent()
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
    os._exit(code)  # without waiting for the threads of a broken process group
