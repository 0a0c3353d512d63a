"""A run that was stopped or killed and goes on is, to the last bit, the run that never was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.marks import nightly
from kit.resumed import digest, run
from kit.run_results import computed_records, ids_per_step


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path
) -> Callable[[int], Path]:
    """Returns the run folder of the experiment on so many ranks."""
    folders: dict[int, Path] = {}

    def get(procs: int) -> Path:
        if procs not in folders:
            folder = tmp_path_factory.mktemp(f"whole{procs}")
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("DISTTRAIN_CACHE", str(decoded_cache))
                done = run(folder, procs, digits_root)
            assert done.returncode == 0, done.stderr
            folders[procs] = folder / "run"
        return folders[procs]

    return get


SIGNALS = [  # of 90 passes of each rank in training, and two in each of three evaluations
    (2, "SIGKILL 1 training 73", 70),
]
MORE_SIGNALS = [
    (1, "SIGTERM 0 evaluation 3", 75),
    (3, "SIGTERM 2 training 45", 75),
    (1, "SIGTERM 0 training 35", 75),
    (1, "SIGKILL 0 training 45", 70),
    (2, "SIGTERM 1 training 45", 75),
    (1, "SIGTERM 0 evaluation 4", 75),
    (2, "SIGTERM 0 evaluation 1", 75),
    (3, "SIGTERM 1 evaluation 1", 75),
]


@pytest.mark.parametrize(("procs", "plan", "code"), [*SIGNALS, *nightly(*MORE_SIGNALS)])
def test_a_run_that_goes_on_ends_as_the_run_that_was_never_stopped(
    procs: int,
    plan: str,
    code: int,
    tmp_path: Path,
    digits_root: Path,
    uninterrupted: Callable[[int], Path],
) -> None:
    stopped = run(tmp_path, procs, digits_root, plan)
    assert stopped.returncode == code, stopped.stderr
    going_on = run(tmp_path, procs, digits_root)
    assert going_on.returncode == 0, going_on.stderr
    whole, parts = uninterrupted(procs), tmp_path / "run"
    assert computed_records(parts) == computed_records(whole)
    assert ids_per_step(parts) == ids_per_step(whole)
    assert digest(parts) == digest(whole)


@pytest.mark.nightly
def test_on_another_number_of_ranks_the_samples_of_each_step_are_the_same(
    tmp_path: Path, digits_root: Path, uninterrupted: Callable[[int], Path]
) -> None:
    stopped = run(tmp_path, 2, digits_root, "SIGTERM 0 training 37")
    assert stopped.returncode == 75, stopped.stderr
    going_on = run(tmp_path, 3, digits_root)
    assert going_on.returncode == 0, going_on.stderr
    whole = uninterrupted(1)
    assert ids_per_step(tmp_path / "run") == ids_per_step(whole)
    ours, theirs = computed_records(tmp_path / "run"), computed_records(whole)
    assert [positions(record) for record in ours] == [positions(record) for record in theirs]


def positions(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what does not depend on the noise, which differs with the number of ranks."""
    noisy = {"loss", "accuracy", "correct", "top5_accuracy", "calibration_error", "grad_norm"}
    return {k: v for k, v in record.items() if k not in noisy and not k.startswith("macro")}
