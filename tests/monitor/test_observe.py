"""Readings of all ranks in one vector, and the files that an observer writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import asdict, replace
from torch import nn

from disttrain.config import Config
from disttrain.data.epoch_plan import Plan
from disttrain.errors import StoppedError
from disttrain.monitor import gauges as gauges_module
from disttrain.monitor import observe
from disttrain.monitor.environment import git_state
from disttrain.monitor.gauges import RunGauges, assign
from disttrain.monitor.observe import RunObserver
from disttrain.runs.records import GpuMeans, Process, StepTimes
from disttrain.runs.runfolder import RunFolder, utc_now
from disttrain.shards.index import load_index
from disttrain.training.autotune import Choice, Settings
from disttrain.training.train import Progress
from kit.run_files import eval_record, train_record

HOSTS = ["a", "a", "b", "b"]
CPUS: list[dict[str, Any]] = [
    {"rank": rank, "host": host, "pid": 100 + rank, "device": "cpu", "name": "CPU", "uuid": None}
    for rank, host in enumerate(HOSTS)
]
GPUS = [
    device
    | {
        "device": "cuda", "name": f"GPU {rank}", "uuid": f"GPU-{rank}", "index": 3 - rank,
        "memory_total_mib": 81920, "reader": 2 * (rank // 2),
    }
    for rank, device in enumerate(CPUS)
]  # fmt: skip


def reading(uuid: str) -> dict[str, Any]:
    """Returns what a sampler says of a GPU: numbers that tell GPUs and fields apart."""
    number = int(uuid[-1])
    fields = enumerate(name for name in GpuMeans.__struct_fields__ if name not in gauges_module._ABOUT)
    return {field: 100.0 * place + 10.04 + number for place, field in fields} | {"critical_events": number}


class Sampler:
    """A stand-in for telemetry.GpuSampler; `unknown` are fields that it cannot read."""

    asked: list[list[dict[str, Any]]]
    pids: list[list[int]]
    unknown: tuple[str, ...] = ()
    running = 0

    def __init__(
        self,
        gpus: Sequence[dict[str, Any]],
        interval_s: float,
        sink: object,
        *,
        pids: list[int],
        alarm: Any,
    ) -> None:
        self.gpus = list(gpus)
        self.asked.append(self.gpus)
        self.pids.append(pids)
        assert interval_s in (0.5, 1.0)  # of the gauges, and of a config
        assert callable(sink) or not gpus
        type(self).alarm = staticmethod(alarm)

    def start(self) -> None:
        type(self).running += 1

    def stop(self) -> None:
        type(self).running -= 1

    def means(self) -> list[dict[str, Any]]:
        return [gpu | reading(gpu["uuid"]) | dict.fromkeys(self.unknown) for gpu in self.gpus]


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> type[Sampler]:
    kind = type("OwnSampler", (Sampler,), {"asked": [], "pids": []})
    monkeypatch.setattr(gauges_module, "GpuSampler", kind)
    return kind


@pytest.fixture
def _processor(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))

    def means() -> dict[str, Any]:
        number = next(numbers)
        return {"cpu_pct": 50.0 + number, "memory_used_mib": 100 + number}

    monkeypatch.setattr(gauges_module, "ProcessorSampler", lambda: SimpleNamespace(means=means))


def all_ranks(
    devices: list[dict[str, Any]], folder: Path, alarms: list[str] | None = None
) -> Iterator[RunGauges]:
    for rank in range(len(devices)):
        gauges = RunGauges(devices, rank, 0.5, RunFolder(folder), ([] if alarms is None else alarms).append)
        gauges.start()
        try:
            yield gauges
        finally:
            gauges.stop()


def read_all(devices: list[dict[str, Any]], folder: Path) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Returns what each rank reads, and what each makes of the sums."""
    every = list(all_ranks(devices, folder))
    vectors = [gauges.read() for gauges in every]
    totals = [sum(column) for column in zip(*vectors, strict=True)]
    return vectors, [gauges.rows(totals) for gauges in every]


