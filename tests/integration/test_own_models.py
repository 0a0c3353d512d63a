"""Networks of users that train in an unusual way: they train on any number of ranks, or are refused."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kit.commands import Run, succeeded
from kit.run_results import metrics, status

MODELS = """
import os, random
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, skip="never"):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        self.block, self.spare = nn.Linear(num_classes, num_classes), nn.Linear(num_classes, 2)
        self.skip, self.passes = skip, 0

    def forward(self, images):
        scores = self.body(images)
        if not self.training:
            return scores + self.block(scores)
        self.passes += 1
        if self.skip == "at random":
            skipped = random.random() < 0.5
        else:
            skipped = self.skip == "rank 1" and os.environ.get("RANK") == "1" and self.passes > 1
        return scores if skipped else scores + self.block(scores)

class Whole(Net):
    def forward(self, images):
        scores = super().forward(images)
        return scores + 0 * self.spare(scores).sum()

class Helped(Net):
    def forward(self, images):
        scores = super().forward(images)
        return (scores, nn.functional.pad(self.spare(scores), (0, 8))) if self.training else scores

def single_valued(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, num_classes)
    )
"""
CONFIG = """
name: own
data: {name: digits}
model: {name: "mine:NAME"}
train: {epochs: 1, batch_size: 96, precision: fp32, channels_last: false}
optim: {name: sgd, lr: 0.05, weight_decay: 0.1}
monitor: {log_every_steps: 1}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODELS)
    return tmp_path


def config(folder: Path, name: str) -> str:
    (folder / "own.yaml").write_text(CONFIG.replace("NAME", name))
    return "own.yaml"


def test_what_would_fail_in_the_last_batch_is_refused_before_step_1(disttrain: Run, own: Path) -> None:
    command = [
        "run",
        config(own, "single_valued"),
        "train.batch_size=479",
        "--procs",
        1,
    ]  # 1,438 = 3 x 479 + 1
    lines = []
    for options in (["--dry-run"], ["--run-dir", "run"]):
        done = disttrain(*command, *options)
        assert done.returncode == 2
        lines.append(done.stderr.strip())
    assert lines[0] == lines[1]
    assert re.fullmatch(
        r"disttrain: model mine:single_valued: in the last batch of an epoch, a rank gets only 1 image of "
        r"1x8x8, on which layer 1 cannot be trained \(ValueError: Expected more than 1 value per .*\); "
        r"use train\.batch_size=478 or 480, or data\.remainder=drop",
        lines[0],
    )
    assert (status(own / "run")["state"], status(own / "run")["exit_code"]) == ("failed", 2)
    assert succeeded(disttrain(*command, "train.batch_size=478", "--run-dir", "right"))


def test_unused_and_skipped_layers_train_on_any_number_of_ranks(disttrain: Run, own: Path) -> None:
    note = "model mine:Net: no gradient in a trial step for spare.weight, spare.bias"
    weights = []
    for ranks in (1, 2):
        done = disttrain("run", config(own, "Net"), "--procs", ranks, "--run-dir", f"run{ranks}")
        assert succeeded(done)
        assert note in done.stdout
        weights.append(load_file(own / f"run{ranks}/checkpoints/latest/model.safetensors"))
        choices = json.loads((own / f"run{ranks}/env.json").read_text())["choices"]
        assert choices["no gradient"].startswith("spare.weight, spare.bias: ")
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.nightly
def test_auxiliary_losses_train_on_any_number_of_ranks(disttrain: Run, own: Path) -> None:
    losses = []
    for ranks in (1, 2):
        done = disttrain("run", config(own, "Helped"), "--procs", ranks, "--run-dir", f"run{ranks}")
        assert succeeded(done)
        assert "no gradient" not in done.stdout
        records = [record for record in metrics(own / f"run{ranks}") if record["kind"] == "train"]
        losses.append([record["loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] > 1.3 * math.log(10), "the auxiliary loss is a part of the loss"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_layers_skipped_at_random_train_in_one_process(disttrain: Run, own: Path, seed: int) -> None:
    skip = ("model.args.skip=at random", f"seed={seed}")
    assert succeeded(disttrain("run", config(own, "Whole"), *skip, "--procs", 1, "--run-dir", "run"))


@pytest.mark.nightly
def test_layers_skipped_at_random_train_even_with_torchs_debugging(disttrain: Run, own: Path) -> None:
    done = disttrain(
        "run", config(own, "Whole"), "model.args.skip=at random", "--procs", 2, "--run-dir", "run",
        env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"},
    )  # fmt: skip
    assert succeeded(done)
    line = (
        "TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch's DDP crash; continuing with TORCH_DISTRIBUTED_DEBUG=INFO"
    )
    assert done.stdout.splitlines()[0] == line


def test_a_layer_that_one_rank_skips_ends_in_one_clear_line(disttrain: Run, own: Path) -> None:
    """The trial cannot see this one, because only a later pass skips the layer."""
    done = disttrain("run", config(own, "Whole"), "model.args.skip=rank 1", "--procs", 2, "--run-dir", "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "disttrain: model mine:Whole: no gradient for block.weight, block.bias in step 2 on rank 1; "
        "skip a layer by multiplying its output by 0, as torchvision.ops.stochastic_depth does"
    )
