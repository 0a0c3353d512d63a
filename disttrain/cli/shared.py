"""What several commands share: options, and a progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from disttrain.terminal import is_animated

PATH = click.Path(path_type=Path)
ROOT = click.option("--root", help="Folder of the data sets (default: $DISTTRAIN_DATA or the user's cache).")


@contextlib.contextmanager
def progress(*, disable: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a bar, a count of images and the time left on a terminal, nothing elsewhere or if disabled."""
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
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe is not for the console
        disable=disable or not is_animated(sys.stderr),
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
