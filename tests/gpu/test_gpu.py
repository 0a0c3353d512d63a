"""What only a GPU decides: precisions, where the data lives, and whose readings are shown."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttrain import checkpoint
from disttrain.telemetry import visible_gpus

pytestmark = pytest.mark.gpu

Run = Callable[..., subprocess.CompletedProcess[str]]


def trained(result: subprocess.CompletedProcess[str], run_dir: Path) -> list[dict[str, Any]]:
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("cache", ["device", "host", "none"])
def test_precisions_and_caches_learn_the_digits(
    precision: str, cache: str, disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    arguments = [f"train.precision={precision}", f"data.cache={cache}", "train.epochs=6"]
    records = trained(
        disttrain("run", config_file, "--gpus", "1", *arguments, "--run-dir", "run"), tmp_path / "run"
    )
    assert records[-1]["total"] == 359
    assert records[-1]["accuracy"] > 0.9
    choices = json.loads((tmp_path / "run/env.json").read_text())["choices"]
    assert choices["cache"].startswith(f"{cache}:")


def test_compiled_model_and_muon_train(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    arguments = ["train.compile=true", "optim.name=muon", "augment.mixup=0.2", "augment.crop_padding=1"]
    result = disttrain("run", config_file, "--gpus", "1", *arguments, "--run-dir", "run")
    assert trained(result, tmp_path / "run")


def test_speednet_and_a_checkpoint_from_the_device(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    groups = "optim.groups=[{parameters: '.*bias', name: sgd, lr: 1.0}]"
    pack = ["data", "pack", str(images(tmp_path)), "--name", "squares", "--val-fraction", "0.2"]
    packed = disttrain(*pack, "--root", "sets")
    assert packed.returncode == 0, packed.stderr
    arguments = [
        "model.name=speednet",
        "optim.name=muon",
        groups,
        "train.batch_size=32",
        "eval.tta=multi_view",
    ]
    data = ["data.name=squares", "data.root=sets", "checkpoint.every_steps=2"]
    result = disttrain("run", config_file, "--gpus", "1", *arguments, *data, "--run-dir", "run")
    assert trained(result, tmp_path / "run")[-1]["tta"] == "multi_view"
    verified = checkpoint.load(tmp_path / "run/checkpoints/latest")
    assert verified.parts["model"]["head.weight"].isfinite().all()


def images(folder: Path) -> Path:
    """Writes two classes of random images of 32x32."""
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(80):
            pixels = random.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    return folder / "images"


def test_the_bench_measures_a_gpu(disttrain: Run, config_file: Path) -> None:
    done = disttrain("bench", config_file, "--gpus", "1", "--seconds", "0.2", "--json", "data.cache=host")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["phases_s"]["host to device"] > 0
    assert {row["precision"] for row in found["table"]} == {"fp32", "tf32", "bf16", "fp16"}
    assert all(row["pass_s"] for row in found["table"])


def test_readings_are_those_of_the_gpu_that_trains(
    disttrain: Run, tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = visible_gpus()[-1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", last.uuid)
    records = trained(disttrain("run", config_file, "--run-dir", "run", "train.epochs=40"), tmp_path / "run")
    (gpu,) = [record for record in records if record["kind"] == "train"][-1]["gpus"]
    assert (gpu["uuid"], gpu["index"], gpu["name"]) == (last.uuid, last.index, last.name)
    assert 0 < gpu["memory_used_mib"] <= gpu["memory_total_mib"]
    samples = [json.loads(line) for line in (tmp_path / "run/gpu.jsonl").read_text().splitlines()]
    assert {sample["uuid"] for sample in samples} == {last.uuid}


def test_gpu_and_cpu_train_alike(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    on_gpu = disttrain("run", config_file, "--gpus", "1", "train.precision=fp32", "--run-dir", "gpu")
    on_cpu = disttrain("run", config_file, "--procs", "1", "train.precision=fp32", "--run-dir", "cpu")
    losses = [
        [record["loss"] for record in trained(result, tmp_path / name)]
        for result, name in ((on_gpu, "gpu"), (on_cpu, "cpu"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.skipif(len(visible_gpus()) < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_does(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    losses = []
    for gpus in ("1", "2"):
        result = disttrain(
            "run", config_file, "--gpus", gpus, "train.precision=fp32", "--run-dir", f"run{gpus}"
        )
        losses.append([record["loss"] for record in trained(result, tmp_path / f"run{gpus}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
