"""What the ranks send each other in a training step: one reduction of the gradients and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kit import PROGRAMS
from kit.commands import succeeded, torchrun
from kit.marks import nightly


@pytest.mark.parametrize(
    ("accumulate", "model"), [(2, "batch_norm:Net"), *nightly((1, "cnn_mnist"), (4, "cnn_mnist"))]
)
def test_a_step_has_one_reduction(
    accumulate: int, model: str, config_file: Path, digits_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "batch_norm.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]\n"
        "        super().__init__(*layers, nn.Linear(144, num_classes))\n"
    )
    script = PROGRAMS / "count_collectives.py"
    arguments = [config_file, f"train.accumulate={accumulate}", f"model.name={model}"]
    environment = os.environ | {"DISTTRAIN_DATA": str(digits_root), "OMP_NUM_THREADS": "1"}
    done = torchrun(script, *arguments, env=environment, cwd=tmp_path)
    assert succeeded(done)
    steps = json.loads(done.stdout.splitlines()[-1])
    assert steps == [{"gradient buckets": 1, "all_reduce": 1}] * 6  # the one of the bucket
