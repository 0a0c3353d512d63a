"""Photos of several sizes from a folder to a trained model, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.commands import Run, succeeded
from kit.photos import write_folder
from kit.resumed import digest
from kit.run_results import computed_records, ids_per_step, metrics
from kit.server import Server

pytestmark = pytest.mark.integration

CONFIG = """\
name: photos
data: {name: photos, image_size: 24}
augment: {resized_crop: 0.3, flip: true, cutmix: 1.0}
model: {name: lenet_bn}
train: {epochs: 2, batch_size: 12, reproducible: true, virtual_ranks: 6, trace_samples: true}
optim: {lr: 0.05, momentum: 0.9}
"""


def test_photos_train_the_same_on_any_ranks_and_from_a_server(disttrain: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "files")
    root = {"DISTTRAIN_DATA": str(tmp_path / "root")}
    packed = disttrain("data", "pack", "files", "--name", "photos", "--shard-mib", "0.03", env=root)
    assert succeeded(packed)
    assert "images   RGB, 40x37 to 130x128 pixels, 3 classes" in packed.stdout
    assert "train    shorter side        1 to 64:        45 #####" in packed.stdout
    (tmp_path / "photos.yaml").write_text(CONFIG)

    refused = disttrain("run", "photos.yaml", "--procs", "1", "data.image_size=null", env=root)
    assert refused.returncode == 2
    assert "several sizes, 40x37 to 130x128; set data.image_size" in refused.stderr

    assert succeeded(disttrain("run", "photos.yaml", "--procs", "1", "--run-dir", "one", env=root))
    server = Server(tmp_path / "root")
    try:
        two = ("run", "photos.yaml", "--procs", "2", "--run-dir", "two", f"data.root={server.url}")
        assert succeeded(disttrain(*two, "train.epochs=1", env=root))
        assert succeeded(disttrain(*two, env=root))  # goes on
    finally:
        server.close()
    one, two_ = tmp_path / "one", tmp_path / "two"
    assert ids_per_step(two_) == ids_per_step(one)
    assert digest(two_) == digest(one)  # only the same pixels give the same weights

    (result,) = [record for record in metrics(one) if record["kind"] == "eval" and record["epoch"] == 2]
    evaluated = disttrain("eval", "one", "--procs", "1", "--checkpoint", "latest", "--json", env=root)
    assert succeeded(evaluated)
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    predicted = disttrain("predict", "one", "files/val", "--checkpoint", "latest", "--json", env=root)
    assert succeeded(predicted)
    rows = [json.loads(line) for line in predicted.stdout.splitlines()]
    hits = sum(row["class"] == Path(row["image"]).parent.name for row in rows)
    assert (len(rows), hits) == (12, result["correct"])  # predict crops as the evaluation does
    assert computed_records(one)


@pytest.mark.nightly
def test_the_loader_alone_is_measured_on_photos(disttrain: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "files")
    root = {"DISTTRAIN_DATA": str(tmp_path / "root")}
    assert succeeded(disttrain("data", "pack", "files", "--name", "photos", env=root))
    refused = disttrain("data", "bench", "photos", env=root)
    assert refused.returncode == 2
    assert "--image-size" in refused.stderr
    measured = disttrain(
        *("data", "bench", "photos", "--image-size", "24", "--batch-size", "8", "--samples", "90", "--json"),
        env=root,
    )
    assert succeeded(measured)
    names = [stage["name"] for stage in json.loads(measured.stdout)]
    assert names[-2:] == ["streamed epoch", "stock webdataset"]
    assert "decode once" not in names
