"""slurm/train.sh, and workers as tasks, under a real Slurm of two nodes with a network each."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import slurm_cluster
from slurm_cluster import CONTROL, Hosts

REAL = Path(os.environ.get("DISTTRAIN_TEST_DATA") or "/nonexistent")
SCRIPT = Path(__file__).parents[2] / "slurm/train.sh"
SAMPLES = 1438  # of the digits, to train on
FOUR_RANKS = ("--nodes=2", "--cpus-per-task=2")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.why_no_slurm()), reason=str(slurm_cluster.why_no_slurm())),
]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Iterator[Hosts]:
    own_bin = str(Path(sys.executable).parent)
    variables = {"PATH": f"{own_bin}:{slurm_cluster.search_path()}", "DISTTRAIN_DATA": str(digits_root)}
    variables["OMP_NUM_THREADS"] = "1"
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm"), env=variables) as hosts:
        yield hosts


def submit(cluster: Hosts, folder: Path, options: tuple[str, ...], *arguments: str | Path) -> Job:
    """Submits slurm/train.sh from a folder; the options are those of sbatch."""
    command = ["sbatch", "--parsable", *options, SCRIPT, *arguments]
    return Job(cluster, folder, cluster.on(CONTROL, *command, cwd=folder).strip())


class Job:
    """A job with slurm/train.sh that was submitted from a folder."""

    def __init__(self, cluster: Hosts, folder: Path, number: str) -> None:
        self._cluster, self._folder, self.number = cluster, folder, number

    @property
    def run_dir(self) -> Path:
        return self._folder / f"runs/slurm-{self.number}"

    def facts(self) -> dict[str, str]:
        shown = self._cluster.on(CONTROL, "scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def output(self) -> str:
        log = self._folder / f"disttrain-{self.number}.log"
        return log.read_text() if log.exists() else ""

    def status(self) -> dict[str, object]:
        status: dict[str, object] = json.loads((self.run_dir / "status.json").read_text())
        return status

    def wait_for_state(self, *states: str) -> None:
        self.wait_until(lambda: self.facts()["JobState"] in states, f"to be {states}")

    def wait_for_records(self, count: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, "for records")

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            logs = sorted(self.run_dir.glob("logs/*"))
            assert time.monotonic() < deadline, "\n".join(
                [f"job {self.number}: waited {what}", str(self.facts()), self.output()]
                + [f"{path.name}: {path.read_text()[-2000:]}" for path in logs]
            )
            time.sleep(0.2)


def assert_every_sample_once_an_epoch(run_dir: Path, epochs: int, samples: int = SAMPLES) -> None:
    seen: dict[int, list[int]] = {}
    for (epoch, _), ids in runs.ids_per_step(run_dir).items():
        seen.setdefault(epoch, []).extend(ids)
    assert [sorted(ids) for _, ids in sorted(seen.items())] == [list(range(samples))] * epochs


def test_two_processes_on_each_of_two_nodes(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    job = submit(cluster, tmp_path, FOUR_RANKS, config_file, "train.trace_samples=true", "--procs", "2")
    job.wait_for_state("COMPLETED", "FAILED")
    assert "finished: accuracy" in job.output()
    assert job.facts()["JobState"] == "COMPLETED"
    status = job.status()
    assert (status["state"], status["world_size"]) == ("finished", 4)
    assert status["samples_seen"] == 2 * SAMPLES
    assert_every_sample_once_an_epoch(job.run_dir, epochs=2)
    devices = json.loads((job.run_dir / "env.json").read_text())["devices"]
    assert [device["host"] for device in devices] == ["node0", "node0", "node1", "node1"]


@pytest.mark.skipif(not REAL.is_dir(), reason="DISTTRAIN_TEST_DATA is not set")
def test_mnist_on_two_nodes(cluster: Hosts, tmp_path: Path) -> None:
    cluster.env["DISTTRAIN_DATA"] = str(tmp_path / "data")
    prepare = ("data", "prepare", "mnist", "--source", REAL / "mnist")
    cluster.on("node0", sys.executable, "-m", "disttrain", *prepare, timeout=240)
    settings = ("train.epochs=1", "train.trace_samples=true", "train.precision=fp32", "--procs", "2")
    job = submit(cluster, tmp_path, FOUR_RANKS, SCRIPT.parents[1] / "configs/cnn_mnist.yaml", *settings)
    job.wait_for_state("COMPLETED", "FAILED")
    last = json.loads((job.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["total"] == 10_000
    assert last["accuracy"] > 0.9
    assert_every_sample_once_an_epoch(job.run_dir, epochs=1, samples=60_000)


def test_a_job_out_of_time_saves_requeues_and_goes_on_where_it_was(
    cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    epochs = 40
    settings = (f"train.epochs={epochs}", "train.trace_samples=true", "eval.every_epochs=20")
    job = submit(cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    job.wait_for_records(2)
    cluster.on(CONTROL, "scancel", "--signal=USR2", "--batch", job.number)  # as at the limit
    job.wait_for_state("PENDING", "COMPLETED", "FAILED")
    assert "saved, resumable" in job.output()
    assert "back into the queue" in job.output()
    stopped_at = job.status()["step"]
    wait_for_slurmstepd(cluster, job)
    cluster.on(CONTROL, "scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["Restarts"] == "1"
    assert re.search(rf"going on from \S+, step {stopped_at:,}\b", job.output())
    status = job.status()
    assert (status["state"], status["samples_seen"]) == ("finished", epochs * SAMPLES)
    assert_every_sample_once_an_epoch(job.run_dir, epochs)
    steps = [json.loads(line)["step"] for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def wait_for_slurmstepd(cluster: Hosts, job: Job) -> None:
    """Returns when slurmd takes the next batch script of a job: not in the second in which its last ended."""
    look = ("bash", "-c", "cat /proc/[0-9]*/comm")
    job.wait_until(lambda: "slurmstepd" not in cluster.on("node0", *look, check=False), "for slurmstepd")
    time.sleep(2)


def test_a_job_that_fails_is_not_requeued(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    job = submit(cluster, tmp_path, ("--nodes=1",), config_file, "data.name=nothing")
    job.wait_for_state("FAILED")
    assert job.facts()["ExitCode"] == "65:0"
    assert job.facts()["Restarts"] == "0"
    assert "there is no data set 'nothing'" in job.output()


def test_a_job_that_is_cancelled_stays_so(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    job = submit(cluster, tmp_path, ("--nodes=1",), config_file, "train.epochs=100000", "--procs", "1")
    job.wait_for_records(10)
    cluster.on(CONTROL, "scancel", job.number)
    job.wait_for_state("CANCELLED")
    wait_for_slurmstepd(cluster, job)
    facts = job.facts()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert list((job.run_dir / "checkpoints").glob("step_*/MANIFEST.json"))


def test_two_jobs_of_an_array_at_once_on_the_same_nodes(
    cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    array = submit(
        *(cluster, tmp_path, ("--nodes=2", "--array=0-1"), config_file),
        *("seed=%a", "train.epochs=15", "eval.every_epochs=5", "--procs", "1"),
    )

    def numbers() -> list[str]:
        return sorted(
            re.findall(r"\bJobId=(\d+)", cluster.on(CONTROL, "scontrol", "show", "job", array.number))
        )

    array.wait_until(lambda: len(numbers()) == 2, "for two jobs")
    jobs = [Job(cluster, tmp_path, number) for number in numbers()]
    for job in jobs:
        job.wait_for_state("COMPLETED", "FAILED")
        assert "finished: accuracy" in job.output()
    statuses = [job.status() for job in jobs]
    assert [status["world_size"] for status in statuses] == [2, 2]
    assert max(str(status["started_at"]) for status in statuses) < min(
        str(status["updated_at"]) for status in statuses
    ), "they were to run at the same time"
    seeds = {re.findall(r"^seed: (.*)", (job.run_dir / "config.yaml").read_text(), re.M)[0] for job in jobs}
    assert seeds == {"0", "1"}


def test_one_task_per_gpu_and_one_launcher_per_node_write_the_same(
    cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    settings = (config_file, "train.trace_samples=true")
    worker = 'echo sees $SLURM_LOCALID:$CUDA_VISIBLE_DEVICES; exec "$0" -m disttrain.worker "$@"'
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=2")
    command = ("srun", *options, "bash", "-c", worker, sys.executable, *settings, "--run-dir", "tasks")
    output = cluster.on(CONTROL, *command, cwd=tmp_path, timeout=240, env={"OMP_NUM_THREADS": ""})
    assert sorted(re.findall(r"^sees (\d:.*)", output, re.M)) == ["0:0", "0:0", "1:1", "1:1"]

    launch = [sys.executable, "-m", "disttrain", "run", *settings, "--procs", "2", "--run-dir", "launchers"]
    launch += ["--nodes", "2", "--master-addr", "node0", "--master-port", "29500", "--node-rank"]
    launchers = [
        cluster.start(host, [*launch, str(rank)], cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        for rank, host in enumerate(cluster.names)
    ]
    assert [launcher.wait(timeout=240) for launcher in launchers] == [0, 0]

    for name in ("tasks", "launchers"):
        facts = json.loads((tmp_path / name / "env.json").read_text())
        assert [device["host"] for device in facts["devices"]] == ["node0", "node0", "node1", "node1"]
        assert facts["threads"] == 2
        assert_every_sample_once_an_epoch(tmp_path / name, epochs=2)
    assert runs.ids_per_step(tmp_path / "tasks") == runs.ids_per_step(tmp_path / "launchers")
    assert runs.computed_records(tmp_path / "tasks") == runs.computed_records(tmp_path / "launchers")
