"""Everything before the first run of a sweep: its plan, all checks, and which runs are left to train."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from disttrain.config import Config, config_text
from disttrain.launch.prepare import say_gpu_troubles
from disttrain.models import check_model_name
from disttrain.monitor.nvml import visible_gpus
from disttrain.parallel import usable_cores
from disttrain.preflight import check_device, check_reproducible, check_trackers, open_index, split_batch
from disttrain.sweep.folder import SweepFolder
from disttrain.sweep.plan import Plan, PlannedRun, check_same, make_plan
from disttrain.sweep.running import Place, share_machine


@dataclass(frozen=True)
class Ready:
    """A sweep that has passed all checks.

    Attributes:
        folder: of the sweep; need not exist.
        name: of the experiment.
        text: of the config file.
        plan: all runs.
        left: the runs that have not finished, with their configs.
    """

    folder: SweepFolder
    name: str
    text: str
    plan: Plan
    left: list[tuple[PlannedRun, Config]]


def places_here(jobs: int, gpus: int | None, procs: int | None, say: Callable[[str], None]) -> list[Place]:
    """Returns the result of `share_machine` for this machine; arguments and errors as there."""
    visible = [] if procs else visible_gpus()
    places = share_machine(
        jobs, gpus=gpus, procs=procs, visible=visible, cores=usable_cores(), environ=os.environ
    )
    say_gpu_troubles(places[0].processes.device, procs, say)
    return places


def prepare(
    config_path: Path,
    overrides: Sequence[str],
    *,
    draws: int | None,
    draw_seed: int,
    sweep_dir: Path | None,
    place: Place | None,
    say: Callable[[str], None],
) -> Ready:
    """Plans a sweep and checks all of its runs; changes nothing in its folder.

    Args:
        config_path: the YAML file; `-` is the standard input.
        overrides: as for `plan_runs`.
        draws: as for `plan_runs`.
        draw_seed: as for `plan_runs`.
        sweep_dir: None means a new folder.
        place: where each run trains; None means on another machine.
        say: prints a line.

    Raises:
        DisttrainError: a check failed.
    """

    def check(config: Config) -> None:
        check_model_name(config.model.name)
        if place is not None:
            check_device(config, place.processes.device)
            check_reproducible(config.train)
            check_trackers(config)
            split_batch(config, place.processes.processes)

    text, source = config_text(config_path)
    plan, configs = make_plan(text, source, overrides, draws=draws, draw_seed=draw_seed, check=check)
    if place is not None:
        for config in {config.data.model_dump_json(): config for config in configs}.values():
            open_index(config, say)
    name = configs[0].name
    folder = SweepFolder(sweep_dir or Path("runs") / name / "sweep-<UTC time>")
    folder.check_free()
    if folder.is_sweep():
        check_same(str(folder.path), folder.read(), plan, configs)
    runs = zip(plan.runs, configs, strict=True)
    left = [(run, config) for run, config in runs if not folder.is_finished(run.name, config)]
    return Ready(folder, name, text, plan, left)
