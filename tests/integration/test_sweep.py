"""`disttrain sweep` as a user starts it: runs that fail, and a sweep that is stopped and resumed."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest

from kit.commands import Run, background, wait_for
from kit.run_results import metrics, status

NET = """
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width):
        if width == 3 and not Path("mended").exists():
            raise ValueError("a width of 3")
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))
"""
NAMES = [f"model.args.width={width},seed={seed}" for width in (2, 3) for seed in (0, 1)]


def table(folder: Path) -> dict[str, dict[str, str]]:
    """Returns runs.csv: name of a run -> column -> value."""
    with (folder / "runs.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.mark.nightly
def test_runs_that_fail_are_named_and_resumed(disttrain: Run, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NET)
    command = ("sweep", config_file, "model.name=mine:Net", "model.args.width=2,3", "seed=0..1")
    command += ("train.epochs=1", "--procs", "1", "--jobs", "2", "--sweep-dir", "s")
    ended = disttrain(*command)
    assert ended.returncode == 2, ended.stderr
    failed = [line for line in ended.stderr.splitlines() if line.startswith("disttrain: ")]
    for line, name in zip(failed, NAMES[2:], strict=True):
        why = "model mine:Net: cannot be built: ValueError: a width of 3 (exit code 2)"
        assert line.startswith(f"disttrain: {name}: failed: {why}; see s/logs/")
        assert "a width of 3" in (tmp_path / line.rpartition(" ")[2]).read_text()
    assert [row["state"] for row in table(tmp_path / "s").values()] == ["finished"] * 2 + ["failed"] * 2
    assert "2 of 4 runs have finished" in ended.stdout

    (tmp_path / "mended").touch()
    begun = metrics(tmp_path / "s" / NAMES[0])
    ended = disttrain(*command, "-q")
    assert ended.returncode == 0, ended.stderr
    assert "4 runs, 2 of them left to train" in ended.stderr
    assert ended.stdout == "s: 4 of 4 runs have finished\n"
    rows = table(tmp_path / "s")
    assert list(rows) == NAMES
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert rows[NAMES[3]]["model.args.width"] == "3"
    assert float(rows[NAMES[3]]["accuracy"]) == metrics(tmp_path / "s" / NAMES[3])[-1]["accuracy"]
    assert metrics(tmp_path / "s" / NAMES[0]) == begun, "it had finished"
    assert "(n = 2)" in disttrain("report", "s").stdout
    page = (tmp_path / "s/report.html").read_text()
    assert page.count("<polyline") == 2
    assert "model.args.width=3" in page


def test_a_sweep_saves_and_stops_on_a_signal(
    disttrain: Run, config_file: Path, tmp_path: Path, digits_root: Path
) -> None:
    command = [
        "sweep",
        str(config_file),
        "seed=0,1",
        "train.epochs=10000",
        "--procs",
        "1",
        "--sweep-dir",
        "s",
    ]
    sweep = background(command, tmp_path, digits_root)
    wait_for(lambda: len(metrics(tmp_path / "s/seed=0")) > 2, sweep)
    sweep.send_signal(signal.SIGINT)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 75, output
    assert "to go on, add --sweep-dir s to the command" in output
    assert status(tmp_path / "s/seed=0")["state"] == "stopped"
    assert not (tmp_path / "s/seed=1").exists()
    planned = disttrain(*command, "--dry-run")
    assert [line.split()[3] for line in planned.stdout.splitlines()] == ["seed=0", "seed=1"]