# --- Gauges -----------------------------------------------------------------------------------------


def test_the_sums_of_all_ranks_are_the_rows_of_all_gpus(tmp_path: Path, sampler: type[Sampler]) -> None:
    vectors, rows = read_all(GPUS, tmp_path)
    asked = [[gpu["uuid"] for gpu in gpus] for gpus in sampler.asked]
    assert asked == [["GPU-0", "GPU-1"], [], ["GPU-2", "GPU-3"], []]  # one rank of each node reads
    assert sampler.asked[2][1] == {"host": "b", "index": 0, "uuid": "GPU-3", "name": "GPU 3"}
    assert sampler.pids == [[100, 101], [100, 101], [102, 103], [102, 103]]
    assert [any(vector) for vector in vectors] == [True, False, True, False]
    assert sampler.running == 0
    expected = tuple(
        GpuMeans(
            host=host, index=3 - rank, uuid=f"GPU-{rank}", name=f"GPU {rank}",
            memory_total_mib=81920, utilization_pct=10.0 + rank, memory_utilization_pct=110.0 + rank,
            memory_used_mib=210.0 + rank, power_w=310.0 + rank, power_limit_w=410.0 + rank,
            temperature_c=510.0 + rank, sm_clock_mhz=610.0 + rank, throttled_power_pct=710.0 + rank,
            throttled_thermal_pct=810.0 + rank, sm_activity_pct=910.0 + rank, critical_events=rank,
        )
        for rank, host in enumerate(HOSTS)
    )  # fmt: skip
    assert rows == [{"gpus": expected}] * 4


def test_what_is_unknown_is_none(tmp_path: Path, sampler: type[Sampler]) -> None:
    sampler.unknown = ("power_w",)
    devices = [device | {"index": None, "memory_total_mib": None} for device in GPUS]
    vectors, rows = read_all(devices, tmp_path)
    assert [sum(math.isnan(number) for number in vector) for vector in vectors] == [2, 0, 2, 0]
    for number, row in enumerate(rows[1]["gpus"]):
        assert row.index is None
        assert row.memory_total_mib is None
        assert row.power_w is None
        assert row.temperature_c == 510 + number


