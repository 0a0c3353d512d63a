"""An experiment that is stopped and resumed, with a model that draws from every random number generator."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
augment: {crop_padding: 1, flip: true, cutout: 2, mixup: 0.2, rand_augment: {}}
model: {name: "drawing:Net"}
train: {epochs: 3, batch_size: 96, accumulate: 2, ema: 0.9, trace_samples: true, grad_clip: 5.0,
        precision: fp32, channels_last: true}
optim: {name: adamw, lr: 0.01}
schedule: {name: one_cycle}
checkpoint: {every_steps: 10}
monitor: {log_every_steps: 4}
"""  # 15 steps an epoch


def run(
    folder: Path, procs: int, digits_root: Path, plan: str | None = None, overrides: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs the experiment in a folder; with a plan, one rank sends itself a signal, once."""
    folder.mkdir(exist_ok=True)
    (folder / "drawing.py").write_text(MODEL)
    (folder / "resumed.yaml").write_text(CONFIG)
    variables = {"DISTTRAIN_DATA": str(digits_root), "OMP_NUM_THREADS": "1"}
    command = ["run", "resumed.yaml", *overrides, "--procs", str(procs), "--run-dir", "run"]
    return subprocess.run(
        [sys.executable, "-m", "disttrain", *command],
        cwd=folder,
        env=os.environ | variables | ({} if plan is None else {"SIGNAL_PLAN": plan}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "checkpoints/latest/model.safetensors").read_bytes()).hexdigest()
