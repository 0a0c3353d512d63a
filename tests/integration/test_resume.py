"""A run that was stopped or killed and goes on is, to the last bit, the run that never was."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.marks import nightly
from kit.run_results import computed_records, ids_per_step

MODEL = '''
import os, random, signal
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Draws from every generator there is, in training and in evaluation; once, a rank gets a signal."""

    def __init__(self, num_classes):
        super().__init__()
        layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)
        self.layers = nn.Sequential(*layers, nn.Linear(256, num_classes))
        self.passes = {True: 0, False: 0}

    def forward(self, images):
        self.passes[self.training] += len(images) > 1  # the looks at a new network are no passes
        plan = os.environ.get("SIGNAL_PLAN")
        if plan is not None and not os.path.exists("signalled"):
            name, rank, training, passes = plan.split()
            here = os.environ.get("RANK", "0") == rank and self.training == (training == "training")
            if here and self.passes[self.training] == int(passes):
                open("signalled", "w").close()
                os.kill(os.getpid(), getattr(signal, name))
        noise = random.random() + np.random.random() + np.random.normal() + random.gauss(0, 1)
        return self.layers(images + 0.01 * noise + 0.01 * torch.rand(()))
'''

CONFIG = """
name: resumed
seed: 3
data: {name: digits}
augment: {crop_padding: 1, flip: true, cutout: 2, mixup: 0.2}
model: {name: "drawing:Net"}
train: {epochs: 3, batch_size: 96, accumulate: 2, ema: 0.9, trace_samples: true, grad_clip: 5.0,
        precision: fp32, channels_last: true}
optim: {name: adamw, lr: 0.01}
schedule: {name: one_cycle}
checkpoint: {every_steps: 10}
monitor: {log_every_steps: 4}
"""  # 15 steps an epoch


def run(
    folder: Path, procs: int, digits_root: Path, plan: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the experiment in a folder; with a plan, one rank sends itself a signal, once."""
    folder.mkdir(exist_ok=True)
    (folder / "drawing.py").write_text(MODEL)
    (folder / "resumed.yaml").write_text(CONFIG)
    variables = {"DISTTRAIN_DATA": str(digits_root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "disttrain", "run", "resumed.yaml", "--procs", str(procs), "--run-dir", "run"],
        cwd=folder,
        env=os.environ | variables | ({} if plan is None else {"SIGNAL_PLAN": plan}),
        capture_output=True,
        text=True,
        timeout=300,
    )


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


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "checkpoints/latest/model.safetensors").read_bytes()).hexdigest()


SIGNALS = [  # of 90 passes of each rank in training, and two in each of three evaluations
    (1, "SIGTERM 0 evaluation 3", 75),
    (2, "SIGKILL 1 training 73", 70),
    (3, "SIGTERM 2 training 45", 75),
]
MORE_SIGNALS = [
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
    return {key: record[key] for key in record if key not in {"loss", "accuracy", "correct"}}
