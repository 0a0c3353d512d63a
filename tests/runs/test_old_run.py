"""The folder of a run of an earlier version (2026-11-28): everything that reads one still does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kit import GOLDEN
from kit.commands import Run
from kit.run_results import metrics, status

OLD = GOLDEN / "old_run"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path / "run"


def test_it_is_evaluated_and_shown_as_it_was(disttrain: Run, old_run: Path) -> None:
    found = disttrain("eval", "run", "--json")
    assert found.returncode == 0, found.stderr
    record = json.loads((old_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (json.loads(found.stdout)["correct"], record["correct"]) == (207, 207)
    top = disttrain("top", "run", "--json")
    assert json.loads(top.stdout)["status"]["verdict"]["name"] == "compute-bound"
    report = disttrain("report", "run")
    assert report.returncode == 0, report.stderr
    assert "57.66" in (old_run / "report.html").read_text()
    exported = disttrain("export", "run", "--format", "safetensors", "--output", "model.safetensors")
    assert exported.returncode == 0, exported.stderr


def test_it_goes_on_where_it_was(disttrain: Run, old_run: Path) -> None:
    config = old_run / "config.yaml"
    done = disttrain("run", config, "train.epochs=3", "--procs", "1", "--run-dir", "run", "-q")
    assert done.returncode == 0, done.stderr
    records = metrics(old_run)
    assert [record["step"] for record in records if record["kind"] == "eval"] == [23, 46, 69]
    assert status(old_run)["samples_seen"] == 3 * 1438
