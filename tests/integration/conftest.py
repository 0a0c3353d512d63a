"""Programs that must leave no process behind, and runs on damaged data."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit.commands import Run
from kit.faults import CONFIG
from kit.supervision import MODEL, Start, descendants


@pytest.fixture
def start(tmp_path: Path, config_file: Path, digits_root: Path) -> Iterator[Start]:
    """Starts a program in tmp_path; at the end none of its processes may be left."""
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "tmp").mkdir()
    started = []

    def start(*arguments: object, program: tuple[str, ...] = ("-m", "disttrain"), **env: str) -> Any:
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"DISTTRAIN_DATA": str(digits_root), "TMPDIR": str(tmp_path / "tmp")} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    left = descendants(tmp_path)
    for process in [*left, *started]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    for process in started:
        process.communicate()
    assert not left, "processes are left behind"


@pytest.fixture
def train(disttrain: Run, tmp_path: Path) -> Run:
    """Trains two epochs on tmp_path/set into the run folder that is named first."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "faults.yaml").write_text(CONFIG)
        return disttrain(
            "run", "faults.yaml", *arguments, "--run-dir", name,
            env={"DISTTRAIN_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run
