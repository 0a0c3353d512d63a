"""One experiment gives one result, whatever starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit import PROGRAMS, REPOSITORY
from kit.commands import NO_LOG_FOLDER, Run, background, succeeded
from kit.marks import nightly
from kit.run_results import computed_records as records
from kit.run_results import ids_per_step, status


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path) -> Path:
    """The run folder of the small experiment on one rank, with traced samples."""
    folder = tmp_path_factory.mktemp("one-rank")
    (folder / "tiny.yaml").write_text(TINY)
    result = subprocess.run(
        [sys.executable, "-m", "disttrain", "run", "tiny.yaml", "--procs", "1", "--run-dir", "run"],
        cwd=folder,
        env=os.environ
        | {"DISTTRAIN_DATA": str(digits_root), "DISTTRAIN_CACHE": str(decoded_cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert succeeded(result)
    return folder / "run"


TINY = """
name: tiny
data: {name: digits}
augment: {crop_padding: 1, flip: true, cutout: 2, trivial_augment: true, random_erasing: 0.3}
model: {name: cnn_mnist}
train: {epochs: 2, batch_size: 48, trace_samples: true, label_smoothing: 0.1, precision: fp32,
        channels_last: true}
optim: {name: sgd, lr: 0.05}
schedule: {name: cosine, warmup_epochs: 1}
monitor:
  log_every_steps: 5
  on_end: echo "$DISTTRAIN_STATE" >>"$DISTTRAIN_RUN_DIR/ended"
"""

DOORS = {
    "disttrain run": ["-m", "disttrain", "run", "tiny.yaml", "--procs", "2"],
    "accelerate launch": [
        "-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "launch/cpu.yaml"),
        *NO_LOG_FOLDER, "--num_processes", "2", "-m", "disttrain.worker", "tiny.yaml",
    ],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", *NO_LOG_FOLDER,
                 "--nproc-per-node", "2", "-m", "disttrain.worker", "tiny.yaml"],
    "srun": [str(PROGRAMS / "two_slurm_tasks.py"), "tiny.yaml"],
}  # fmt: skip


@pytest.mark.parametrize("door", ["disttrain run", "accelerate launch", *nightly("torchrun", "srun")])
def test_two_ranks_train_as_one_does_through_every_door(
    door: str, tmp_path: Path, digits_root: Path, one_rank: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = subprocess.run(
        [sys.executable, *DOORS[door], "--run-dir", "run"],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert succeeded(result)
    assert status(tmp_path / "run")["world_size"] == 2
    assert (tmp_path / "run/ended").read_text() == "finished\n"
    assert ids_per_step(tmp_path / "run") == ids_per_step(one_rank)
    ours, theirs = records(tmp_path / "run"), records(one_rank)
    assert [set(record) for record in ours] == [set(record) for record in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.pop("loss") == pytest.approx(their.pop("loss"), abs=1e-5)
        for key in {
            "accuracy",
            "calibration_error",
            *filter(re.compile("macro_|top5_").match, our),
        } & our.keys():
            assert our.pop(key) == pytest.approx(their.pop(key), abs=0.02)
        our.pop("correct", None), their.pop("correct", None)
        assert our == their


ANOTHER_GROUP = {  # as a pod, an mpirun and a shell inside a Slurm step leave it
    "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "29500",
    "PMI_SIZE": "4", "PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "PET_NNODES": "2",
    "ACCELERATE_USE_FSDP": "true", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("processes", nightly("1", "2"))
def test_variables_of_another_group_do_not_reach_the_ranks(
    disttrain: Run, tmp_path: Path, processes: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ("--nodes", "1", "--procs", processes, "--run-dir", "run", "train.epochs=1")
    assert succeeded(disttrain("run", "tiny.yaml", *options, env=ANOTHER_GROUP))
    assert status(tmp_path / "run")["world_size"] == int(processes)
    assert succeeded(disttrain("eval", "run", "--procs", processes, env=ANOTHER_GROUP))


def test_accelerate_is_refused_when_it_is_set_to_train_without_ddp(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-m", "disttrain.worker", "tiny.yaml", "--run-dir", "run"],
        cwd=tmp_path,
        env=os.environ | {"ACCELERATE_USE_FSDP": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "ACCELERATE_USE_FSDP=true: disttrain trains with DDP only; unset it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_epoch_trains_on_every_sample_once(one_rank: Path) -> None:
    epochs: dict[int, list[int]] = {}
    for (epoch, _), ids in ids_per_step(one_rank).items():
        epochs.setdefault(epoch, []).extend(ids)
    assert sorted(epochs) == [1, 2]
    assert all(sorted(ids) == list(range(1438)) for ids in epochs.values())
    assert epochs[1] != epochs[2]


def test_a_last_batch_smaller_than_the_world(disttrain: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = disttrain(  # 1,438 = 1,437 + 1: the last batch has one sample for three ranks
        "run", "tiny.yaml", "--procs", "3", "--run-dir", "run", "train.batch_size=1437", "train.epochs=1"
    )
    assert succeeded(result)
    steps = ids_per_step(tmp_path / "run")
    assert sorted(len(ids) for ids in steps.values()) == [1, 1437]
    assert sorted(id_ for ids in steps.values() for id_ in ids) == list(range(1438))
    assert records(tmp_path / "run")[-1]["total"] == 359


def test_two_runs_at_once_do_not_meet(tmp_path: Path, config_file: Path, digits_root: Path) -> None:
    both = [
        background(["run", str(config_file), "--procs", "2", "--run-dir", name], tmp_path, digits_root)
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert records(tmp_path / "a") == records(tmp_path / "b")
