"""A sweep as one Slurm job array: each job trains one run through slurm/train.sh, which can requeue it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from disttrain.errors import UsageError, reason
from disttrain.files import write_atomically
from disttrain.sweep.folder import SweepFolder
from disttrain.sweep.plan import PlannedRun
from disttrain.sweep.running import run_arguments


class Array(NamedTuple):
    """A job array to submit.

    Attributes:
        command: of sbatch.
        file: where slurm/train.sh finds its arguments: the line of a job is that of its array index.
        lines: the arguments for each job, separated by tabs.
    """

    command: list[str]
    file: Path
    lines: list[str]


def plan_array(
    folder: SweepFolder,
    runs: Sequence[PlannedRun],
    *,
    script: Path,
    stamp: str,
    jobs: int | None,
    options: Sequence[str],
    sbatch: Sequence[str],
) -> Array:
    """Returns the job array of a sweep. Starts and writes nothing.

    Args:
        folder: of the sweep.
        runs: to train or to resume.
        script: slurm/train.sh.
        stamp: the time, for the name of the file. Jobs of an earlier array may still read theirs.
        jobs: most jobs at a time; None means no limit.
        options: of `disttrain run`.
        sbatch: the user's options of sbatch, which win over ours.

    Raises:
        UsageError: an argument does not fit into a line.
    """
    words = [run_arguments(folder, run, options)[2:] for run in runs]
    for word in (word for line in words for word in line):
        if "\t" in word or "\n" in word:
            raise UsageError(f"{word!r}: has a tab or a new line, which Slurm jobs cannot get; remove it")
    file = folder.path / f"array-{stamp}.tsv"
    array = f"--array=0-{len(runs) - 1}" + (f"%{jobs}" if jobs else "")
    log = f"--output={folder.path}/logs/slurm-%A_%a.log"
    command = ["sbatch", "--parsable", array, log, *sbatch, str(script), "--sweep", str(file)]
    return Array(command, file, ["\t".join(line) + "\n" for line in words])


def submit(array: Array) -> str:
    """Submits a job array, and returns its job id.

    Raises:
        UsageError: sbatch is missing, or refuses the array.
        StorageError: the file cannot be written.
    """
    write_atomically(array.file, "".join(array.lines))
    try:
        done = subprocess.run(array.command, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"sbatch: {reason(error)}; run this where jobs can be submitted") from None
    if done.returncode:
        raise UsageError(f"sbatch refused the array: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().partition(";")[0]
