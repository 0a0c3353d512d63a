"""Before anything is started: the processes of this machine, all checks of a run, and where it begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from disttrain.config import Config
from disttrain.launch.plan import LaunchPlan, Processes, plan_processes
from disttrain.monitor.nvml import visible_gpus
from disttrain.parallel import usable_cores
from disttrain.preflight import check_machine, check_room, check_trackers, check_weights
from disttrain.runs.fingerprint import fingerprint
from disttrain.runs.resume import Start, is_finished, resume_point
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index


@dataclass(frozen=True)
class Ready:
    """A run that has passed all checks.

    Attributes:
        index: of its data set.
        folder: locked by this process if there is a run in it.
        start: where it begins; None on the nodes but the first one, which decides that.
    """

    index: Index
    folder: RunFolder
    start: Start | None


def processes_here(*, gpus: int | None, procs: int | None) -> Processes:
    """Returns what `plan_processes` decides here; arguments and errors as there."""
    return plan_processes(
        gpus=gpus,
        procs=procs,
        visible=[] if procs else visible_gpus(),
        cores=usable_cores(),
        environ=os.environ,
    )


def prepare(plan: LaunchPlan, config: Config, *, dry_run: bool, say: Callable[[str], None]) -> Ready | None:
    """Checks config, machine, data set and run folder against one another; every node calls this.

    Returns None if the run in the folder has finished already. A dry run leaves the folder as it is.

    Raises:
        DisttrainError: what is wrong, and how to put it right.
    """
    index = check_machine(config, plan.device, plan.processes, plan.world_size, say)
    folder = RunFolder(plan.run_dir)
    unknown = config.data.on_error == "skip"  # what is skipped is found by the workers
    own = fingerprint(config, index, None if unknown else ())
    if plan.resume == "auto" and is_finished(folder, own):
        return None
    if plan.node_rank:
        return Ready(index, folder, None)
    check_trackers(config)
    check_weights(config)
    if folder.is_run() and not dry_run:
        folder.create()  # its lock: what a run that goes on there does meanwhile is no damage
    start = resume_point(folder, plan.resume, own, force=plan.force)
    check_room(folder.path, start.checkpoint)
    return Ready(index, folder, start)
