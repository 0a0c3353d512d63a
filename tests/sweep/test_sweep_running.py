"""How a sweep deals out the machine, and what it sends to Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.errors import UsageError
from disttrain.monitor.nvml import Gpu
from disttrain.sweep.folder import SweepFolder
from disttrain.sweep.plan import plan_runs
from disttrain.sweep.running import exit_code, share_machine
from disttrain.sweep.slurm import plan_array
from kit import REPOSITORY

GPUS = [Gpu(number, f"GPU-{number}", "NVIDIA H100", 81559) for number in range(8)]


def shares(jobs: int, **how: object) -> list[dict[str, str]]:
    given = {"gpus": None, "procs": None, "visible": GPUS, "cores": 32, "environ": {}} | how
    return [place.environ for place in share_machine(jobs, **given)]  # type: ignore[arg-type]


def test_gpus_and_cores_are_dealt_out_evenly() -> None:
    assert shares(1) == [{}]
    assert shares(4)[:2] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1", "OMP_NUM_THREADS": "4"},
        {"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-3", "OMP_NUM_THREADS": "4"},
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(3, gpus=1)] == ["GPU-0", "GPU-1", "GPU-2"]
    assert shares(2, procs=2, cores=8) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert shares(4, visible=[], cores=2, environ={"OMP_NUM_THREADS": "3"}) == [{"OMP_NUM_THREADS": "3"}] * 4


@pytest.mark.parametrize(
    ("jobs", "how", "words"),
    [
        (9, {}, "--jobs 9 needs 9 GPUs, but this machine has 8 visible"),
        (4, {"gpus": 3}, "--jobs 4 needs 12 GPUs"),
        (2, {"gpus": 1, "procs": 1}, "cannot be combined"),
        (1, {"gpus": 1, "visible": []}, "no usable GPU"),
    ],
)
def test_more_gpus_than_there_are(jobs: int, how: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shares(jobs, **how)


@pytest.mark.parametrize(
    ("codes", "expected"), [([0, 0], 0), ([0, 75, 70, 65], 70), ([0, 75, 0], 75), ([], 0), ([75, 137], 137)]
)
def test_the_first_failure_is_the_exit_code(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_an_array_for_slurm() -> None:
    folder, runs = SweepFolder(Path("runs/s")), plan_runs(["seed=0..2", "model.args={a: 1}"])
    given = {"script": REPOSITORY / "slurm/train.sh", "stamp": "now", "options": ["--procs", "2"]}
    array = plan_array(folder, runs, **given, jobs=2, sbatch=["--nodes=2", "--time=1"])
    assert array.command == [
        *("sbatch", "--parsable", "--array=0-2%2", "--output=runs/s/logs/slurm-%A_%a.log"),
        *("--nodes=2", "--time=1", str(REPOSITORY / "slurm/train.sh"), "--sweep", "runs/s/array-now.tsv"),
    ]
    assert array.lines[1].split("\t") == [
        *("runs/s/experiment.yaml", "seed=1", "model.args={a: 1}"),
        *("--run-dir", "runs/s/seed=1", "--procs", "2\n"),
    ]
    with pytest.raises(UsageError, match="has a tab or a new line"):
        plan_array(folder, plan_runs(["seed=1,2", "name='a\tb'"]), **given, jobs=None, sbatch=[])
