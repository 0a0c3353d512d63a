"""The command sweep."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from disttrain.cli.shared import COUNT, PATH, REPORT, aside, say
from disttrain.errors import StoppedError, UsageError

if TYPE_CHECKING:
    from disttrain.sweep.prepare import Ready
    from disttrain.sweep.running import Place


@click.command()
@click.argument("config_path", metavar="CONFIG", type=PATH)
@click.argument("overrides", metavar="KEY=VALUE...", nargs=-1, required=True)
@click.option("--draws", type=COUNT, metavar="N", help="Train N random settings instead of all combinations.")
@click.option("--draw-seed", type=click.IntRange(0), default=0, help="Seed of the random settings.")
@click.option("--sweep-dir", type=PATH, help="Folder of the sweep (default: runs/<name>/sweep-<UTC time>).")
@click.option("--jobs", type=COUNT, help="Runs at a time (default: 1; with --slurm, no limit).")
@click.option("--gpus", type=COUNT, help="GPUs of each run (default: an equal share of the visible ones).")
@click.option("--procs", type=COUNT, help="CPU processes of each run, instead of GPUs.")
@click.option("--slurm", is_flag=True, help="Submit the runs as one Slurm job array, and do not wait for it.")
@click.option("--sbatch", metavar="OPTIONS", help="Options of sbatch, in one pair of quotes.")
@click.option("--script", type=PATH, default=Path("slurm/train.sh"), help="The script of each Slurm job.")
@click.option("--dry-run", is_flag=True, help="Print the commands and start nothing.")
@REPORT
@click.option("-q", "--quiet", is_flag=True, help="Show only the outcome.")
def sweep(
    config_path: Path,
    overrides: tuple[str, ...],
    sweep_dir: Path | None,
    jobs: int | None,
    gpus: int | None,
    procs: int | None,
    slurm: bool,
    sbatch: str | None,
    script: Path,
    dry_run: bool,
    report: bool,
    quiet: bool,
    **draw: Any,
) -> None:
    """Train the experiment in CONFIG with many settings, and compare them.

    A key may have several values: optim.lr=0.05,0.1 or seed=0..4. By default, every combination is trained.
    With --draws, a key may also have a range: uniform(0,0.5) or loguniform(0.01,1). Each random setting is
    trained with every seed.

    To resume a sweep or to add runs, give the command again, with the folder as --sweep-dir. Finished runs
    are not repeated.
    """
    from disttrain.runs.runfolder import new_run_path
    from disttrain.sweep.folder import SweepFolder
    from disttrain.sweep.prepare import places_here, prepare

    if slurm and not script.is_file():
        raise UsageError(f"{script}: no such file; give the path of slurm/train.sh with --script")
    if sbatch and not slurm:
        raise UsageError("--sbatch needs --slurm")
    options = ["--gpus", str(gpus)] if gpus else ["--procs", str(procs)] if procs else []
    options += [] if report else ["--no-report"]
    places = [] if slurm else places_here(jobs or 1, gpus, procs, aside)
    place = places[0] if places else None
    ready = prepare(config_path, overrides, **draw, sweep_dir=sweep_dir, place=place, say=aside)
    aside(f"{ready.folder.path}: {len(ready.plan.runs):,} runs, {len(ready.left):,} of them left to train")
    if not (sweep_dir or dry_run):
        ready = replace(ready, folder=SweepFolder(new_run_path(ready.name, "sweep-")))
    if not ready.left:
        return
    if slurm:
        _submit(ready, script, jobs, options, sbatch, dry_run=dry_run)
    elif dry_run:
        _show(ready, places, options)
    else:
        _train(ready, places, options, report=report, quiet=quiet)


def _submit(
    ready: Ready, script: Path, jobs: int | None, options: list[str], sbatch: str | None, *, dry_run: bool
) -> None:
    """Submits the runs as one job array, or prints the command that does."""
    from disttrain.sweep.slurm import plan_array, submit

    try:
        words = shlex.split(sbatch or "")
    except ValueError as error:
        raise UsageError(f"--sbatch {sbatch!r}: {error}; correct its quotes") from None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    runs = [run for run, _ in ready.left]
    array = plan_array(
        ready.folder, runs, script=script, stamp=stamp, jobs=jobs, options=options, sbatch=words
    )
    if dry_run:
        click.echo(shlex.join(array.command))
        return
    with ready.folder.locked():
        ready.folder.write(ready.plan, ready.text)
        click.echo(f"job {submit(array)}; its results so far: disttrain report {ready.folder.path}")


def _show(ready: Ready, places: list[Place], options: list[str]) -> None:
    """Prints the command of each run, and to standard error where those at the same time train."""
    from disttrain.sweep.running import run_arguments

    for number, place in enumerate(places, 1):
        if place.environ:
            variables = " ".join(f"{name}={value}" for name, value in place.environ.items())
            aside(f"job {number} of {len(places)} at a time: {variables}")
    for run, _ in ready.left:
        click.echo(shlex.join(run_arguments(ready.folder, run, options)))


def _train(ready: Ready, places: list[Place], options: list[str], *, report: bool, quiet: bool) -> NoReturn:
    """Trains the runs, names those that failed, writes the report, and exits with the code of the sweep."""
    from disttrain.sweep.running import exit_code, train_runs

    folder = ready.folder
    with folder.locked():
        folder.write(ready.plan, ready.text)
        codes, signals = train_runs(folder, ready.left, places, options, None if quiet else say)
    rows = {run.name: folder.row(run.name, codes.get(run.name)) for run in ready.plan.runs}
    for line in folder.unfinished(rows):
        aside(f"disttrain: {line}")
    finished = sum(row.state == "finished" for row in rows.values())
    outcome = f"{finished:,} of {len(rows):,} runs have finished"
    if len(signals) > 1:
        aside(f"disttrain: ended by {signal.Signals(signals[-1]).name}; {outcome}")
        sys.exit(128 + signals[-1])
    if signals:
        raise StoppedError(f"stopped: {outcome}; to go on, add --sweep-dir {folder.path} to the command")
    say(f"{folder.path}: {outcome}")
    if report and finished:
        command = [sys.executable, "-m", "disttrain", "report", str(folder.path)]
        if subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode:
            aside(f"cannot write the report; try `disttrain report {folder.path}`")
    sys.exit(exit_code([codes[run.name] for run, _ in ready.left]))
