"""`disttrain bench`: where the time of a training step goes on this machine, and which settings suit it.

Starts the processes that measure (`disttrain.measure.bench_worker`), one group after the other, and shows
what they found. Nothing here imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from disttrain.config import Config, dump_config
from disttrain.launch.jobs import run_job
from disttrain.launch.plan import LaunchPlan, plan_processes
from disttrain.units import flops_text, percent

DEFAULT = {
    "name": "bench",
    "data": {"name": "digits"},
    "model": {"name": "cnn_mnist"},
    "train": {"epochs": 1, "batch_size": 64},
    "optim": {"name": "sgd", "lr": 1e-3},
}
"""What is measured without a config: the embedded digits."""


def bench(
    config: Config, plan: LaunchPlan, *, seconds: float, cores: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures a config on the processes of a plan, and the step time on other numbers of them.

    Args:
        config: the experiment.
        plan: device and processes; a single node.
        seconds: that each measurement takes at least.
        cores: CPU cores that the processes share.
        say: told what is measured.

    Returns:
        What `disttrain bench --json` prints.

    Raises:
        DisttrainError: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config))
        most = plan.processes if plan.gpus else max(plan.processes, min(cores, 8))
        counts = [n for n in range(1, most + 1) if n in {plan.processes, most} or n & (n - 1) == 0]
        parts = config.train.batch_size // config.train.accumulate
        say(f"measuring a step of {config.model.name} in {_many(plan.processes)}")
        results = _measured(replace(plan, config_path=path), "all", seconds)
        scaling = []
        for count in counts:
            if parts % count:
                continue
            if count == plan.processes:
                found = results
            else:
                say(f"measuring {_many(count)}")
                _, _, gpus, threads = plan_processes(
                    gpus=count if plan.gpus else None,
                    procs=None if plan.gpus else count,
                    visible=plan.gpus,
                    cores=cores,
                    environ={},
                )
                fewer = replace(plan, config_path=path, processes=count, gpus=gpus, threads=threads)
                found = _measured(fewer, "step", seconds)
            rate = config.train.batch_size / found["step_s"]
            scaling.append({"processes": count, "threads": found["threads"], "images_per_s": rate})
    return {"model": config.model.name, "data": config.data.name, **results, "scaling": scaling}


def tables(results: dict[str, Any]) -> list[Table]:
    """Returns the results as tables for a terminal."""
    step_s, batch = results["step_s"], results["batch"]
    step = Table("phase", "ms", "share", title="a training step, phase by phase", title_justify="left")
    total = sum(results["phases_s"].values())
    for name, seconds in results["phases_s"].items():
        step.add_row(name.replace("_", " "), f"{1e3 * seconds:,.3f}", percent(seconds / total, 1))
    step.add_row("one after the other", f"{1e3 * total:,.3f}", "", style="dim")
    step.add_row("the ordinary loop", f"{1e3 * step_s:,.3f}", "")
    data = Table("samples", "ms a step", "images/s", title="throughput", title_justify="left")
    for name, seconds in (("from the data set", step_s), ("one batch replayed", results["replayed_step_s"])):
        data.add_row(name, f"{1e3 * seconds:,.3f}", f"{batch / seconds:,.0f}")
    settings = Table(
        "precision", "channels_last", "compile", "ms a pass", "images/s and process",
        title="forward and backward", title_justify="left",
    )  # fmt: skip
    timed = [row["pass_s"] for row in results["table"] if row["pass_s"] is not None]
    for row in results["table"]:
        names = (row["precision"], str(row["channels_last"]).lower(), str(row["compile"]).lower())
        if row["pass_s"] is None:
            settings.add_row(*names, "n/a", row["error"], style="dim")
        else:
            best = row["pass_s"] == min(timed)
            figures = (f"{1e3 * row['pass_s']:,.3f}", f"{row['images_per_s']:,.0f}")
            settings.add_row(*names, *figures, style="bold" if best else "")
    scaling = Table(
        "processes", "threads each", "images/s", "efficiency", title="scaling", title_justify="left"
    )
    first = results["scaling"][0]
    for row in results["scaling"]:
        efficiency = row["images_per_s"] / first["images_per_s"] * first["processes"] / row["processes"]
        cells = (row["processes"], row["threads"], f"{row['images_per_s']:,.0f}", percent(efficiency, 0))
        scaling.add_row(*map(str, cells))
    for table in (step, data, settings, scaling):
        for column in table.columns[1:]:
            column.justify = "right"
    return [step, data, settings, scaling]


def summary(results: dict[str, Any]) -> list[str]:
    """Returns lines on arithmetic and settings."""
    lines = [_arithmetic(results)]
    timed = [row for row in results["table"] if row["pass_s"] is not None]
    best = min(timed, key=lambda row: row["pass_s"])
    settings = (f"train.{key}={str(best[key]).lower()}" for key in ("precision", "channels_last", "compile"))
    lines.append(f"fastest here: {' '.join(settings)}")
    lines += [f"a run chooses {key} {reason}" for key, reason in results["choices"].items()]
    return lines


def _measured(plan: LaunchPlan, what: str, seconds: float) -> dict[str, Any]:
    request = {"config": str(plan.config_path), "what": what, "seconds": seconds}
    return run_job(plan, "disttrain.measure.bench_worker", request)


def _many(processes: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}"


def _arithmetic(results: dict[str, Any]) -> str:
    if results["flops_per_image"] is None:
        return "the arithmetic of this model is not known: it has layers that are not counted"
    text = (
        f"{results['flops_per_image'] / 1e6:,.1f} MFLOP an image, forward and backward; "
        f"{flops_text(results['flops_per_s_and_device'])} on each device"
    )
    if results["share_of_peak"] is None:
        return f"{text}; peak n/a ({results['peak_source']})"
    share = 100 * results["share_of_peak"]
    return f"{text} = {share:.1f} % of {flops_text(results['peak_flops_per_s'])} ({results['peak_source']})"
