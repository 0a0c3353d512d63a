"""Readings of GPUs in a thread, from a stand-in for NVIDIA's library, and of the processor."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from disttrain.monitor import telemetry
from disttrain.monitor.telemetry import ProcessorSampler
from disttrain.runs.records import READINGS
from kit import nvml

UUIDS = [f"GPU-{i:02d}000000-aaaa-bbbb-cccc-{i:012d}" for i in range(4)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


SAMPLE = """
import json, logging, os, threading, time
import msgspec
from disttrain.monitor.telemetry import GpuSampler
records, alarms = [], []
gpus = [{"host": "h", "index": i, "uuid": uuid} for i, uuid in enumerate(os.environ["UUIDS"].split(","))]
sink = lambda found: records.extend(map(msgspec.to_builtins, found))
sampler = GpuSampler(gpus, 0.1, sink, pids=[1003, 2003], alarm=alarms.append)
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
    error = "nvmlDeviceGetPowerUsage:1:3"
    means, again, records, alive = nvml.run(
        program, library, UUIDS=asked, FAKE_NVML_ERROR=error, FAKE_NVML_THROTTLE="3:4"
    )
    assert alive == ["MainThread"]
    assert means == [
        {
            "host": "h", "index": 0, "uuid": UUIDS[3].removeprefix("GPU-"), "utilization_pct": 35,
            "memory_utilization_pct": 7, "memory_used_mib": 3100, "memory_used_by_us_mib": 1000,
            "memory_total_mib": 81920, "power_w": 350, "power_limit_w": 700, "temperature_c": 43,
            "sm_clock_mhz": 1903, "memory_clock_mhz": 2603, "sm_activity_pct": 10.5,
            "tensor_activity_pct": 6.2, "pcie_rx_mib_per_s": 310, "pcie_tx_mib_per_s": 320,
            "nvlink_rx_mib_per_s": 3100, "nvlink_tx_mib_per_s": 3200, "ecc_corrected": 3,
            "ecc_uncorrected": 0, "throttled_power_pct": 100, "throttled_thermal_pct": 0,
            "critical_events": 0,
        },
        means[1],
        dict.fromkeys(means[0]) | {"host": "h", "index": 2, "uuid": "unknown"},
    ]  # fmt: skip
    assert (means[1]["utilization_pct"], means[1]["power_w"], means[1]["throttled_power_pct"]) == (
        15,
        None,
        0,
    )
    # No reading since: the last one, whose numbers are all the same here.
    assert again == means
    assert [record["index"] for record in records[:4]] == [0, 1, 0, 1]  # nothing is made up for the unknown
    assert set(records[0]) == {"time", "host", "index", "uuid", "name", *READINGS}
    assert records[0]["throttle"] == ["power"]
    assert records[0]["time"].endswith("Z")
    assert len(records[0]["time"]) == len("2026-01-31T12:00:00.000Z")
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        records[0]["time"].replace("Z", "+00:00")
    )
    assert abs(age.total_seconds()) < 600