def test_one_unknown_gpu_leaves_the_others(tmp_path: Path, sampler: type[Sampler]) -> None:
    gauges = list(all_ranks(GPUS[:2], tmp_path))
    values = gauges[0].read()
    values[: len(values) // 2] = [math.nan] * (len(values) // 2)
    first, second = gauges[1].rows(values)["gpus"]
    known = {key for key, value in asdict(first).items() if value is not None}
    assert known == {"host", "index", "uuid", "name", "memory_total_mib"}
    assert second.utilization_pct == 11.0


def test_zero_is_a_reading(tmp_path: Path, sampler: type[Sampler]) -> None:
    (gauges,) = all_ranks(GPUS[:1], tmp_path)
    (row,) = gauges.rows([0.0] * len(gauges.read()))["gpus"]
    assert (row.utilization_pct, row.critical_events) == (0.0, 0)


def test_ranks_on_one_gpu_give_one_row_and_it_is_read_once(tmp_path: Path, sampler: type[Sampler]) -> None:
    devices = [GPUS[0], GPUS[0] | {"rank": 1, "pid": 101}, GPUS[1] | {"rank": 2, "pid": 102}]
    _, rows = read_all(devices, tmp_path)
    assert [gpu.uuid for gpu in rows[0]["gpus"]] == ["GPU-0", "GPU-1"]
    assert rows[0]["gpus"][0].utilization_pct == 10.0
    assert [[gpu["uuid"] for gpu in gpus] for gpus in sampler.asked] == [["GPU-0", "GPU-1"], [], []]
    assert sampler.pids[0] == [100, 101, 102]


def test_rank_0_tells_of_the_errors_of_gpus_that_others_read(tmp_path: Path, sampler: type[Sampler]) -> None:
    alarms: list[str] = []
    every = list(all_ranks(GPUS, tmp_path, alarms))
    totals = [sum(column) for column in zip(*(gauges.read() for gauges in every), strict=True)]
    for _ in range(2):
        for gauges in every:
            gauges.rows(totals)
    assert [text.partition(":")[0] for text in alarms] == [
        "GPU 1 (GPU 2, GPU-2) on b",
        "GPU 0 (GPU 3, GPU-3) on b",
    ]
    totals[-1] += 1  # of the last GPU: its critical events
    for gauges in every:
        gauges.rows(totals)
    assert len(alarms) == 3


def device(rank: int, host: str, uuid: str, index: int, minor: int, reach: list[str]) -> dict[str, Any]:
    return {"rank": rank, "host": host, "uuid": uuid, "index": index, "minor": minor, "reach": reach}


def test_a_gpu_is_read_by_the_first_rank_of_its_host_that_may_see_it() -> None:
    all_seen = [device(i, "a", f"U{i}", 1 - i, 1 - i, ["U0", "U1"]) for i in range(2)]
    assert assign(all_seen) == [
        {"rank": 0, "host": "a", "uuid": "U0", "index": 1, "reader": 0},
        {"rank": 1, "host": "a", "uuid": "U1", "index": 0, "reader": 0},
    ]
    # Each task has one GPU, which is GPU 0 to it: told apart by device files.
    confined = [device(i, "a", f"U{i}", 0, 5 - i, [f"U{i}"]) for i in range(3)]
    assert [(each["reader"], each["index"]) for each in assign(confined)] == [(0, 5), (1, 4), (2, 3)]
    # Two machines that believe to have the same name.
    twins = [device(0, "localhost", "U0", 0, 0, ["U0"]), device(1, "localhost", "U1", 0, 0, ["U1"])]
    assert [each["reader"] for each in assign(twins)] == [0, 1]
    # NVML shows a rank no GPU at all.
    blind = [device(0, "a", "U0", 0, 0, []), device(1, "a", "U1", 1, 1, ["U0"])]
    assert [each["reader"] for each in assign(blind)] == [1, 1]
    assert assign(CPUS) == CPUS


@pytest.mark.usefixtures("_processor")
def test_on_cpus_every_rank_has_a_row(tmp_path: Path, sampler: type[Sampler]) -> None:
    vectors, rows = read_all(CPUS, tmp_path)
    assert [[i for i, number in enumerate(vector) if number] for vector in vectors] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    processes = tuple(
        Process(rank=rank, host=host, cpu_pct=50.0 + rank, memory_used_mib=100 + rank)
        for rank, host in enumerate(HOSTS)
    )
    assert rows == [{"gpus": (), "processes": processes}] * 4
    assert sampler.asked == [[], [], [], []]


@pytest.mark.integration
def test_the_readings_of_all_nodes_share_a_file(tmp_path: Path) -> None:
    program = """
import pathlib, sys
from disttrain.monitor.gauges import SharedLines
lines = SharedLines(pathlib.Path(sys.argv[1]))
for i in range(300):
    lines.write([{"node": sys.argv[2], "i": i, "gpu": gpu, "filling": 20000 * "x"} for gpu in range(2)])
lines.close()
"""
    path = tmp_path / "gpu.jsonl"
    nodes = [subprocess.Popen([sys.executable, "-c", program, path, node]) for node in "ab"]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    for node in "ab":
        found = [(row["i"], row["gpu"]) for row in lines(path) if row["node"] == node]
        assert found == [(i, gpu) for i in range(300) for gpu in range(2)]


# --- The observer -----------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits"},
    "model": {"name": "tiny"},
    "train": {"epochs": 1, "batch_size": 64, "trace_samples": True},
    "optim": {"lr": 0.1},
}
TRAIN_RECORD = train_record(5, samples=320, accuracy=0.25, ranks_ms=StepTimes(compute=(1.0, 1.0)))
EVAL_RECORD = eval_record(5, 0.5, epoch=1, correct=180, total=360)


