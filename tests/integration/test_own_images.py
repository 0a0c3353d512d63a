"""docs/own_images.md: every command of it, on images that are made here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from kit import REPOSITORY

DOCUMENT = REPOSITORY / "docs/own_images.md"


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


@pytest.mark.nightly
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    for kind in ("circle", "square", "stripes"):
        draw(tmp_path / "photos" / kind, kind, 20)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "photos.yaml").write_text(config)
    torch.save(resnet18(num_classes=1000).state_dict(), tmp_path / "resnet18.pth")
    commands = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    assert len(commands) == 9
    variables = {"DISTTRAIN_DATA": str(tmp_path / "data"), "DISTTRAIN_REPORT": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = {}
    for command in commands:
        done = subprocess.run(
            command.split(),
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        printed[command.split()[1]] = done.stdout
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
        assert (tmp_path / name).stat().st_size > 1000, name