def test_without_nvml_the_sampler_gives_nothing_and_ends(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    program = SAMPLE + "with sampler: time.sleep(0.2)\nprint(json.dumps([sampler.means(), records, alarms]))"
    (row,), records, alarms = nvml.run(program, tmp_path, UUIDS=UUIDS[0])
    assert {key for key, value in row.items() if value is not None} == {"host", "index", "uuid"}
    assert (records, alarms) == ([], [])


@pytest.mark.integration
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
print(json.dumps([before, sampler.means(), records, alarms]))
"""
    )
    before, after, records, alarms = nvml.run(
        program, library, UUIDS=f"{UUIDS[0]},{UUIDS[2]}", FAKE_NVML_LOST="2:2"
    )
    assert [row["utilization_pct"] for row in before] == [5, 25]
    assert [row["utilization_pct"] for row in after] == [5, None]
    assert [row["memory_used_mib"] for row in after] == [100, None]
    assert [row["critical_events"] for row in after] == [0, 1]
    assert [record["lost"] for record in records if record["index"] == 1] == [False, True]
    assert len([record for record in records if record["index"] == 0]) > 4
    assert len(alarms) == 1


def test_a_failing_sink_is_reported_once_and_readings_go_on(library: Path) -> None:
    program = """
import json, logging, time
from disttrain.monitor.telemetry import GpuSampler
messages, calls = [], []
class Handler(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("disttrain").addHandler(Handler())
def sink(records):
    calls.append(1)
    raise OSError(28, "No space left on device")
sampler = GpuSampler([{"uuid": "GPU-01000000-aaaa-bbbb-cccc-000000000001"}], 0.1, sink)
with sampler:
    limit = time.monotonic() + 60
    while len(calls) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
print(json.dumps([len(calls), messages, sampler.means()]))
"""
    calls, messages, (row,) = nvml.run(program, library)
    assert calls >= 3
    assert messages == ["GPU readings cannot be written: OSError: [Errno 28] No space left on device"]
    assert row["utilization_pct"] == 15


@pytest.mark.integration
def test_readings_keep_to_the_interval(library: Path) -> None:
    program = """
import json, time
from disttrain.monitor.telemetry import GpuSampler
times = []
def sink(records):
    times.append(time.monotonic())
    time.sleep(0.2)
with GpuSampler([{"uuid": "00000000-aaaa-bbbb-cccc-000000000000"}], 0.4, sink):
    time.sleep(3)
print(json.dumps(times))
"""
    times = nvml.run(program, library)
    assert len(times) <= 9
    offsets = [(moment - times[0]) / 0.4 for moment in times]
    on_time = [offset for offset in offsets if abs(offset - round(offset)) < 0.25]
    assert len(on_time) >= 0.7 * len(offsets)  # half of them if it slept 0.4 s after each reading


@pytest.mark.integration
def test_slow_answers_skip_deadlines_and_do_not_hold_up_the_means(library: Path) -> None:
    program = (
        SAMPLE
        + """
times = []
sampler._sink = lambda records: times.append(time.monotonic())
with sampler:
    began, longest = time.monotonic(), 0.0
    while time.monotonic() < began + 4:
        asked = time.monotonic()
        sampler.means()
        longest = max(longest, time.monotonic() - asked)
        time.sleep(0.01)
print(json.dumps([times, longest]))
"""
    )
    times, longest_s = nvml.run(
        program, library, UUIDS=UUIDS[0], FAKE_NVML_SLOW="nvmlDeviceGetPowerUsage:1050"
    )
    assert 2 <= len(times) <= 4  # one each 1.1 s: the ten moments between were not made up for
    assert longest_s < 0.9


def window_of(**values: object) -> dict[str, object]:
    return {**dict.fromkeys(READINGS), "lost": False, **values}


def test_means_average_what_is_known_and_take_the_maximum_of_memory() -> None:
    window = telemetry._Window({"uuid": "u"})
    nothing = window.take()
    assert {key for key, value in nothing.items() if value is not None} == {"uuid"}
    window.add(window_of(utilization_pct=90, memory_used_mib=700, power_w=100.0, power_limit_w=500.0))
    window.add(window_of(utilization_pct=95, memory_used_mib=500, throttle=["power", "thermal"], xids=[31]))
    window.add(window_of(memory_used_mib=600, throttle=["clock_setting"], power_limit_w=400.0, xids=[13, 13]))
    assert window.take() == nothing | {
        "utilization_pct": 92.5, "memory_used_mib": 700, "power_w": 100.0, "power_limit_w": 400.0,
        "throttled_power_pct": 50.0, "throttled_thermal_pct": 50.0, "critical_events": 3,
    }  # fmt: skip
    assert window.take()["utilization_pct"] is None  # the last reading had none
    assert window.take()["critical_events"] == 3
    window.add(window_of(utilization_pct=0))
    assert window.take()["utilization_pct"] == 0


def test_processor_sampler_measures_this_process() -> None:
    sampler = ProcessorSampler()
    end = time.process_time() + 0.3
    started = time.monotonic()
    while time.process_time() < end:
        pass
    wall_s = time.monotonic() - started
    busy = sampler.means()
    assert busy["cpu_pct"] == pytest.approx(100 * 0.3 / wall_s, rel=0.5)
    assert busy["memory_used_mib"] > 5
    time.sleep(0.5)
    assert sampler.means()["cpu_pct"] < 50


def test_the_memory_of_the_process_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ProcessorSampler()
    asked: list[float] = []
    now = time.monotonic()

    def memory_info() -> SimpleNamespace:
        asked.append(now)
        if len(asked) == 3:
            raise psutil.AccessDenied
        return SimpleNamespace(rss=len(asked) * 2**20)

    monkeypatch.setattr(sampler, "_process", SimpleNamespace(memory_info=memory_info))
    monkeypatch.setattr(ProcessorSampler, "_clocks", staticmethod(lambda: (now, 0.0)))
    found = []
    for _ in range(7):
        now += 0.4
        found.append(sampler.means()["memory_used_mib"])
    assert found == [1, 1, 1, 2, 2, 2, None]


def test_telemetry_and_top_import_neither_torch_nor_nvml() -> None:
    program = """
import json, sys
import disttrain.monitor.telemetry
import disttrain.monitor.top
print(json.dumps([name in sys.modules for name in ("torch", "pynvml")]))
"""
    assert nvml.run(program, None) == [False, False]
