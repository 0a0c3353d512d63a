"""Runs that were made to have a problem, and the verdict on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import nvml
from kit.commands import Run
from kit.marks import nightly
from kit.run_results import status

MODEL = """
import os, time
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes, slow):
        wide = 4096 if slow == "link" else 1
        super().__init__(nn.Flatten(), nn.Linear(64, wide), nn.Linear(wide, num_classes))
        slow_ranks = {"rank": ["1"], "network": ["0"]}.get(slow, [])
        self.slow_s = 0.03 if os.environ.get("RANK", "0") in slow_ranks else 0.0
        if slow == "disk":
            pread = os.pread
            def reading(*arguments):
                time.sleep(0.001)
                return pread(*arguments)
            os.pread = reading
        if slow == "gpu":
            stand_in()
            self.slow_s = 0.03

    def forward(self, images):
        time.sleep(self.slow_s)
        return super().forward(images)


def stand_in():
    from types import SimpleNamespace
    import torch
    from disttrain.monitor import gauges
    describe, gpu = gauges.describe_device, SimpleNamespace(uuid=os.environ["GPU"], name="as torch says")
    torch.cuda.get_device_properties = lambda device: gpu
    gauges.describe_device = lambda device: describe(torch.device("cuda", 0))
"""


def check(
    result: subprocess.CompletedProcess[str], run_dir: Path, name: str, words: list[str]
) -> dict[str, Any]:
    """Checks the verdict on a run that has ended well, and returns it."""
    assert result.returncode == 0, result.stderr
    verdict: dict[str, Any] = status(run_dir)["verdict"]
    assert verdict["name"] == name, verdict
    for word in words:
        assert word in verdict["text"]
    return verdict


@pytest.mark.parametrize(
    ("problem", "procs", "options", "name", "words"),
    [
        ("rank", 2, [], "straggler", ["rank 1 on "]),
        ("disk", 1, ["data.cache=none", "data.workers=1"], "input-bound", ["data.cache=host"]),
        *nightly(("network", 1, [], "compute-bound", [])),
    ],
)
def test_a_problem_is_named(
    problem: str,
    procs: int,
    options: list[str],
    name: str,
    words: list[str],
    disttrain: Run,
    tmp_path: Path,
    config_file: Path,
) -> None:
    (tmp_path / "slow.py").write_text(MODEL)
    model = ["model.name=slow:Net", f"model.args.slow={problem}"]
    result = disttrain("run", config_file, *model, *options, "--procs", str(procs), "--run-dir", "run")
    verdict = check(result, tmp_path / "run", name, words)
    assert f"verdict: {verdict['text']}" in result.stdout


@pytest.mark.parametrize(
    ("gpu", "trouble", "name", "words"),
    [
        (7, {"FAKE_NVML_THROTTLE": "7:64"}, "throttled", ["GPU 7 on ", "lowered its clocks in 100 %"]),
        (3, {}, "launch-bound", ["busy 35 % of the time", "train.batch_size"]),
        *nightly(
            (7, {"FAKE_NVML_USED": "7:80000"}, "memory-tight", ["97 %", "train.accumulate"]),
            (7, {}, "compute-bound", ["train.precision=bf16"]),
        ),
    ],
)
def test_the_trouble_of_a_gpu_is_named(
    gpu: int,
    trouble: dict[str, str],
    name: str,
    words: list[str],
    disttrain: Run,
    tmp_path: Path,
    config_file: Path,
) -> None:
    """A processor computes in place of the GPU, whose readings are those of the stand-in for NVML."""
    (tmp_path / "slow.py").write_text(MODEL)
    result = disttrain(
        *("run", config_file, "model.name=slow:Net", "model.args.slow=gpu", "train.precision=fp32"),
        *("monitor.gpu_interval_s=0.1", "--procs", "1", "--run-dir", "run"),
        env={
            "LD_LIBRARY_PATH": str(nvml.build(tmp_path)),
            "FAKE_NVML_GPUS": "8",
            "GPU": nvml.UUIDS[gpu].removeprefix("GPU-"),
            **trouble,
        },
    )
    check(result, tmp_path / "run", name, words)


SLOW_LINK = """
ip link set lo up
tc qdisc add dev lo root tbf rate 200mbit burst 256kb latency 500ms
exec "$@"
"""


@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("tc")), reason="needs unshare and tc (iproute2)"
)
@pytest.mark.nightly
def test_a_link_that_is_too_slow_for_the_gradients(
    tmp_path: Path, digits_root: Path, config_file: Path
) -> None:
    own_network = ["unshare", "--net", "--map-root-user", "sh", "-ec", SLOW_LINK, "sh"]
    if subprocess.run([*own_network, "true"], capture_output=True).returncode:
        pytest.skip("a network of its own with a slow link is not allowed here")
    (tmp_path / "slow.py").write_text(MODEL)
    command = [sys.executable, "-m", "disttrain", "run", config_file, "--procs", "2", "--run-dir", "run"]
    result = subprocess.run(
        [*own_network, *command, "model.name=slow:Net", "model.args.slow=link"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        timeout=240,
    )
    verdict = check(result, tmp_path / "run", "communication-bound", ["train.batch_size", "fewer processes"])
    assert verdict["key"] == "train.batch_size"
