"""slurm/train.sh under a real Slurm of one node."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=str(slurm_cluster.why_not())),
]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Iterator[dict[str, str]]:
    with slurm_cluster.one_node(tmp_path_factory.mktemp("slurm")) as env:
        own_bin = str(Path(sys.executable).parent)
        yield env | {"PATH": f"{own_bin}:{env['PATH']}", "DISTTRAIN_DATA": str(digits_root)}


def submit(env: dict[str, str], folder: Path, *arguments: str) -> str:
    command = ["sbatch", "--parsable", str(REPOSITORY / "slurm/train.sh"), *arguments]
    return subprocess.run(
        command, env=env, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def job(env: dict[str, str], number: str) -> dict[str, str]:
    text = subprocess.run(
        ["scontrol", "show", "job", number], env=env, check=True, capture_output=True, text=True
    ).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def wait_until(condition: Callable[[], object], what: Callable[[], str], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def test_a_job_out_of_time_saves_requeues_and_finishes_in_the_same_folder(
    cluster: dict[str, str], tmp_path: Path, config_file: Path
) -> None:
    number = submit(cluster, tmp_path, str(config_file), "train.epochs=150", "--procs", "1")
    log, metrics = (
        tmp_path / f"disttrain-{number}.log",
        tmp_path / "runs" / f"slurm-{number}" / "metrics.jsonl",
    )

    def output() -> str:
        return (log.read_text() if log.exists() else "no output") + str(job(cluster, number))

    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, output)
    subprocess.run(
        ["scancel", "--signal=USR2", "--batch", number], env=cluster, check=True
    )  # as at the limit
    wait_until(lambda: "back into the queue" in output() or "finished" in output(), output)
    assert "saved, resumable" in output()
    wait_until(lambda: job(cluster, number)["JobState"] == "PENDING", output)
    # slurmd refuses a batch script that starts in the second in which it ended the job's last one.
    wait_until(
        lambda: "slurmstepd" not in {process.info["name"] for process in psutil.process_iter(["name"])},
        output,
    )
    time.sleep(2)
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=cluster, check=True)
    wait_until(lambda: job(cluster, number)["JobState"] == "COMPLETED", output)
    assert job(cluster, number)["Restarts"] == "1"
    assert "going on from" in output()
    status = json.loads((metrics.parent / "status.json").read_text())
    assert (status["state"], status["samples_seen"]) == ("finished", 150 * 1438)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_job_that_fails_is_not_requeued(cluster: dict[str, str], tmp_path: Path, config_file: Path) -> None:
    number = submit(cluster, tmp_path, str(config_file), "data.name=nothing")
    wait_until(lambda: job(cluster, number)["JobState"] == "FAILED", lambda: str(job(cluster, number)))
    assert job(cluster, number)["ExitCode"] == "65:0"
    assert "there is no data set 'nothing'" in (tmp_path / f"disttrain-{number}.log").read_text()
