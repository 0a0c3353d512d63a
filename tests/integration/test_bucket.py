"""A run on a data set in a bucket of S3, with its checkpoints there, is that on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.commands import Run
from kit.run_results import computed_records, ids_per_step
from kit.s3 import S3

CONFIG = """
name: seven
data: {name: seven, streams: 4}
model: {name: cnn_mnist}
train: {batch_size: 84, trace_samples: true}
optim: {name: sgd, lr: 0.02}
"""


@pytest.fixture
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


@pytest.mark.nightly
def test_training_from_a_bucket(s3: S3, disttrain: Run, tmp_path: Path, seven_root: Path) -> None:
    (tmp_path / "seven.yaml").write_text(CONFIG)
    s3.upload(seven_root, "photos/prefix")

    def run(root: str, name: str, *settings: str) -> None:
        result = disttrain(
            "run", "seven.yaml", "--procs", "2", "--run-dir", name, f"data.root={root}", *settings,
            env={**s3.environment(), "DISTTRAIN_CACHE": str(tmp_path / f"cache of {name}")},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said.extend((result.stdout, result.stderr))

    said: list[str] = []
    run(str(seven_root), "local", "train.epochs=1")
    mirror = "checkpoint.mirror=s3://photos/mirror"
    run("s3://photos/prefix", "bucket", "train.epochs=1", "data.cache=none", mirror)
    assert ids_per_step(tmp_path / "bucket") == ids_per_step(tmp_path / "local") != {}
    assert computed_records(tmp_path / "bucket") == computed_records(tmp_path / "local")
    shards = [request for request in s3.requests if request.startswith("GET") and ".tar" in request]
    assert len(shards) == len(set(shards)) == 9  # once, although two ranks read them

    for path in (seven_root / "seven").glob("*.tar"):
        s3.delete(f"photos/prefix/seven/{path.name}")
    shutil.rmtree(tmp_path / "bucket")  # a fresh node: it goes on from the mirror, with the cache
    run("s3://photos/prefix", "bucket", "train.epochs=2", "data.cache=none", mirror)
    run(str(seven_root), "local", "train.epochs=2")
    second = {place: ids for place, ids in ids_per_step(tmp_path / "local").items() if place[0] == 2}
    assert ids_per_step(tmp_path / "bucket") == second != {}
    said += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in said if "secret-for-tests" in text or "key-for-tests" in text]
