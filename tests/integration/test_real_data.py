"""The real MNIST and CIFAR-10, where DISTTRAIN_TEST_DATA says they are."""

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("DISTTRAIN_TEST_DATA", "/nonexistent"))

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="DISTTRAIN_TEST_DATA is not set")


def test_mnist_from_its_original_files(disttrain: Run, tmp_path: Path) -> None:
    env = {"DISTTRAIN_DATA": str(tmp_path / "data"), "DISTTRAIN_CACHE": str(tmp_path / "cache")}
    prepared = disttrain("data", "prepare", "mnist", "--source", REAL / "mnist", env=env)
    assert prepared.returncode == 0, prepared.stderr
    assert "60,000 samples" in prepared.stdout
    config = REPOSITORY / "configs/cnn_mnist.yaml"
    result = disttrain("run", config, "train.epochs=1", "--procs", "2", "--run-dir", "run", env=env)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["total"] == 10_000
    assert last["accuracy"] > 0.9  # the schedule ends after this one epoch


def test_cifar10_from_a_tree_of_jpeg_files(disttrain: Run, tmp_path: Path) -> None:
    env = {"DISTTRAIN_DATA": str(tmp_path / "data"), "DISTTRAIN_CACHE": str(tmp_path / "cache")}
    with tarfile.open(REAL / "cifar10_jpeg.tar.xz") as archive:
        archive.extractall(tmp_path / "images", filter="data")
    (folder,) = {path.parent for path in (tmp_path / "images").rglob("train")}
    prepared = disttrain("data", "prepare", "cifar10", "--source", folder, env=env)
    assert prepared.returncode == 0, prepared.stderr
    config = REPOSITORY / "configs/lenet_bn_cifar.yaml"
    result = disttrain("run", config, "train.epochs=1", "--procs", "2", "--run-dir", "run", env=env)
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["total"] == 10_000
    assert last["accuracy"] > 0.3
