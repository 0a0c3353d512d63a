"""What reading the GPUs costs: a sweep, the thread's share of a core, a log point, and the step beside it.

    python benchmarks/telemetry.py [--gpus 8] [--ranks 64] [--seconds 10] [--block-s 2] [--runs 9] [--json]

The GPUs are simulated by tests/kit/fake_nvml.c, which answers at once: what is measured is our part and that
of nvidia-ml-py. An H100 adds what its driver takes, a few microseconds a question; --slow makes the
slowest question take 4 ms, in which no other thread has to wait.

sweep          reading every GPU once, as each interval does
sweep, rare    the same with the questions of every 30 s
share          processor time of a process that does nothing else, one reading a second, gpu.jsonl written
log point      gauges of --ranks ranks on --gpus GPUs a node: reading them for the reduction, and the rows
step           of a small network, its time that of Python, with and without a reading a second beside it
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from common import REPOSITORY, Claim, interleaved, machine, print_json_or
from torch import nn

from disttrain.monitor import nvml, readings
from disttrain.monitor.gauges import RunGauges
from disttrain.runs.runfolder import RunFolder

SLOW = "nvmlDeviceGetComputeRunningProcesses_v3:4"  # milliseconds, of one GPU


def simulate(folder: Path, gpus: int) -> None:
    """Makes nvidia-ml-py load the fake NVML, even if a real one is installed."""
    library = folder / "libnvidia-ml.so.1"
    source = REPOSITORY / "tests/kit/fake_nvml.c"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    os.environ["FAKE_NVML_GPUS"] = str(gpus)
    ctypes.CDLL(str(library))  # what is loaded is found by its name


def sweep_s(uuids: list[str], runs: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of sweeps without and with the rare queries."""
    often, rarely = [], []
    with readings.GpuReaders(uuids, [os.getpid()], print) as readers:
        for number in range(2 * runs):
            if number % 2:
                readers._rarely_due_s = 0.0
            began = time.perf_counter()
            readers.sweep()
            (rarely if number % 2 else often).append(time.perf_counter() - began)
    return often[1:], rarely


def devices(ranks: int, uuids: list[str]) -> list[dict]:
    """Returns so many ranks on nodes with these GPUs, as gauges.gather_devices does."""
    width = len(uuids)
    same = {"name": "NVIDIA H100", "memory_total_mib": 81559}
    place = [{"rank": rank, "pid": rank, "index": rank % width, **same} for rank in range(ranks)]
    names = [*uuids, *(f"GPU-{rank}" for rank in range(width, ranks))]
    return [
        row | {"host": f"node{rank // width}", "uuid": names[rank], "reader": rank // width * width}
        for rank, row in enumerate(place)
    ]


def log_point_s(folder: Path, ranks: int, uuids: list[str], runs: int) -> tuple[list[float], int]:
    """Returns the seconds that rank 0 spends on its gauges at log points, and how many numbers travel."""
    gauges = RunGauges(devices(ranks, uuids), 0, 1.0, RunFolder(folder), print)
    gauges.start()
    time.sleep(2.5)
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        values = gauges.read()
        gauges.rows(values)
        seconds.append(time.perf_counter() - began)
    gauges.stop()
    return seconds, len(values)


def share(folder: Path, uuids: list[str], seconds: float) -> float:
    """Returns CPU time over wall time of the sampler at one reading per second."""
    gauges = RunGauges(devices(len(uuids), uuids), 0, 1.0, RunFolder(folder), print)
    gauges.start()
    time.sleep(1)
    wall_s, busy_s = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    busy_s, wall_s = time.process_time() - busy_s, time.perf_counter() - wall_s
    gauges.stop()
    return busy_s / wall_s


class Steps:
    """Steps of a network so small that their time is Python's, as on a GPU that waits for it."""

    def __init__(self, folder: Path, uuids: list[str], block_s: float) -> None:
        torch.set_num_threads(1)
        self.model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(24)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, foreach=False)
        self.batch = torch.randn(8, 16)
        self.folder, self.uuids, self.block_s = folder, uuids, block_s

    def seconds(self) -> float:
        """Returns the mean seconds of a step over a block."""
        count, began = 0, time.perf_counter()
        while (now := time.perf_counter()) < began + self.block_s:
            self.optimizer.zero_grad()
            self.model(self.batch).square().mean().backward()
            self.optimizer.step()
            count += 1
        return (now - began) / count

    def watched_s(self) -> float:
        """Returns the same with the GPUs read once a second beside it."""
        gauges = RunGauges(devices(len(self.uuids), self.uuids), 0, 1.0, RunFolder(self.folder), print)
        gauges.start()
        seconds = self.seconds()
        gauges.stop()
        return seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--gpus", type=int, default=8)
    arguments.add_argument("--ranks", type=int, default=64)
    arguments.add_argument("--seconds", type=float, default=10)
    arguments.add_argument("--block-s", type=float, default=2)
    arguments.add_argument("--runs", type=int, default=9, help="rounds after the warm-up (default 9)")
    arguments.add_argument("--slow", action="store_true", help="let the slowest query take 4 ms")
    arguments.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = arguments.parse_args()
    if options.slow:
        os.environ["FAKE_NVML_SLOW"] = SLOW
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        simulate(folder, options.gpus)
        uuids = [gpu.uuid for gpu in nvml.node_gpus()]
        often, rarely = sweep_s(uuids, 200)
        points, numbers = log_point_s(folder, options.ranks, uuids, 1000)
        results = {
            "sweep_ms": 1000 * statistics.median(often),
            "sweep_rare_ms": 1000 * statistics.median(rarely),
            "share_pct": 100 * share(folder, uuids, options.seconds),
            "log_point_us": 1e6 * statistics.median(points),
            "numbers_in_the_reduction": numbers,
        }
        steps = Steps(folder, uuids, options.block_s)
        values = interleaved({"read": steps.watched_s, "alone": steps.seconds}, options.runs)
    pairs = [read / alone for read, alone in zip(values["read"], values["alone"], strict=True)]
    claim = Claim("step beside a reading a second / alone", "read", "alone", 1.01)
    medians = {name: statistics.median(each) for name, each in values.items()}
    result = claim.result(medians) | {"value": statistics.median(pairs), "rounds": pairs}
    result["holds"] = result["value"] <= claim.bound

    def table() -> None:
        for name, value in results.items():
            print(f"{name:<26} {value:>10,.3f}")
        print(f"{'step_ms':<26} {1000 * medians['alone']:>10,.3f}")
        spread = f"{min(pairs):.3f} to {max(pairs):.3f}"
        print(f"\n{claim.what}: {result['value']:.4f} ({spread}), at most {claim.bound}, n={options.runs}")

    print_json_or(table, options, machine() | {"gpus": options.gpus}, **results, claim=result)


if __name__ == "__main__":
    main()
