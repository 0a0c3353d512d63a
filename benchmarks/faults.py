"""What the launcher does when ranks die, hang or must stop: times, culprits and orphans, over many trials.

    python benchmarks/faults.py [--runs 20] [--procs 3] [--stall 3] [--faults kill raise ...] [--json]

Every trial is a `disttrain run` of the embedded digits in which a rank, chosen at random, fails in a step
(eval-stop: in a batch of evaluation), chosen at random:

kill, raise, exit      the rank gets SIGKILL, raises, or leaves with code 0: seconds until the run has ended
stop, loop, eval-stop  the rank is frozen by SIGSTOP, or is in an endless loop: seconds until the run has
                       ended, beyond monitor.stall_timeout_s
term                   the launcher gets SIGTERM: seconds until the run has saved and ended

The culprit is right if the last line on screen and status.json name the rank. An orphan is any process of the
run that is left when it has ended.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
from common import machine, parser, print_json_or, variables

CONFIG = """
name: faults
data: {name: digits}
model: {name: "failing:Net"}
train: {epochs: 1000, batch_size: 48, precision: fp32, channels_last: true}
optim: {name: adam, lr: 1e-2}
"""
MODEL = """
import os, signal, time
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, fault, rank, at):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        self.fault = fault if os.environ.get("RANK", "0") == str(rank) else None
        self.left = at

    def forward(self, images):
        self.left -= self.training != (self.fault == "eval-stop")
        if self.fault and self.left == 0:
            with open("failed-at", "w") as file:
                file.write(repr(time.time()))
            if self.fault == "raise":
                raise RuntimeError("the pump is dry")
            if self.fault == "exit":
                os._exit(0)
            while self.fault == "loop":
                pass
            if self.fault != "term":
                os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
        return self.layers(images)
"""
FAULTS = {"kill": 70, "raise": 70, "exit": 70, "stop": 71, "loop": 71, "eval-stop": 71, "term": 75}


class Trial(NamedTuple):
    """The outcome of one fault.

    Attributes:
        seconds: from the fault to the end of the run, less the stall timeout where that must pass first.
        right: whether exit code, last line and status.json tell the truth.
        orphans: processes that were left.
    """

    seconds: float
    right: bool
    orphans: int


def trial(fault: str, procs: int, stall_s: float, folder: Path, env: Mapping[str, str]) -> Trial:
    folder.mkdir()
    (folder / "failing.py").write_text(MODEL)
    (folder / "faults.yaml").write_text(CONFIG)
    rank, at = random.randrange(procs), random.randrange(1, 5 if fault == "eval-stop" else 60)
    settings = [f"monitor.stall_timeout_s={stall_s}", f"model.args.fault={fault}"]
    settings += [f"model.args.rank={rank}", f"model.args.at={at}"]
    command = [sys.executable, "-m", "disttrain", "run", "-q", "faults.yaml", "--procs", str(procs)]
    run = subprocess.Popen(
        [*command, "--run-dir", "run", *settings],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    failed = folder / "failed-at"
    if fault == "term":
        while not failed.exists() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=600)
    ended = time.time()
    left = [process for process in psutil.process_iter() if works_in(process, folder)]
    for process in left:
        process.kill()
    status = json.loads((folder / "run/status.json").read_text())
    right = run.returncode == status["exit_code"] == FAULTS[fault]
    if fault == "term":
        right = right and (folder / "run/checkpoints/latest/MANIFEST.json").exists()
    else:
        right = right and status["rank"] == rank and f"rank {rank} on " in output.splitlines()[-1]
    waited_s = stall_s if FAULTS[fault] == 71 else 0
    return Trial(ended - float(failed.read_text()) - waited_s, right, len(left))


def works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder)
    except psutil.Error:
        return False


def main() -> None:
    os.environ.setdefault("DISTTRAIN_DATA", tempfile.gettempdir() + "/disttrain-faults")  # the digits alone
    arguments = parser(__doc__, runs=20)
    arguments.add_argument("--procs", type=int, default=3)
    arguments.add_argument("--stall", type=float, default=3, help="monitor.stall_timeout_s (default 3)")
    arguments.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    options = arguments.parse_args()
    env = variables(options.data, 1)
    results: dict[str, list[Trial]] = {fault: [] for fault in options.faults}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.runs):
            for fault in options.faults:
                folder = Path(scratch).resolve() / f"{fault}-{number}"
                results[fault].append(trial(fault, options.procs, options.stall, folder, env))

    def table() -> None:
        print(f"{'fault':<10} {'median s':>9} {'p95 s':>7} {'max s':>7}  {'right':>8}  orphans")
        for fault, trials in results.items():
            seconds = sorted(found.seconds for found in trials)
            p95 = seconds[max(0, -(-95 * len(seconds) // 100) - 1)]
            right = f"{sum(found.right for found in trials)}/{len(trials)}"
            print(f"{fault:<10} {statistics.median(seconds):9.2f} {p95:7.2f} {seconds[-1]:7.2f}", end="  ")
            print(f"{right:>8}  {sum(found.orphans for found in trials)}")

    facts = machine() | {"processes": options.procs, "stall timeout s": options.stall, "n": options.runs}
    found = {fault: [found._asdict() for found in trials] for fault, trials in results.items()}
    print_json_or(table, options, facts, trials=found)


if __name__ == "__main__":
    main()
