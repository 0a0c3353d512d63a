"""`disttrain bench`: measures the phases of a training step on this machine, and compares settings.

Starts the processes that measure (`disttrain.bench.worker`), one group after the other, and formats their
results. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.table import Column, Table

from disttrain.config import Config
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
"""The config that is measured by default, with the built-in digits."""


def bench(
    config: Config, plan: LaunchPlan, *, seconds: float, cores: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures a config in the processes of a plan, and the step time with other numbers of processes.

    Args:
        config: the experiment.
        plan: device and processes, on a single node.
        seconds: least length of each measurement.
        cores: CPU cores that the processes share.
        say: called with messages for the user.

    Returns:
        The output of `disttrain bench --json`.
    """

    def measured(plan: LaunchPlan, what: str) -> dict[str, Any]:
        many = f"{plan.processes} process{'es' * (plan.processes > 1)}"
        say(f"measuring a step of {config.model.name} in {many}")
        request = {"config": config.model_dump(mode="json"), "what": what, "seconds": seconds}
        return run_job(plan, "disttrain.bench.worker", request)

    most = plan.processes if plan.gpus else max(plan.processes, min(cores, 8))
    counts = [n for n in range(1, most + 1) if n in {plan.processes, most} or n & (n - 1) == 0]
    parts = config.train.batch_size // config.train.accumulate
    results = measured(plan, "all")
    scaling = []
    for count in counts:
        if parts % count:
            continue
        found = results
        if count != plan.processes:
            here = plan_processes(
                gpus=count if plan.gpus else None,
                procs=None if plan.gpus else count,
                visible=plan.gpus,
                cores=cores,
                environ={},
            )
            found = measured(replace(plan, **here._asdict()), "step")
        rate = config.train.batch_size / found["step_s"]
        scaling.append({"processes": count, "threads": found["threads"], "images_per_s": rate})
    return {"model": config.model.name, "data": config.data.name, **results, "scaling": scaling}


def tables(results: dict[str, Any]) -> list[Table]:
    """Returns the results as tables for a terminal."""
    step_s, batch = results["step_s"], results["batch"]
    step = _table("a training step, phase by phase", "phase", "ms", "share")
    total = sum(results["phases_s"].values())
    for name, seconds in results["phases_s"].items():
        step.add_row(name.replace("_", " "), f"{1e3 * seconds:,.3f}", percent(seconds / total, 1))
    step.add_row("sum of the phases", f"{1e3 * total:,.3f}", "", style="dim")
    step.add_row("normal training loop", f"{1e3 * step_s:,.3f}", "")
    data = _table("throughput", "samples", "ms per step", "images/s")
    for name, seconds in (("from the data set", step_s), ("one batch replayed", results["replayed_step_s"])):
        data.add_row(name, f"{1e3 * seconds:,.3f}", f"{batch / seconds:,.0f}")
    columns = ("precision", "channels_last", "compile", "ms per pass", "images/s per process")
    settings = _table("forward and backward", *columns)
    for row in results["table"]:
        names = (row["precision"], str(row["channels_last"]).lower(), str(row["compile"]).lower())
        if row["pass_s"] is None:
            settings.add_row(*names, "n/a", row["error"], style="dim")
        else:
            figures = (f"{1e3 * row['pass_s']:,.3f}", f"{row['images_per_s']:,.0f}")
            settings.add_row(*names, *figures, style="bold" if row is _fastest(results) else "")
    scaling = _table("scaling", "processes", "threads each", "images/s", "efficiency")
    first = results["scaling"][0]
    for row in results["scaling"]:
        efficiency = row["images_per_s"] / first["images_per_s"] * first["processes"] / row["processes"]
        cells = (row["processes"], row["threads"], f"{row['images_per_s']:,.0f}", percent(efficiency, 0))
        scaling.add_row(*map(str, cells))
    return [step, data, settings, scaling]


def _table(title: str, first: str, *others: str) -> Table:
    columns = (Column(name, justify="right") for name in others)
    return Table(first, *columns, title=title, title_justify="left")


def _fastest(results: dict[str, Any]) -> dict[str, Any]:
    timed: list[dict[str, Any]] = [row for row in results["table"] if row["pass_s"] is not None]
    return min(timed, key=lambda row: row["pass_s"])


def summary(results: dict[str, Any]) -> list[str]:
    """Returns lines on FLOPs and settings."""
    lines = [_arithmetic(results)]
    best = _fastest(results)
    settings = (f"train.{key}={str(best[key]).lower()}" for key in ("precision", "channels_last", "compile"))
    lines.append(f"fastest here: {' '.join(settings)}")
    lines += [f"a run chooses {key} {reason}" for key, reason in results["choices"].items()]
    return lines


def _arithmetic(results: dict[str, Any]) -> str:
    if results["flops_per_image"] is None:
        return "the FLOPs of this model are unknown: it has layers that are not counted"
    text = (
        f"{results['flops_per_image'] / 1e6:,.1f} MFLOP per image, forward and backward; "
        f"{flops_text(results['flops_per_s_and_device'])} per device"
    )
    if results["share_of_peak"] is None:
        return f"{text}; peak n/a ({results['peak_source']})"
    share = 100 * results["share_of_peak"]
    return f"{text} = {share:.1f} % of {flops_text(results['peak_flops_per_s'])} ({results['peak_source']})"
