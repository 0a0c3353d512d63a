"""The real MNIST and CIFAR-10, where DISTTRAIN_TEST_DATA says they are."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from disttrain.shards.index import load_index
from kit import REPOSITORY
from kit.commands import Run

REAL = Path(os.environ.get("DISTTRAIN_TEST_DATA") or "/nonexistent")

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="DISTTRAIN_TEST_DATA is not set")


def check_epoch(
    disttrain: Run,
    name: str,
    tmp_path: Path,
    env: dict[str, str],
    caches: tuple[str, ...],
    *,
    samples: int,
    accuracy: float,
) -> None:
    """Trains an epoch, from the decoded copy, from the shards or both: the same batches, each sample once."""
    ids: dict[str, dict[int, list[int]]] = {}
    for cache in caches:
        result = disttrain(
            "run", REPOSITORY / f"configs/{name}.yaml", "train.epochs=1", "train.trace_samples=true",
            f"data.cache={cache}", "--procs", "2", "--run-dir", cache, env=env,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        last = json.loads((tmp_path / cache / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["total"] == 10_000
        assert last["accuracy"] > accuracy
        ids[cache] = {}
        for trace in sorted((tmp_path / cache / "trace").iterdir()):
            for line in trace.read_text().splitlines():
                record = json.loads(line)
                ids[cache].setdefault(record["step"], []).extend(record["ids"])
    assert all(found == ids["host"] for found in ids.values())
    assert sorted(sample for batch in ids["host"].values() for sample in batch) == list(range(samples))


@pytest.mark.nightly
def test_mnist_from_its_original_files(disttrain: Run, tmp_path: Path) -> None:
    env = {"DISTTRAIN_DATA": str(tmp_path / "data"), "DISTTRAIN_CACHE": str(tmp_path / "cache")}
    prepared = disttrain("data", "prepare", "mnist", "--source", REAL / "mnist", env=env)
    assert prepared.returncode == 0, prepared.stderr
    assert "60,000 samples" in prepared.stdout
    index = load_index("mnist", str(tmp_path / "data"))
    assert index.splits["train"].class_counts == (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    assert index.splits["val"].class_counts == (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    assert (round(index.mean[0], 4), round(index.std[0], 4)) == (0.1307, 0.3081)
    # the schedule ends after this one epoch
    check_epoch(disttrain, "cnn_mnist", tmp_path, env, ("host",), samples=60_000, accuracy=0.9)


@pytest.mark.nightly
def test_cifar10_from_a_tree_of_jpeg_files(disttrain: Run, tmp_path: Path) -> None:
    env = {"DISTTRAIN_DATA": str(tmp_path / "data"), "DISTTRAIN_CACHE": str(tmp_path / "cache")}
    with tarfile.open(REAL / "cifar10_jpeg.tar.xz") as archive:
        archive.extractall(tmp_path / "images", filter="data")
    (folder,) = {path.parent for path in (tmp_path / "images").rglob("train")}
    prepared = disttrain("data", "prepare", "cifar10", "--source", folder, env=env)
    assert prepared.returncode == 0, prepared.stderr
    check_epoch(disttrain, "lenet_bn_cifar", tmp_path, env, ("host", "none"), samples=50_000, accuracy=0.3)
