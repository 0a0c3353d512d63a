"""Readings of GPUs, through nvidia-ml-py and a stand-in for NVIDIA's library, and of the processor."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import nvml
import pytest

from disttrain import telemetry
from disttrain.telemetry import Gpu, ProcessorSampler

UUIDS = [f"GPU-{i:02d}000000-aaaa-bbbb-cccc-{i:012d}" for i in range(4)]
VISIBLE = """
import json
from disttrain.telemetry import visible_gpus
print(json.dumps([[gpu.index, gpu.uuid, gpu.name, gpu.memory_total_mib] for gpu in visible_gpus()]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


def test_visible_gpus_describes_each_gpu(library: Path) -> None:
    expected = [[i, UUIDS[i], f"NVIDIA Fake {i}", 81920] for i in range(4)]
    assert nvml.run(VISIBLE, library) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 3 , 1 ", [3, 1]),
        ("1,-1,0", [1]),
        ("1,4,0", [1]),
        ("1,x,0", [1]),
        ("1,1", []),
        ("0,GPU-01", [0]),
        (f"{UUIDS[3]},{UUIDS[1]}", [3, 1]),
        ("GPU-02,GPU-00", [2, 0]),
        ("GPU-0", []),  # four begin like this
        ("GPU-02,GPU-ff,GPU-00", [2]),
        ("GPU-02,0", [2]),
        ("GPU-02,GPU-0200", []),
        ("MIG-00", []),
    ],
)
def test_visible_gpus_reads_the_variable_as_cuda_does(library: Path, value: str, expected: list[int]) -> None:
    assert [gpu[0] for gpu in nvml.run(VISIBLE, library, CUDA_VISIBLE_DEVICES=value)] == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["MIG-01000000"]),  # CUDA prefers a MIG instance to whole GPUs, and sees one
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["MIG-01000000"]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, ["GPU-02000000"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-0101"}, ["MIG-01010000"]),
    ],
)
def test_visible_gpus_with_mig(library: Path, variables: dict[str, str], expected: list[str]) -> None:
    gpus = nvml.run(VISIBLE, library, FAKE_NVML_MIG="1:2", **variables)
    assert [uuid[:12] for _, uuid, _, _ in gpus] == expected
    if expected[0].startswith("MIG"):
        assert gpus[0][0] == 1
        assert gpus[0][2:] == ["NVIDIA Fake 1 MIG 1g.10gb", 10240]


def test_without_nvml_there_are_no_gpus_and_nothing_fails() -> None:
    program = """
import json
from disttrain.telemetry import GpuSampler, visible_gpus
with GpuSampler(["GPU-1"], 0.1, print) as sampler:
    pass
print(json.dumps([visible_gpus(), sampler.means()]))
"""
    probe = "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0:
        pytest.skip("this machine has NVML")
    gpus, (row,) = nvml.run(program, None)
    assert gpus == []
    assert {key for key, value in row.items() if value is not None} == {"host", "uuid"}


def test_a_broken_driver_is_no_gpus(library: Path) -> None:
    assert nvml.run(VISIBLE, library, FAKE_NVML_BROKEN="1") == []


def test_a_broken_library_is_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    assert nvml.run(VISIBLE, tmp_path) == []


SAMPLE = """
import json, logging, os, threading, time
from disttrain.telemetry import GpuSampler
records = []
sampler = GpuSampler(os.environ["UUIDS"].split(","), 0.1, records.append)
def wait(count):
    limit = time.monotonic() + 60
    while len(records) < count and time.monotonic() < limit:
        time.sleep(0.01)
"""


def test_sampler_gives_means_in_the_order_asked_for(library: Path) -> None:
    program = (
        SAMPLE
        + """
with sampler:
    wait(6)
sampler.stop()
means, again = sampler.means(), sampler.means()
alive = [thread.name for thread in threading.enumerate()]
print(json.dumps([means, again, records, alive]))
"""
    )
    asked = f"{UUIDS[3].removeprefix('GPU-')},{UUIDS[1]},unknown"
    means, again, records, alive = nvml.run(program, library, UUIDS=asked, FAKE_NVML_NO_POWER="1")
    assert alive == ["MainThread"]
    host = os.uname().nodename
    assert means == [
        {"host": host, "index": 3, "uuid": UUIDS[3], "name": "NVIDIA Fake 3", "utilization_pct": 35,
         "memory_used_mib": 3100, "memory_total_mib": 81920, "power_w": 350, "temperature_c": 43},
        {"host": host, "index": 1, "uuid": UUIDS[1], "name": "NVIDIA Fake 1", "utilization_pct": 15,
         "memory_used_mib": 1100, "memory_total_mib": 81920, "power_w": None, "temperature_c": 41},
        {"host": host, "index": None, "uuid": "unknown", "name": None, "utilization_pct": None,
         "memory_used_mib": None, "memory_total_mib": None, "power_w": None, "temperature_c": None},
    ]  # fmt: skip
    assert again == means  # no reading since: the last one
    assert [record["index"] for record in records[:4]] == [3, 1, 3, 1]  # nothing is made up for the unknown
    assert set(records[0]) == {"time", *means[0]}
    assert records[0]["time"].endswith("Z")
    assert len(records[0]["time"]) == len("2026-01-31T12:00:00.000Z")
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        records[0]["time"].replace("Z", "+00:00")
    )
    assert abs(age.total_seconds()) < 600


