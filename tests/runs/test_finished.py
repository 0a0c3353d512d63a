"""Whether a run has finished, or goes on with what was changed in its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.config import load_config
from disttrain.runs.resume import finished_text, is_finished
from disttrain.runs.runfolder import RunFolder
from kit.run_files import CONFIG, write_run

RULE = "train.stop_early={metric: loss, patience_epochs: 2}"
EARLY = "stopped early after epoch 3 of 9 (validation loss no better than 0.5000 in epoch 1)"


def finished(folder: RunFolder, *overrides: str) -> bool:
    now: dict[str, Any] = load_config(folder.config, overrides).model_dump(mode="json")
    return is_finished(folder, {"config": now, "data": {}})


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ([], True),
        (["train.epochs=20"], True),
        (["train.stop_early=null"], False),
        (["train.stop_early.patience_epochs=5"], False),
        (["train.stop_early.metric=accuracy", "train.epochs=20"], False),
        (["optim.lr=7"], False),
    ],
)
def test_a_run_that_stopped_early_goes_on_with_another_rule(
    tmp_path: Path, changes: list[str], done: bool
) -> None:
    folder = RunFolder(write_run(tmp_path / "run", status={"reason": EARLY}))
    config = load_config(folder.config, ["train.epochs=9", RULE])
    folder.config.write_text(config.model_dump_json())
    assert finished(folder, *changes) is done
    assert finished_text(folder) == (
        f"{folder.path}: this run has already finished; nothing to do. It {EARLY}. "
        "To train on, set train.stop_early=null or change its keys"
    )


def test_a_whole_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", config=CONFIG, status={"reason": "all epochs done"}))
    epochs = load_config(folder.config).train.epochs
    assert finished(folder)
    assert finished(folder, RULE)
    assert not finished(folder, f"train.epochs={epochs + 1}")
    assert finished_text(folder) == f"{folder.path}: this run has already finished; nothing to do"
