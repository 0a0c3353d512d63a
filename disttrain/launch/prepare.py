"""Everything before the launch: the processes of this machine, all checks of a run, and its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from disttrain.config import Config
from disttrain.launch.plan import LaunchPlan, Processes, plan_processes
from disttrain.models.weights import check_weights
from disttrain.monitor.nvml import lost_gpus, trouble, unusable_gpus, visible_gpus
from disttrain.parallel import usable_cores
from disttrain.preflight import check_machine, check_mirror, check_room, check_trackers
from disttrain.runs.fingerprint import fingerprint
from disttrain.runs.resume import Start, is_finished, resume_point
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index


@dataclass(frozen=True)
class Ready:
    """A run that has passed all checks.

    Attributes:
        index: the index of its data set.
        folder: the run folder, locked by this process if it contains a run.
        start: the checkpoint to resume from; None except on node 0, which decides on it.
    """

    index: Index
    folder: RunFolder
    start: Start | None


def processes_here(*, gpus: int | None, procs: int | None) -> Processes:
    """Returns the result of `plan_processes` for this machine; arguments and errors as there."""
    return plan_processes(
        gpus=gpus,
        procs=procs,
        visible=[] if procs else visible_gpus(),
        cores=usable_cores(),
        environ=os.environ,
    )


def say_gpu_troubles(device: str, procs: int | None, say: Callable[[str], object]) -> None:
    """Says what a user should know of this machine's GPUs before processes start.

    Args:
        device: that the processes will use, cuda or cpu.
        procs: as on the command line; with it the GPUs are not wanted.
        say: called with each line.
    """
    if procs is not None:
        return
    for gpu in lost_gpus():
        lost = f"GPU {gpu.index} of this machine is lost (NVML: {gpu.lost})"
        say(f"{lost} and is not used; run `disttrain doctor`")
    if device == "cuda" and (why := trouble()) is not None:
        say(f"no readings of the GPUs: {why.text}; run `disttrain doctor`")
    if device == "cpu" and (problem := unusable_gpus()):
        say(
            f"training on the CPU, although this machine has GPUs ({problem}); run `disttrain doctor`, "
            "or use --procs N to train on the CPU on purpose"
        )


def check_run(plan: LaunchPlan, config: Config, *, dry_run: bool, say: Callable[[str], None]) -> Ready | None:
    """Checks that config, machine, data set and run folder fit together. Every node calls this.

    A dry run does not change the folder.

    Returns:
        The checked run, or None if the run in the folder has already finished.

    Raises:
        DisttrainError: a check failed.
    """
    index = check_machine(config, plan.device, plan.processes, plan.world_size, say)
    folder = RunFolder(plan.run_dir)
    unknown = config.data.on_error == "skip"  # the workers find out which samples are skipped
    own = fingerprint(config, index, None if unknown else ())
    if plan.resume == "auto" and is_finished(folder, own):
        return None
    if plan.node_rank:
        return Ready(index, folder, None)
    check_trackers(config)
    check_mirror(config)
    check_weights(config.model)
    if folder.is_run() and not dry_run:
        folder.create()  # takes its lock, so that no other run changes the checkpoints while we read them
    start = resume_point(folder, plan.resume, own, force=plan.force)
    check_room(folder.path, start.checkpoint)
    return Ready(index, folder, start)
