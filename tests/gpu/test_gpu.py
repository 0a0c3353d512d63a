"""What only a GPU decides: precisions, where the data lives, and whose readings are shown."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttrain.monitor.nvml import node_gpus, visible_gpus
from disttrain.monitor.readings import GpuReaders
from disttrain.runs import checkpoint
from disttrain.runs.records import READINGS
from kit.commands import Run
from kit.run_results import status

pytestmark = pytest.mark.gpu


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
    timed = [record["phases_ms"] for record in records if record["kind"] == "train"]
    assert all(phases[name] > 0 for phases in timed for name in ("data", "to_device", "compute", "optimizer"))


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


def test_a_batch_too_small_for_a_gpu_is_named(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    tiny = ["train.batch_size=2", "train.epochs=10", "train.compile=false", "train.cuda_graph=false"]
    records = trained(
        disttrain("run", config_file, "--gpus", "1", *tiny, "--run-dir", "run"), tmp_path / "run"
    )
    verdict = status(tmp_path / "run")["verdict"]
    assert verdict["name"] == "launch-bound", verdict
    peak = json.loads((tmp_path / "run/env.json").read_text())["device_peak_flops_per_s"]
    shares = [record["mfu_pct"] for record in records if record["kind"] == "train"]
    assert all((share is None) == (peak is None) for share in shares)
    assert peak is None or max(shares) < 5


def test_the_bench_measures_a_gpu(disttrain: Run, config_file: Path) -> None:
    done = disttrain("bench", config_file, "--gpus", "1", "--seconds", "0.2", "--json", "data.cache=host")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["phases_s"]["to_device"] > 0
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
    assert set(READINGS) <= samples[0].keys()
    if not last.uuid.startswith("MIG-"):
        assert 0 < gpu["power_w"] < 1.2 * gpu["power_limit_w"]
        assert 0 <= gpu["memory_utilization_pct"] <= 100
        assert gpu["sm_clock_mhz"] > 0
        assert gpu["critical_events"] in (0, None)


def nvidia_smi(*fields: str, what: str = "gpu") -> list[dict[str, str]]:
    """Returns what nvidia-smi says, a row for each GPU or process."""
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, row, strict=True)) for row in rows]


def known(text: str) -> float | None:
    """Returns a number of nvidia-smi's, None for `[N/A]` and its like."""
    return None if text.startswith(("[", "N/A")) else float(text)


WHOLE = [gpu for gpu in node_gpus() if gpu.uuid.startswith("GPU-")]


def test_gpus_are_those_of_nvidia_smi() -> None:
    said = nvidia_smi("index", "uuid", "name", "memory.total")
    ours = [[str(gpu.index), gpu.uuid, gpu.name, str(gpu.memory_total_mib)] for gpu in WHOLE]
    assert ours == [list(row.values()) for row in said]


def test_readings_are_those_of_nvidia_smi() -> None:
    near = {  # what moves from one moment to the next, and how far it may
        "memory.used": ("memory_used_mib", 256),
        "temperature.gpu": ("temperature_c", 5),
        "power.draw": ("power_w", 60),
        "clocks.mem": ("memory_clock_mhz", 3000),
        "clocks.sm": ("sm_clock_mhz", 1500),
        "enforced.power.limit": ("power_limit_w", 0.1),
        "memory.total": ("memory_total_mib", 0),
        "ecc.errors.corrected.volatile.total": ("ecc_corrected", 1000),
        "ecc.errors.uncorrected.volatile.total": ("ecc_uncorrected", 0),
    }
    with GpuReaders([gpu.uuid for gpu in WHOLE], (), print) as readers:
        readers.sweep()
        readings = readers.sweep()
        said = nvidia_smi(*near)
    for reading, row in zip(readings, said, strict=True):
        assert reading is not None
        for field, (key, distance) in near.items():
            assert (reading[key] is None) == (known(row[field]) is None), key
            if reading[key] is not None:
                assert reading[key] == pytest.approx(known(row[field]), abs=distance), key
        assert reading["lost"] is False


@pytest.mark.skipif(len(visible_gpus()) != len(WHOLE), reason="the test chooses from all whole GPUs")
@pytest.mark.parametrize("way", ["index", "uuid", "abbreviated"])
def test_torch_devices_are_matched_in_any_order(way: str) -> None:
    chosen = WHOLE[::-1]
    spelled = {"index": "{0.index}", "uuid": "{0.uuid}", "abbreviated": "{0.uuid:.13}"}[way]
    program = """
import json, torch
from disttrain.monitor.gauges import describe_device
devices = [describe_device(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
print(json.dumps([[each["index"], each["uuid"], each["memory_total_mib"]] for each in devices]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(spelled.format(gpu) for gpu in chosen),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[gpu.index, gpu.uuid, gpu.memory_total_mib] for gpu in chosen]


def test_a_busy_gpu_is_seen_to_be_busy() -> None:
    gpu = visible_gpus()[0]
    program = """
import sys, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print(list(torch.cuda.get_device_capability()), flush=True)
while True:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        capability = json.loads(child.stdout.readline())
        with GpuReaders([gpu.uuid], [child.pid], print) as readers:
            time.sleep(3)
            readers.sweep()
            time.sleep(2)
            (reading,) = readers.sweep()
        said = {row["pid"]: row for row in nvidia_smi("pid", "used_memory", what="compute-apps")}
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    assert reading is not None
    if not gpu.uuid.startswith("MIG-"):
        assert reading["utilization_pct"] > 80
        assert reading["power_w"] > 0.3 * reading["power_limit_w"]
    if capability[0] >= 9:
        assert reading["sm_activity_pct"] > 50
        assert reading["tensor_activity_pct"] > 10
    ours = said.get(str(child.pid))  # nvidia-smi too sees no process from inside most containers
    expected = None if ours is None else known(ours["used_memory"])
    assert reading["memory_used_by_us_mib"] == (None if expected is None else pytest.approx(expected, abs=64))


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