def observer_of(
    rank: int, folder: RunFolder, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> RunObserver:
    monkeypatch.setattr(observe, "gather_devices", lambda group: CPUS[:2])
    (folder.path / "logs").mkdir(parents=True, exist_ok=True)
    parts: Any = SimpleNamespace(
        rank=rank,
        world_size=2,
        group=None,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        flops_per_image=3_000_000,
        peak_flops_per_s=None,
        settings=Settings("fp32", channels_last=False, compiled=False, threads=1),
        bare_model=nn.Linear(2, 3),
        plan=Plan(0, (1438,), 64),
    )
    return RunObserver(
        Config.model_validate(CONFIG),
        folder,
        parts,
        Progress(step=5, samples_seen=320),
        load_index("digits", str(digits_root)),
        {"precision": Choice("fp32", "auto on a CPU"), "cache": Choice("host", "small")},
        verbosity=0,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rank_0_writes_the_story_of_the_run(
    tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    before = utc_now()
    with observer_of(0, folder, digits_root, monkeypatch) as observer:
        observer.trace(1, 1, [3, 4])
        observer.train(TRAIN_RECORD)
        observer.evaluate(EVAL_RECORD)
        observer.finished()
    trained, evaluated = lines(folder.metrics)
    assert (trained["kind"], evaluated["kind"]) == ("train", "eval")
    for written, record in ((trained, TRAIN_RECORD), (evaluated, EVAL_RECORD)):
        assert msgspec.convert(written, type(record)) == replace(record, time=written["time"])
    assert before <= trained["time"] <= evaluated["time"] <= utc_now()
    assert lines(folder.trace(0)) == [{"epoch": 1, "step": 1, "ids": [3, 4]}]
    status = folder.status()
    assert (status["step"], status["samples_seen"]) == (5, 320)
    environment = json.loads(folder.env.read_text())
    assert environment["world_size"] == 2
    assert environment["choices"] == {"precision": "fp32: auto on a CPU", "cache": "host: small"}
    assert environment["data"]["train"] + environment["data"]["val"] == 1797
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert "finished: accuracy 50.00 % (180 of 360)" in capsys.readouterr().out


def test_other_ranks_write_their_trace_alone(
    tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    with observer_of(1, folder, digits_root, monkeypatch) as observer:
        observer.trace(1, 1, [5])
        observer.train(TRAIN_RECORD)
        observer.evaluate(EVAL_RECORD)
        observer.finished()
    assert lines(folder.trace(1)) == [{"epoch": 1, "step": 1, "ids": [5]}]
    assert not folder.metrics.exists()
    assert not folder.env.exists()
    assert folder.status() == {}
    assert capsys.readouterr().out == ""


def test_a_stopped_run_says_so(
    tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = observer_of(0, RunFolder(tmp_path / "run"), digits_root, monkeypatch)
    with pytest.raises(StoppedError), observer:
        raise StoppedError("stopped at step 7; saved, resumable")
    assert "stopped at step 7; saved, resumable" in capsys.readouterr().out


def test_a_gpu_that_is_lost_is_shown_at_once_and_logged_as_an_error(
    tmp_path: Path,
    digits_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    sampler: type[Sampler],
) -> None:
    for rank in (0, 1):
        with observer_of(rank, RunFolder(tmp_path / "run"), digits_root, monkeypatch):
            sampler.alarm(f"GPU {rank}: it has fallen off the bus")
    assert "GPU 0: it has fallen off the bus" in capsys.readouterr().out
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["GPU 0: it has fallen off the bus", "GPU 1: it has fallen off the bus"]


def test_a_folder_that_is_no_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
