"""Parameters that are frozen, then trained: through stops around that step, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kit.resumed import digest, run
from kit.run_results import computed_records, ids_per_step

FREEZE = (r"model.freeze=layers\.[01]\..*", "model.unfreeze_epoch=1.3")  # 15 steps an epoch: from step 21 on
REPRODUCIBLE = ("train.reproducible=true", "train.virtual_ranks=6")

Stages = Sequence[tuple[int, str | None, int]]
"""Number of ranks, the signal that ends the stage, and the exit code."""

STOPS: list[tuple[tuple[str, ...], int, Stages]] = [
    # Killed in the frozen phase; from the checkpoint of step 20, where all are unfrozen, twice; to the end.
    (REPRODUCIBLE, 1, [(2, "SIGKILL 1 training 50", 70), (2, "SIGTERM 1 training 24", 75), (3, None, 0)]),
    ((), 2, [(2, "SIGTERM 0 training 20", 75), (2, "SIGKILL 0 training 26", 70), (2, None, 0)]),
    ((), 1, [(1, "SIGTERM 0 training 39", 75), (1, "SIGKILL 0 training 10", 70), (1, None, 0)]),
    ((), 3, [(3, "SIGKILL 2 training 45", 70), (3, "SIGTERM 2 training 30", 75), (3, None, 0)]),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("mode", "procs", "stages"), STOPS)
def test_a_stopped_run_unfreezes_as_the_run_that_was_never_stopped(
    mode: tuple[str, ...], procs: int, stages: Stages, tmp_path: Path, digits_root: Path
) -> None:
    done = run(tmp_path / "whole", procs, digits_root, overrides=(*FREEZE, *mode))
    assert done.returncode == 0, done.stderr
    for ranks, plan, code in stages:
        (tmp_path / "parts/signalled").unlink(missing_ok=True)
        done = run(tmp_path / "parts", ranks, digits_root, plan, (*FREEZE, *mode))
        assert done.returncode == code, done.stderr
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    assert computed_records(parts) == computed_records(whole)
    assert ids_per_step(parts) == ids_per_step(whole)
    assert digest(parts) == digest(whole)
    assert "48 of 2,618 parameters: model.freeze until epoch 1.3" in (whole / "env.json").read_text()
