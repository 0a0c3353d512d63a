"""Jobs on a real Slurm of two nodes, two processes each: how long they take to begin, to save and to let go.

    python benchmarks/slurm.py [--runs 5] [--json]

Starts munge, slurmctld and two slurmd in networks of their own, as the tests do (root; Debian's slurm-wlm,
munge and iproute2). Every round submits three jobs with slurm/train.sh:

begin    seconds from sbatch to the first record of metrics.jsonl (step 5)
save     seconds from USR2 to the requeued job, saved; then the job goes on: samples lost and repeated
rank     seconds from the SIGKILL of a rank on the second node to two idle nodes
node     seconds from the loss of power of the second node to the first one idle
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import REPOSITORY, machine, parser, print_json_or, variables

sys.path.insert(0, str(REPOSITORY / "tests/integration"))
import slurm_cluster
from slurm_cluster import CONTROL, Hosts

CONFIG = """
name: tiny
data: {name: digits}
model: {name: cnn_mnist}
train: {epochs: 100000, batch_size: 64, trace_samples: true}
optim: {name: adam, lr: 1e-2}
eval: {every_epochs: 10}
monitor: {log_every_steps: 5}
"""
EPOCHS = 40  # of the job that is requeued


def until(condition: Callable[[], object], timeout_s: float = 120) -> float:
    """Waits until a condition holds and returns the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)
    return time.monotonic()


class Job:
    """A job that was submitted, and when."""

    def __init__(self, hosts: Hosts, folder: Path, *overrides: str) -> None:
        self._hosts = hosts
        self.submitted = time.monotonic()
        options = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2"]
        command = [*options, REPOSITORY / "slurm/train.sh", "tiny.yaml", *overrides, "--procs", "2"]
        self.number = hosts.on(CONTROL, *command, cwd=folder).strip()
        self.run_dir = folder / f"runs/slurm-{self.number}"

    def trains(self) -> float:
        """Waits for its first record and returns the time."""
        metrics = self.run_dir / "metrics.jsonl"
        return until(lambda: metrics.exists() and metrics.stat().st_size)

    def state(self) -> str:
        """Returns the job state that Slurm reports."""
        shown = self._hosts.on(CONTROL, "scontrol", "show", "job", self.number)
        return shown.partition("JobState=")[2].split()[0]


def idle(hosts: Hosts, names: str) -> bool:
    shown = hosts.on(CONTROL, "sinfo", "-h", "-n", names, "-t", "idle", "-o", "%D").split()
    return sum(map(int, shown)) == len(names.split(","))


def lost_and_repeated(run_dir: Path) -> tuple[int, int]:
    """Returns samples of the epochs that no step saw, and sightings beyond the first."""
    seen: Counter[tuple[int, int]] = Counter()
    for trace in (run_dir / "trace").iterdir():
        for line in trace.read_text().splitlines():
            record = json.loads(line)
            seen.update((record["epoch"], sample) for sample in record["ids"])
    return EPOCHS * 1438 - len(seen), seen.total() - len(seen)


def one_round(folder: Path, env: dict[str, str]) -> dict[str, float]:
    (folder / "tiny.yaml").write_text(CONFIG)
    found: dict[str, float] = {}
    with slurm_cluster.slurm(folder / "slurm", env=env) as hosts:
        job = Job(hosts, folder, f"train.epochs={EPOCHS}")
        found["begin"] = job.trains() - job.submitted
        begin = time.monotonic()
        hosts.on(CONTROL, "scancel", "--signal=USR2", "--batch", job.number)
        found["save"] = until(lambda: job.state() == "PENDING") - begin
        until(lambda: "slurmstepd" not in hosts.on("node0", "bash", "-c", "cat /proc/[0-9]*/comm"))
        time.sleep(
            2
        )  # slurmd rejects a second batch script of a job in the same second as the end of the first
        hosts.on(CONTROL, "scontrol", "update", f"JobId={job.number}", "StartTime=now")
        until(lambda: job.state() == "COMPLETED")
        found["lost"], found["repeated"] = lost_and_repeated(job.run_dir)

        job = Job(hosts, folder)
        job.trains()
        rank = json.loads((job.run_dir / "env.json").read_text())["devices"][3]
        hosts.on(rank["host"], "kill", "-KILL", str(rank["pid"]))
        begin = time.monotonic()
        found["rank"] = until(lambda: idle(hosts, "node0,node1")) - begin

        job = Job(hosts, folder)
        job.trains()
        begin = time.monotonic()
        hosts.kill("node1")
        found["node"] = until(lambda: idle(hosts, "node0")) - begin
    return found


def main() -> None:
    os.environ.setdefault("DISTTRAIN_DATA", tempfile.gettempdir() + "/disttrain-slurm")  # the digits alone
    options = parser(__doc__).parse_args()
    path = f"{Path(sys.executable).parent}:{slurm_cluster.search_path()}"
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.runs):
            folder = Path(scratch).resolve() / str(number)
            folder.mkdir()
            rounds.append(one_round(folder, variables(options.data, 1, PATH=path)))

    def table() -> None:
        print(f"{'what':<9} {'median':>8} {'min':>8} {'max':>8}")
        for name in rounds[0]:
            values = [found[name] for found in rounds]
            print(f"{name:<9} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f}")

    print_json_or(table, options, machine() | {"n": options.runs}, rounds=rounds)


if __name__ == "__main__":
    main()
