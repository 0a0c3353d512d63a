"""slurm/train.sh, and workers as tasks, under a real Slurm of two nodes with a network each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit import REPOSITORY, run_results, slurm_cluster
from kit.commands import NO_LOG_FOLDER, wait_for
from kit.marks import nightly
from kit.resumed import digest
from kit.slurm_cluster import CONTROL, Hosts
from kit.supervision import SLOW

REAL = Path(os.environ.get("DISTTRAIN_TEST_DATA") or "/nonexistent")
SCRIPT = REPOSITORY / "slurm/train.sh"
SAMPLES = 1438  # of the digits, to train on
TINY = """
name: tiny
data: {name: digits}
model: {name: cnn_mnist}
train: {epochs: 2, batch_size: 64, trace_samples: true, precision: fp32, channels_last: true}
optim: {name: adam, lr: 1e-2}
monitor: {log_every_steps: 5}
"""
FOUR_RANKS = ("--nodes=2", "--cpus-per-task=2")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.why_no_slurm()), reason=str(slurm_cluster.why_no_slurm())),
]


def variables(digits_root: Path, cache: Path) -> dict[str, str]:
    own_bin = str(Path(sys.executable).parent)
    return {
        "PATH": f"{own_bin}:{slurm_cluster.search_path()}",
        "DISTTRAIN_DATA": str(digits_root),
        "DISTTRAIN_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path
) -> Iterator[Hosts]:
    """The two nodes of all tests that leave them as they were."""
    env = variables(digits_root, decoded_cache)
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm"), env=env) as hosts:
        yield hosts


@pytest.fixture
def own_cluster(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    digits_root: Path,
    decoded_cache: Path,
) -> Iterator[Hosts]:
    """Two nodes for a test that breaks them, or wants other settings of Slurm."""
    env = variables(digits_root, decoded_cache)
    settings = getattr(request, "param", {})
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm"), env=env, **settings) as hosts:
        yield hosts


def submit(cluster: Hosts, folder: Path, options: tuple[str, ...], *arguments: str | Path) -> Job:
    """Submits slurm/train.sh from a folder; the options are those of sbatch."""
    command = ["sbatch", "--parsable", *options, SCRIPT, *arguments]
    return Job(cluster, folder, cluster.on(CONTROL, *command, cwd=folder).strip())


class Job:
    """A job with slurm/train.sh that was submitted from a folder."""

    def __init__(self, cluster: Hosts, folder: Path, number: str) -> None:
        self._cluster, self._folder, self.number = cluster, folder, number
        self.run_dir = folder / f"runs/slurm-{number}"

    def facts(self) -> dict[str, str]:
        shown = self._cluster.on(CONTROL, "scontrol", "show", "job", self.number)
        jobs = [dict(re.findall(r"(\w+)=(\S*)", job)) for job in shown.split("\n\n")]
        # By the number of an array, which is that of one of its jobs too, Slurm shows all of them.
        return next(job for job in jobs if job.get("JobId") == self.number)

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
    for (epoch, _), ids in run_results.ids_per_step(run_dir).items():
        seen.setdefault(epoch, []).extend(ids)
    assert [sorted(ids) for _, ids in sorted(seen.items())] == [list(range(samples))] * epochs


@pytest.mark.nightly
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


@pytest.mark.nightly
@pytest.mark.skipif(not REAL.is_dir(), reason="DISTTRAIN_TEST_DATA is not set")
def test_mnist_on_two_nodes(cluster: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "DISTTRAIN_DATA", str(tmp_path / "data"))
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
    assert requeued(cluster, tmp_path, config_file).status()["state"] == "finished"


@pytest.mark.nightly
@pytest.mark.parametrize("own_cluster", [{"proctrack": "linuxproc"}], indirect=True)
def test_the_same_where_signals_reach_all_processes_of_a_task(
    own_cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    assert requeued(own_cluster, tmp_path, config_file).status()["state"] == "finished"


def requeued(cluster: Hosts, tmp_path: Path, config_file: Path) -> Job:
    """Returns a job that was stopped as at its time limit, and has gone on."""
    epochs = 40
    settings = (f"train.epochs={epochs}", "train.trace_samples=true", "eval.every_epochs=20")
    job = submit(cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    job.wait_for_records(2)
    cluster.on(CONTROL, "scancel", "--signal=USR2", "--batch", job.number)  # as at the limit
    job.wait_for_state("PENDING", "COMPLETED", "FAILED")
    assert "saved, resumable" in job.output()
    assert "requeueing the job" in job.output()
    stopped_at = job.status()["step"]
    wait_for_slurmstepd(cluster, job)
    cluster.on(CONTROL, "scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["Restarts"] == "1"
    assert re.search(rf"resuming from \S+, step {stopped_at:,}\b", job.output())
    status = job.status()
    assert (status["state"], status["samples_seen"]) == ("finished", epochs * SAMPLES)
    assert_every_sample_once_an_epoch(job.run_dir, epochs)
    steps = [json.loads(line)["step"] for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    return job


def wait_for_slurmstepd(cluster: Hosts, job: Job) -> None:
    """Returns when slurmd takes the next batch script of a job: not in the second in which its last ended."""
    look = ("bash", "-c", "cat /proc/[0-9]*/comm")
    job.wait_until(lambda: "slurmstepd" not in cluster.on("node0", *look, check=False), "for slurmstepd")
    time.sleep(2)


def test_a_job_that_fails_is_not_requeued(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    job = submit(cluster, tmp_path, ("--nodes=2",), config_file, "data.name=nothing")
    job.wait_for_state("FAILED")
    assert job.facts()["ExitCode"] == "65:0"
    assert job.facts()["Restarts"] == "0"
    assert "there is no data set 'nothing'" in job.output()


@pytest.mark.nightly
def test_a_job_that_is_cancelled_stays_so(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    job = submit(cluster, tmp_path, ("--nodes=1",), config_file, "train.epochs=100000", "--procs", "1")
    job.wait_for_records(10)
    cluster.on(CONTROL, "scancel", job.number)
    job.wait_for_state("CANCELLED")
    wait_for_slurmstepd(cluster, job)
    facts = job.facts()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert list((job.run_dir / "checkpoints").glob("step_*/MANIFEST.json"))


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_a_sweep_is_one_array_of_jobs(cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    sweep = ("disttrain", "sweep", config_file, "seed=0,1", "model.args={}", "--sweep-dir", "s", "--slurm")
    sweep += ("--procs", "1", "--jobs", "1", "--script", SCRIPT, "--sbatch", "--nodes=1 --cpus-per-task=1")
    output = cluster.on(CONTROL, *sweep, cwd=tmp_path)
    number = re.findall(r"^job (\d+); its results so far: disttrain report s$", output, re.M)[0]
    array = Job(cluster, tmp_path, number)
    array.wait_until(lambda: not cluster.on(CONTROL, "squeue", "--noheader"), "for the array to end")
    logs = {path.name for path in (tmp_path / "s/logs").iterdir()}
    assert logs == {f"slurm-{number}_{index}.log" for index in (0, 1)}
    assert "0 of them left to train" in cluster.on(CONTROL, *sweep, "--dry-run", cwd=tmp_path)
    assert "n = 2" in cluster.on(CONTROL, "disttrain", "report", "s", cwd=tmp_path)


@pytest.fixture(scope="module")
def tasks(cluster: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one task per GPU, started by srun alone."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tiny.yaml").write_text(TINY)
    task = 'echo sees $SLURM_LOCALID:$CUDA_VISIBLE_DEVICES; exec "$0" -m disttrain.worker "$@"'
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=2")
    arguments = (sys.executable, "tiny.yaml", "--run-dir", "run")
    command = ("srun", *options, "bash", "-c", task, *arguments)
    output = cluster.on(CONTROL, *command, cwd=folder, timeout=240, env={"OMP_NUM_THREADS": ""})
    assert sorted(re.findall(r"^sees (\d:.*)", output, re.M)) == ["0:0", "0:0", "1:1", "1:1"]
    return folder / "run"


DOORS: dict[str, list[str]] = {
    "disttrain run": [
        *("disttrain", "run", "tiny.yaml", "--procs", "2", "--nodes", "2"),
        *("--master-addr", "node0", "--master-port", "29500", "--run-dir", "run", "--node-rank"),
    ],
    "torchrun": [
        *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "node0"),
        *("--master-port", "29501", *NO_LOG_FOLDER, "--node-rank"),
    ],
    "accelerate launch": [
        *("accelerate.commands.launch", "--num_machines", "2", "--num_processes", "4", "--config_file"),
        *(str(SCRIPT.parents[1] / "launch/cpu.yaml"), "--main_process_ip", "node0"),
        *("--main_process_port", "29502", *NO_LOG_FOLDER, "--machine_rank"),
    ],
}


@pytest.mark.nightly
@pytest.mark.parametrize("door", DOORS)
def test_one_task_per_gpu_and_every_other_door_write_the_same(
    cluster: Hosts, tmp_path: Path, tasks: Path, door: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    worker = [] if door == "disttrain run" else ["-m", "disttrain.worker", "tiny.yaml", "--run-dir", "run"]
    nodes = [
        cluster.start(
            host,
            [sys.executable, "-m", *DOORS[door], str(rank), *worker],
            cwd=tmp_path,
            env={"OMP_NUM_THREADS": "2"},
        )
        for rank, host in enumerate(cluster.names)
    ]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    for run_dir in (tasks, tmp_path / "run"):
        facts = json.loads((run_dir / "env.json").read_text())
        assert [device["host"] for device in facts["devices"]] == ["node0", "node0", "node1", "node1"]
        assert facts["threads"] == 2
        assert_every_sample_once_an_epoch(run_dir, epochs=2)
    assert run_results.ids_per_step(tmp_path / "run") == run_results.ids_per_step(tasks)
    assert run_results.computed_records(tmp_path / "run") == run_results.computed_records(tasks)


@pytest.mark.nightly
def test_a_job_that_began_on_two_nodes_goes_on_on_one(
    cluster: Hosts, tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.env, "RUN_DIR", "runs/moved")
    monkeypatch.setitem(cluster.env, "MAX_REQUEUES", "0")
    settings = ("train.epochs=12", "train.trace_samples=true", "eval.every_epochs=6")
    first = submit(cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    first.run_dir = tmp_path / "runs/moved"
    first.wait_for_records(2)
    cluster.on(CONTROL, "scancel", "--signal=USR2", "--batch", first.number)
    first.wait_for_state("FAILED", "COMPLETED")
    assert first.facts()["ExitCode"] == "75:0", first.output()
    assert "after 0 requeues" in first.output()
    second = submit(
        cluster, tmp_path, ("--nodes=1", "--cpus-per-task=2"), config_file, *settings, "--procs", "2"
    )
    second.run_dir = first.run_dir
    second.wait_for_state("COMPLETED", "FAILED")
    assert "finished: accuracy" in second.output()
    assert second.status()["world_size"] == 2
    assert_every_sample_once_an_epoch(second.run_dir, epochs=12)
    third = submit(cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    third.wait_for_state("COMPLETED", "FAILED")
    assert third.facts()["JobState"] == "COMPLETED", third.output()
    assert third.output().count("this run has already finished") == 2  # said by each node


@pytest.mark.nightly
def test_a_requeued_job_on_two_nodes_gives_the_bits_of_one_process(
    cluster: Hosts, tmp_path: Path, config_file: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_DATA", str(digits_root))
    monkeypatch.setitem(cluster.env, "RUN_DIR", "runs/bits")
    settings = ("train.epochs=12", "train.reproducible=true", "train.virtual_ranks=4")
    begun = ["disttrain", "run", str(config_file), *settings, "--procs", "1", "--run-dir"]
    subprocess.run([*begun, "whole"], cwd=tmp_path, check=True)
    first = subprocess.Popen([*begun, "runs/bits"], cwd=tmp_path)
    metrics = tmp_path / "runs/bits/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, first)
    first.terminate()
    assert first.wait(timeout=60) == 75
    job = submit(cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    job.run_dir = tmp_path / "runs/bits"
    job.wait_for_records(metrics.read_text().count("\n") + 4)
    cluster.on(CONTROL, "scancel", "--signal=USR2", "--batch", job.number)
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["Restarts"] == "1", job.output()
    assert job.status()["world_size"] == 4
    assert digest(job.run_dir) == digest(tmp_path / "whole")
    assert run_results.computed_records(job.run_dir) == run_results.computed_records(tmp_path / "whole")


def release(cluster: Hosts, job: Job, nodes: int) -> float:
    """Returns the seconds until a job is over and its nodes that live are idle."""
    begin = time.monotonic()
    count = ("sinfo", "-h", "-t", "idle", "-o", "%D")
    job.wait_until(lambda: cluster.on(CONTROL, *count).split() == [str(nodes)], "for idle nodes", 60)
    return time.monotonic() - begin


def long_job(cluster: Hosts, folder: Path, config_file: Path) -> Job:
    """Returns a job of two nodes that trains, and would for hours."""
    job = submit(cluster, folder, FOUR_RANKS, config_file, "train.epochs=100000", "--procs", "2")
    job.wait_for_records(3)
    return job


@pytest.mark.nightly
def test_a_rank_that_is_killed_on_the_second_node_releases_both(
    cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    job = long_job(cluster, tmp_path, config_file)
    last = json.loads((job.run_dir / "env.json").read_text())["devices"][3]
    assert last["host"] == "node1"
    cluster.on("node1", "kill", "-KILL", str(last["pid"]))
    assert release(cluster, job, nodes=2) < 15
    assert job.facts()["ExitCode"] == "70:0"
    assert "rank 3 on node1 was killed by SIGKILL" in job.output()
    status = job.status()
    assert (status["state"], status["rank"], status["host"]) == ("failed", 3, "node1")


@pytest.mark.parametrize("how", nightly("killed", "unplugged"))
def test_a_node_that_is_gone_is_named_and_the_other_released(
    own_cluster: Hosts, tmp_path: Path, config_file: Path, how: str
) -> None:
    job = long_job(own_cluster, tmp_path, config_file)
    if how == "killed":
        own_cluster.kill("node1")
    else:
        own_cluster.unplug("node1")
    begin = time.monotonic()
    job.wait_until(lambda: "is gone" in job.output(), "for the failure", 60)
    named_s = time.monotonic() - begin
    assert "node 1 (node1) is gone" in job.output()
    assert (job.status()["state"], job.status()["host"]) == ("failed", "node1")
    idle = ("sinfo", "-h", "-n", "node0", "-t", "idle", "-o", "%D")
    job.wait_until(lambda: own_cluster.on(CONTROL, *idle).strip() == "1", "for node0 to be released", 90)
    print(f"node1 {how}: named after {named_s:.1f} s, node0 released after {time.monotonic() - begin:.1f} s")
    assert job.facts()["ExitCode"] == "70:0"


@pytest.mark.nightly
@pytest.mark.parametrize("own_cluster", [{"count": 3, "settings": "SlurmdTimeout=10"}], indirect=True)
def test_a_job_goes_on_without_a_node_and_starts_a_dead_launcher_again(
    own_cluster: Hosts, tmp_path: Path, config_file: Path
) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    settings = ("model.name=mine:Net", "train.epochs=40", "train.batch_size=48", "train.trace_samples=true")
    settings += ("eval.every_epochs=20", "checkpoint.every_steps=10", "--procs=1")
    settings += ("--max-restarts=2", "--wait-for-nodes=3")
    options = ("--nodes=3", "--no-kill", "--cpus-per-task=2")
    job = submit(own_cluster, tmp_path, options, config_file, *settings)
    job.wait_for_records(3)

    own_cluster.on("node1", "pkill", "-KILL", "-f", "disttrain run")
    job.wait_until(lambda: job.output().count(" 3 processes") == 2, "for three nodes again")
    assert job.output().count("starting node 1 (node1) again") == 1
    own_cluster.kill("node2")
    job.wait_until(lambda: "going on with 2 of 3 nodes, without node 2" in job.output(), "for two nodes")
    (tmp_path / "hurry").touch()
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["JobState"] == "COMPLETED", job.output()
    assert (job.status()["state"], job.status()["restarts"]) == ("finished", 2)
    assert " 2 processes" in job.output().partition("without node 2")[2]
    assert_every_sample_once_an_epoch(job.run_dir, epochs=40)


@pytest.mark.nightly
def test_a_job_outlives_the_slurmd_of_a_node(own_cluster: Hosts, tmp_path: Path, config_file: Path) -> None:
    settings = ("train.epochs=30", "train.trace_samples=true", "eval.every_epochs=10")
    job = submit(own_cluster, tmp_path, FOUR_RANKS, config_file, *settings, "--procs", "2")
    job.wait_for_records(3)
    own_cluster.on("node1", "pkill", "-KILL", "-x", "slurmd")
    job.wait_until(lambda: job.status()["state"] == "finished", "for its end")
    assert_every_sample_once_an_epoch(job.run_dir, epochs=30)
