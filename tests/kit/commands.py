"""Runs commands as a user does, and waits for their effects."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture `disttrain`: runs the command with these arguments and returns the ended process."""


def background(arguments: list[str], folder: Path, data_root: Path) -> subprocess.Popen[str]:
    """Starts the command in a folder; the output and errors come through one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "disttrain", *arguments],
        cwd=folder,
        env=os.environ | {"DISTTRAIN_DATA": str(data_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


NO_LOG_FOLDER = ("--log_dir", os.devnull)
"""For torchrun and accelerate launch, which leave an empty folder in /tmp otherwise."""


def torchrun(
    script: Path, *arguments: object, ranks: int = 2, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a script in processes of torchrun; `how` is for subprocess.run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *NO_LOG_FOLDER]
    command += ["--nproc-per-node", str(ranks)]
    command += map(str, (script, *arguments))
    return subprocess.run(command, **({"capture_output": True, "text": True, "timeout": 240} | how))


def succeeded(result: subprocess.CompletedProcess[str]) -> bool:
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return True


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Waits until a condition holds; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"exit {process.returncode}: {process.communicate()[0]}")
        assert time.monotonic() < deadline, f"not after {seconds:g} s"
        time.sleep(0.02)