def test_a_mig_instance_is_found_by_its_bare_uuid_and_gives_what_it_has(library: Path) -> None:
    program = SAMPLE + "with sampler: wait(1)\nprint(json.dumps(sampler.means()))"
    bare = "01010000-aaaa-bbbb-cccc-000000000000"
    (row,) = nvml.run(program, library, UUIDS=bare, FAKE_NVML_MIG="1:2")
    assert (row["index"], row["uuid"], row["memory_used_mib"]) == (1, f"MIG-{bare}", 1100)
    assert (row["utilization_pct"], row["power_w"], row["temperature_c"]) == (None, None, None)


def test_a_gpu_that_is_lost_becomes_unknown_and_the_others_go_on(library: Path) -> None:
    program = (
        SAMPLE
        + """
with sampler:
    wait(4)
    before = sampler.means()
    wait(len(records) + 4)
    sampler.means()
    wait(len(records) + 4)
print(json.dumps([before, sampler.means()]))
"""
    )
    before, after = nvml.run(program, library, UUIDS=f"{UUIDS[0]},{UUIDS[2]}", FAKE_NVML_LOST="2:2")
    assert [row["utilization_pct"] for row in before] == [5, 25]
    assert [row["utilization_pct"] for row in after] == [5, None]
    assert [row["memory_used_mib"] for row in after] == [100, None]
    assert after[1]["name"] == "NVIDIA Fake 2"


def test_a_failing_sink_is_reported_once_and_readings_go_on(library: Path) -> None:
    program = """
import json, logging, time
from disttrain.telemetry import GpuSampler
messages, calls = [], []
class Handler(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("disttrain").addHandler(Handler())
def sink(record):
    calls.append(1)
    raise OSError(28, "No space left on device")
with GpuSampler(["GPU-01000000-aaaa-bbbb-cccc-000000000001"], 0.1, sink) as sampler:
    limit = time.monotonic() + 60
    while len(calls) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
print(json.dumps([len(calls), messages, sampler.means()]))
"""
    calls, messages, (row,) = nvml.run(program, library)
    assert calls >= 3
    assert messages == ["GPU readings cannot be written: OSError: [Errno 28] No space left on device"]
    assert row["utilization_pct"] == 15


def test_readings_keep_to_the_interval(library: Path) -> None:
    program = """
import json, time
from disttrain.telemetry import GpuSampler
times = []
def sink(record):
    times.append(time.monotonic())
    time.sleep(0.2)
with GpuSampler(["00000000-aaaa-bbbb-cccc-000000000000"], 0.4, sink):
    time.sleep(3)
print(json.dumps(times))
"""
    times = nvml.run(program, library)
    assert len(times) <= 9
    offsets = [(moment - times[0]) / 0.4 for moment in times]
    on_time = [offset for offset in offsets if abs(offset - round(offset)) < 0.25]
    assert len(on_time) >= 0.7 * len(offsets)  # half of them if it slept 0.4 s after each reading


def test_means_average_what_is_known_and_take_the_maximum_of_memory() -> None:
    window = telemetry._Window({"uuid": "u"})
    nothing = dict.fromkeys(telemetry._READINGS)
    assert window.take() == {"uuid": "u", **nothing}
    window.add({**nothing, "utilization_pct": 90, "memory_used_mib": 700, "power_w": 100.0})
    window.add({**nothing, "utilization_pct": 95, "memory_used_mib": 500})
    window.add({**nothing, "memory_used_mib": 600, "memory_total_mib": 1000})
    assert window.take() == {
        "uuid": "u", "utilization_pct": 92.5, "memory_used_mib": 700, "memory_total_mib": 1000,
        "power_w": 100.0, "temperature_c": None,
    }  # fmt: skip
    assert window.take()["utilization_pct"] is None  # the last reading had none
    window.add({**nothing, "utilization_pct": 0})
    assert window.take()["utilization_pct"] == 0


def test_an_index_means_nothing_after_a_failed_gpu() -> None:
    gpus = [Gpu(0, "GPU-a", "A", None), Gpu(2, "GPU-c", "C", None)]
    assert telemetry._cuda_order("1", gpus, {}) == [gpus[1]]
    assert telemetry._cuda_order(None, gpus, {}) == gpus
    assert telemetry._cuda_order("+1abc,0", gpus, {}) == [gpus[1], gpus[0]]


def test_processor_sampler_measures_this_process() -> None:
    sampler = ProcessorSampler()
    end = time.process_time() + 0.3
    started = time.monotonic()
    while time.process_time() < end:
        pass
    wall_s = time.monotonic() - started
    busy = sampler.means()
    assert busy["host"] == os.uname().nodename
    assert busy["cpu_pct"] == pytest.approx(100 * 0.3 / wall_s, rel=0.5)
    assert busy["memory_used_mib"] > 5
    assert busy["threads"] >= 1
    time.sleep(0.5)
    assert sampler.means()["cpu_pct"] < 50


def test_telemetry_imports_neither_torch_nor_nvml() -> None:
    program = """
import json, sys
import disttrain.telemetry
print(json.dumps([name in sys.modules for name in ("torch", "pynvml")]))
"""
    assert nvml.run(program, None) == [False, False]
