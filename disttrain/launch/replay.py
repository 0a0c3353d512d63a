"""Recomputes a part of a run with train.reproducible on any number of processes, and compares the weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from disttrain.config import load_config
from disttrain.errors import CheckpointError, StoppedError, UsageError, error_of
from disttrain.runs.jsonl import parts
from disttrain.runs.manifest import list_steps, step_of
from disttrain.runs.records import CURVES
from disttrain.runs.runfolder import RunFolder
from disttrain.runs.weight_digests import Comparison, compared, weight_digests

_POLL_S = 0.2
_TAIL_BYTES = 2**20  # of metrics.jsonl, more than its last line

# Neither trackers nor more checkpoints than the last.
_QUIET = ("monitor.trackers=[]", "monitor.prometheus_dir=null", "checkpoint.every_steps=null")


def replay(
    run: Path, folder: Path, *, begin: int | None, end: int | None, place: Sequence[str]
) -> tuple[int, Comparison]:
    """Trains again from a checkpoint of a run in another folder, and compares the weights at the log points.

    Args:
        run: the run folder, which does not change.
        folder: the run folder of the replay, which does not exist yet.
        begin: the step to begin from: 0, or that of a checkpoint of the run; None means the newest
            checkpoint before `end`, or 0 if there is none.
        end: the step of the last log point to compare; None means the last of the run.
        place: options of `disttrain run` for the processes.

    Returns:
        The step that it began from, and the comparison.

    Raises:
        UsageError: this is not a run with train.reproducible, or it has no log point in between.
        CheckpointError: the run has no checkpoint of step `begin`.
        DisttrainError: the replay failed.
    """
    source = RunFolder(run)
    if not source.config.is_file():
        raise UsageError(f"{run}: is not a run folder (it has no config.yaml)")
    if not load_config(source.config).train.reproducible:
        raise UsageError(f"{run}: was trained without train.reproducible, so a replay gives other bits")
    digests = weight_digests(source.metrics)
    end = max(digests, default=0) if end is None else end
    steps = {step_of(path): path for path in list_steps(source.checkpoints)}
    if begin is None:
        begin = max((step for step in steps if step < end), default=0)
    if begin and begin not in steps:
        there = ", ".join(map(str, sorted({0, *steps})))
        raise CheckpointError(f"{run}: has no checkpoint of step {begin:,}; use one of {there}")
    expected = {step: found for step, found in digests.items() if begin < step <= end}
    if not expected:
        raise UsageError(f"{run}: has no log point after step {begin:,} and up to step {end:,}")
    command = [sys.executable, "-m", "disttrain", "run", str(source.config), *_QUIET, *place, "--quiet"]
    command += ["--run-dir", str(folder), "--no-report"]
    command += ["--resume", str(steps[begin])] if begin else []
    _run_until(command, RunFolder(folder), max(expected))
    found = compared(expected, weight_digests(RunFolder(folder).metrics))
    if found is None:
        raise UsageError(f"{run}: the replay has no log point in common with it")
    return begin, found


def _run_until(command: Sequence[str], folder: RunFolder, step: int) -> None:
    """Runs a command until its run has the log point of a step, and stops it.

    Raises:
        DisttrainError: it failed before.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and _last_step(folder.metrics) < step:
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate()
    if process.returncode not in (0, StoppedError.exit_code):
        raise error_of(process.returncode, errors.strip().removeprefix("disttrain: "))


def _last_step(metrics: Path) -> int:
    """Returns the step of the last record of a run, 0 without one."""
    return max(
        (record.step for part in parts(metrics, CURVES, -_TAIL_BYTES) for record in part.rows), default=0
    )
