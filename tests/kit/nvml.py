"""The stand-in for NVIDIA's management library, and programs run against it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import REPOSITORY

UUIDS = [f"GPU-{i:02d}000000-aaaa-bbbb-cccc-{i:012d}" for i in range(8)]
"""Of the simulated GPUs, by index."""


def build(folder: Path, *flags: str) -> Path:
    """Compiles the stand-in into `folder` and returns the folder; skips without a C compiler."""
    return _compile("fake_nvml.c", folder / "libnvidia-ml.so.1", *flags)


def build_cuda(folder: Path) -> Path:
    """Compiles a stand-in for CUDA's driver library, which torch must not meet; else as `build`."""
    return _compile("fake_cuda.c", folder / "libcuda.so.1")


def _compile(source: str, library: Path, *flags: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the NVML stand-in with")
    flags = ("-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags)
    subprocess.run([compiler, *flags, "-o", library, Path(__file__).with_name(source)], check=True)
    return library.parent


def run(program: str, library_folder: Path | None, **variables: str) -> Any:
    """Runs a Python program in a process of its own and returns the JSON which it prints.

    The environment names no GPU but by `variables`, and finds NVML in `library_folder` alone.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "FAKE_NVML_"))}
    environment["LD_LIBRARY_PATH"] = str(library_folder or "")
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)
