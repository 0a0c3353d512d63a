"""Runs that a test starts and waits for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def status(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def succeeded(result: subprocess.CompletedProcess[str]) -> bool:
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return True


def background(disttrain_args: list[str], tmp_path: Path, digits_root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "disttrain", *disttrain_args],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
