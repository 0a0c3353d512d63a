"""Shared by several commands: options, a progress bar, and the checks before a measurement."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from disttrain.terminal import is_animated

if TYPE_CHECKING:
    from disttrain.config import Config
    from disttrain.launch.plan import LaunchPlan
    from disttrain.shards.index import Index

_F = TypeVar("_F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)
ROOT = click.option("--root", help="Folder of the data sets (default: $DISTTRAIN_DATA or the user's cache).")
SECONDS = click.option("--seconds", type=POSITIVE, default=2, help="Length of each measurement in seconds.")

REPORT = click.option(
    "--report/--no-report",
    default=True,
    envvar="DISTTRAIN_REPORT",
    help="Write report.html when the run has finished or failed.",
)


def options(*decorators: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Returns a decorator that adds several options, which --help lists in this order."""

    def add(function: _F) -> _F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


NODE = options(
    click.option("--node-rank", type=click.IntRange(0), help="Rank of this node, 0 to nodes - 1."),
    click.option("--master-addr", metavar="HOST", help="Address of node 0."),
    click.option("--master-port", type=click.IntRange(1, 65535), help="A free port on node 0."),
)
PROCESSES = options(
    click.option("--gpus", type=COUNT, help="GPUs to use (default: all visible)."),
    click.option("--procs", type=COUNT, help="CPU processes, instead of GPUs (default: 1)."),
)


def ready_to_measure(config: Config, gpus: int | None, procs: int | None) -> tuple[LaunchPlan, Index]:
    """Returns the processes to measure an experiment with, and the index of its data set.

    Raises:
        DisttrainError: config, machine or data set do not fit together.
    """
    from disttrain.launch.jobs import plan_job
    from disttrain.launch.prepare import say_gpu_troubles
    from disttrain.models import check_model_name
    from disttrain.models.weights import check_weights
    from disttrain.preflight import check_machine

    check_model_name(config.model.name)
    plan = plan_job(gpus=gpus, procs=procs)
    say_gpu_troubles(plan.device, procs, aside)
    check_weights(config.model)
    return plan, check_machine(config, plan.device, plan.processes, plan.world_size, aside)


def say(text: str) -> None:
    """Prints a line, unless the terminal or pipe was closed: that must not change how a run ends."""
    with contextlib.suppress(OSError):
        click.echo(text)


def aside(text: str) -> None:
    """Prints a line to standard error, apart from the results; not if it was closed."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


@contextlib.contextmanager
def progress(*, disable: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Yields a function that shows progress (done, total) as a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed:,} images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # output to a file or a pipe must not go through the console
        disable=disable or not is_animated(sys.stderr),
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
