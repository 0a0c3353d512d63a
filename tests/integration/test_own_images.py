"""docs/own_images.md and docs/fine_tuning.md: their commands, on images that are made here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import resnet18

from kit import REPOSITORY

DOCUMENT = REPOSITORY / "docs/own_images.md"
FINE_TUNING = REPOSITORY / "docs/fine_tuning.md"


def draw(folder: Path, kind: str, count: int) -> None:
    """Draws images of many sizes with a circle, a square or stripes in them."""
    random = np.random.default_rng(len(kind))
    folder.mkdir(parents=True)
    for number in range(count):
        height, width = random.integers(60, 140, 2)
        rows, columns = np.mgrid[:height, :width]
        rows, columns = rows - height / 2, columns - width / 2
        radius = random.uniform(0.2, 0.4) * min(height, width)
        inside = {
            "circle": rows**2 + columns**2 < radius**2,
            "square": np.maximum(abs(rows), abs(columns)) < radius,
            "stripes": (columns // (radius / 3)) % 2 == 0,
        }[kind]
        light, dark = random.integers(150, 256, 3), random.integers(0, 100, 3)
        pixels = np.where(inside[..., None], light, dark) + random.integers(-20, 20, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with what the tutorials begin with: images, photos.yaml and weights of a ResNet-18."""
    for kind in ("circle", "square", "stripes"):
        draw(tmp_path / "photos" / kind, kind, 20)
    (config,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "photos.yaml").write_text(config)
    torch.save(resnet18(num_classes=1000).state_dict(), tmp_path / "resnet18.pth")
    return tmp_path


def commands_of(document: Path) -> list[str]:
    """Returns the commands of a document that need no network."""
    return "".join(re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)).splitlines()


def printed_by(command: str, folder: Path) -> str:
    """Runs a command that succeeds; returns its output."""
    variables = {"DISTTRAIN_DATA": str(folder / "data"), "DISTTRAIN_REPORT": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    how = {"cwd": folder, "env": os.environ | variables, "capture_output": True, "timeout": 300}
    done = subprocess.run(shlex.split(command), text=True, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


@pytest.mark.nightly
def test_every_command_of_the_tutorial_runs(photos: Path) -> None:
    commands = commands_of(DOCUMENT)
    assert len(commands) == 9
    printed = {command.split()[1]: printed_by(command, photos) for command in commands}
    assert "finished: accuracy" in printed["run"]
    assert "report: runs/photos/report.html" in printed["run"]
    assert len(re.findall(r"photos/square/\d+\.(?:jpg|png)", printed["predict"])) == 20
    for name in (
        "runs/photos/report.html",
        "photos.html",
        "tune_lr.html",
        "circles.png",
        "exported/README.md",
    ):
        assert (photos / name).stat().st_size > 1000, name


@pytest.mark.nightly
def test_every_command_of_the_fine_tuning_tutorial_runs(photos: Path) -> None:
    printed_by(commands_of(DOCUMENT)[0], photos)  # packs the images
    commands = commands_of(FINE_TUNING)
    assert len(commands) == 3
    for command in commands:
        assert "finished: accuracy" in printed_by(command, photos)
    saved = torch.load(photos / "resnet18.pth")
    for run, frozen in {"head": True, "unfrozen": False}.items():
        trained = load_file(photos / f"runs/{run}/checkpoints/latest/model.safetensors")
        kept = {name for name, value in saved.items() if torch.equal(value, trained[name])}
        assert (kept == saved.keys() - {"fc.weight", "fc.bias"}) is frozen
