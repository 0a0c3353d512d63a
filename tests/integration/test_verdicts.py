"""Runs that were made to have a problem, and the verdict on each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

MODEL = """
import os, time
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes, slow):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
        slow_ranks = {"rank": ["1"], "network": ["0"]}.get(slow, [])
        self.slow_s = 0.03 if os.environ.get("RANK", "0") in slow_ranks else 0.0
        if slow == "disk":
            pread = os.pread
            def reading(*arguments):
                time.sleep(0.001)
                return pread(*arguments)
            os.pread = reading

    def forward(self, images):
        time.sleep(self.slow_s)
        return super().forward(images)
"""


@pytest.mark.parametrize(
    ("problem", "procs", "options", "name", "words"),
    [
        ("rank", 2, [], "straggler", ["rank 1 on "]),
        ("disk", 1, ["data.cache=none", "data.workers=1"], "input-bound", ["data.cache=host"]),
        ("network", 1, [], "compute-bound", []),
    ],
)
def test_a_problem_is_named(
    problem: str,
    procs: int,
    options: list[str],
    name: str,
    words: list[str],
    disttrain: Run,
    tmp_path: Path,
    config_file: Path,
) -> None:
    (tmp_path / "slow.py").write_text(MODEL)
    model = ["model.name=slow:Net", f"model.args.slow={problem}"]
    result = disttrain("run", config_file, *model, *options, "--procs", str(procs), "--run-dir", "run")
    assert result.returncode == 0, result.stderr
    verdict = json.loads((tmp_path / "run/status.json").read_text())["verdict"]
    assert verdict["name"] == name, verdict
    for word in words:
        assert word in verdict["text"]
    assert f"verdict: {verdict['text']}" in result.stdout
