"""GPUs as NVML knows them, through nvidia-ml-py and a stand-in for NVIDIA's library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml
import pytest

from disttrain.monitor.nvml import READINGS, Gpu, _cuda_order

UUIDS = [f"GPU-{i:02d}000000-aaaa-bbbb-cccc-{i:012d}" for i in range(8)]
VISIBLE = """
import json
from disttrain.monitor.nvml import visible_gpus
print(json.dumps([[gpu.index, gpu.uuid, gpu.name, gpu.memory_total_mib] for gpu in visible_gpus()]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


# --- Which GPUs there are -----------------------------------------------------------------------------


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
        ({"CUDA_VISIBLE_DEVICES": f"MIG-{UUIDS[1]}/8/0"}, ["MIG-01010000"]),
        ({"CUDA_VISIBLE_DEVICES": f"MIG-{UUIDS[1]}/9/0"}, []),
    ],
)
def test_visible_gpus_with_mig(library: Path, variables: dict[str, str], expected: list[str]) -> None:
    gpus = nvml.run(VISIBLE, library, FAKE_NVML_MIG="1:2", **variables)
    assert [uuid[:12] for _, uuid, _, _ in gpus] == expected
    if expected and expected[0].startswith("MIG"):
        assert gpus[0][0] == 1
        assert gpus[0][2:] == ["NVIDIA Fake 1 MIG 1g.10gb", 10240]


def test_indexes_are_those_of_the_gpus_that_this_process_may_see(library: Path) -> None:
    gpus = nvml.run(VISIBLE, library, FAKE_NVML_SEEN="6,2,5", CUDA_VISIBLE_DEVICES="1,0")
    assert [(index, uuid) for index, uuid, _, _ in gpus] == [(1, UUIDS[2]), (0, UUIDS[6])]


def test_the_gpus_of_a_node_are_those_that_cuda_does_not_see_too(library: Path) -> None:
    program = VISIBLE.replace("visible_gpus", "node_gpus")
    gpus = nvml.run(program, library, CUDA_VISIBLE_DEVICES="2", FAKE_NVML_MIG="1:2")
    assert [uuid[:8] for _, uuid, _, _ in gpus] == [
        "GPU-0000", "GPU-0100", "MIG-0100", "MIG-0101", "GPU-0200", "GPU-0300",
    ]  # fmt: skip


def test_without_nvml_there_are_no_gpus_and_nothing_fails() -> None:
    program = """
import json
from disttrain.monitor.nvml import GpuReaders, gpu_of_device, node_gpus, visible_gpus
with GpuReaders(["GPU-1"], [], print) as readers:
    sweep = readers.sweep()
print(json.dumps([visible_gpus(), node_gpus(), gpu_of_device("1", "00000000:10:00.0"), sweep, readers.gone]))
"""
    probe = "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0:
        pytest.skip("this machine has NVML")
    assert nvml.run(program, None) == [[], [], None, [None], True]


def test_a_broken_driver_is_no_gpus(library: Path) -> None:
    assert nvml.run(VISIBLE, library, FAKE_NVML_BROKEN="1") == []


def test_a_broken_library_is_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    assert nvml.run(VISIBLE, tmp_path) == []


def test_an_index_means_nothing_after_a_failed_gpu() -> None:
    gpus = [Gpu(0, "GPU-a", "A", None), Gpu(2, "GPU-c", "C", None)]
    assert _cuda_order("1", gpus, {}) == [gpus[1]]
    assert _cuda_order(None, gpus, {}) == gpus
    assert _cuda_order("+1abc,0", gpus, {}) == [gpus[1], gpus[0]]


DEVICE = """
import json, os
from disttrain.monitor.nvml import gpu_of_device
gpu = gpu_of_device(os.environ["UUID"], os.environ["BUS"])
print(json.dumps(gpu and [gpu.index, gpu.uuid, gpu.minor]))
"""


@pytest.mark.parametrize(
    ("uuid", "bus", "variables", "expected"),
    [
        (UUIDS[2].removeprefix("GPU-"), "00000000:10:00.0", {}, [2, UUIDS[2], 2]),
        (UUIDS[2], "00000000:13:00.0", {}, [2, UUIDS[2], 2]),
        ("nobody", "00000000:13:00.0", {}, [3, UUIDS[3], 3]),
        ("nobody", "00000000:20:00.0", {}, None),
        (UUIDS[6], "", {"FAKE_NVML_SEEN": "5,6"}, [1, UUIDS[6], 6]),
        (UUIDS[2], "", {"FAKE_NVML_SEEN": "5,6"}, None),  # another task's
        # Under MIG, whichever of the two CUDA names: it computes on the instance that it sees.
        ("01010000-aaaa-bbbb-cccc-000000000000", "", {"FAKE_NVML_MIG": "1:2"}, [1, "MIG-0101", 1]),
        (UUIDS[1], "", {"FAKE_NVML_MIG": "1:2", "CUDA_VISIBLE_DEVICES": "MIG-0101"}, [1, "MIG-0101", 1]),
        (UUIDS[1], "", {"FAKE_NVML_MIG": "1:2"}, [1, "MIG-0100", 1]),
    ],
)
def test_a_cuda_device_is_found_by_uuid_else_by_its_bus(
    library: Path, uuid: str, bus: str, variables: dict[str, str], expected: list[Any] | None
) -> None:
    found = nvml.run(DEVICE, library, UUID=uuid, BUS=bus, **variables)
    if found is not None and found[1].startswith("MIG-"):
        found[1] = found[1][:8]
    assert found == expected


# --- What they say ------------------------------------------------------------------------------------

SWEEPS = """
import json, logging, os, time
import pynvml
from disttrain.monitor import nvml

said, alarms = [], []
class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("disttrain").addHandler(Handler())
logging.getLogger("disttrain").setLevel(logging.INFO)
nvml._RARELY_S = float(os.environ.get("RARELY_S", "1000"))
calls = lambda name: pynvml.nvmlLib.fake_calls(name.encode())
sweeps = []
with nvml.GpuReaders(os.environ["UUIDS"].split(","), [1000, 2001, 77], alarms.append) as readers:
    for _ in range(int(os.environ.get("SWEEPS", "2"))):
        sweeps.append(readers.sweep())
        time.sleep(0.05)
    gone = readers.gone
counted = [calls(name) for name in os.environ.get("COUNTED", "").split(",")]
print(json.dumps({"sweeps": sweeps, "said": said, "alarms": alarms, "gone": gone, "calls": counted}))
"""
FIRST = {  # of GPU 1
    "utilization_pct": 15, "memory_utilization_pct": 3, "memory_used_mib": 1100, "memory_used_by_us_mib": 300,
    "memory_total_mib": 81920, "power_w": 150.0, "power_limit_w": 700.0, "temperature_c": 41,
    "sm_clock_mhz": 1901, "memory_clock_mhz": 2601, "throttle": [], "sm_activity_pct": None,
    "tensor_activity_pct": None, "pcie_rx_mib_per_s": None, "pcie_tx_mib_per_s": None,
    "nvlink_rx_mib_per_s": None, "nvlink_tx_mib_per_s": None, "ecc_corrected": 1, "ecc_uncorrected": 0,
    "xids": [], "lost": False,
}  # fmt: skip
TRAFFIC = {
    "pcie_rx_mib_per_s": 110.0, "pcie_tx_mib_per_s": 120.0, "nvlink_rx_mib_per_s": 1100.0,
    "nvlink_tx_mib_per_s": 1200.0,
}  # fmt: skip


def sweeps(library: Path, *uuids: str, **variables: str) -> dict[str, Any]:
    answer: dict[str, Any] = nvml.run(SWEEPS, library, UUIDS=",".join(uuids), **variables)
    return answer


def test_a_sweep_reads_every_field_of_every_gpu(library: Path) -> None:
    answer = sweeps(library, UUIDS[1], UUIDS[7], "unknown", FAKE_NVML_GPUS="8")
    first, second = answer["sweeps"]
    assert list(first[0]) == list(READINGS)
    assert first[0] == FIRST
    assert second[0] == FIRST | TRAFFIC | {"sm_activity_pct": 4.5, "tensor_activity_pct": 2.2}
    assert (second[1]["utilization_pct"], second[1]["sm_activity_pct"]) == (75, 22.5)
    assert second[1]["memory_used_by_us_mib"] is None  # its processes are others'
    assert first[2] is second[2] is None
    assert answer["said"] == ["GPU unknown: NVML does not show it to this process; it is not read"]
    assert (answer["alarms"], answer["gone"]) == ([], False)


def test_slow_questions_are_asked_rarely_and_nothing_is_left_allocated(library: Path) -> None:
    names = [
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetPcieThroughput",
        "nvmlDeviceGetPowerUsage",
        "nvmlGpmSampleFree",
    ]
    settings = {"SWEEPS": "6", "COUNTED": ",".join(names)}
    assert sweeps(library, UUIDS[1], **settings)["calls"] == [2, 2, 0, 6, 2]  # sized first: two calls
    answer = sweeps(library, UUIDS[1], RARELY_S="0", **settings)
    assert answer["calls"] == [12, 12, 0, 6, 2]
    held = [row["ecc_corrected"] for (row,) in sweeps(library, UUIDS[1], **settings)["sweeps"]]
    assert held == [1] * 6


def test_before_hopper_traffic_is_counted(library: Path) -> None:
    answer = sweeps(library, UUIDS[1], FAKE_NVML_GPM="0")
    (first,), (second,) = answer["sweeps"]
    assert first == FIRST
    for key, value in TRAFFIC.items():
        assert second[key] == pytest.approx(value, rel=0.1)  # time passes between the clock and the counter
    assert second["sm_activity_pct"] is None
    assert len(answer["said"]) == 1
    assert "activity is not known: NVML: Not Supported" in answer["said"][0]


def test_without_counters_the_traffic_of_a_moment_stands_for_that_moment(library: Path) -> None:
    settings = {"COUNTED": "nvmlDeviceGetFieldValues", "FAKE_NVML_COUNTERS": "0"}
    answer = sweeps(library, UUIDS[1], FAKE_NVML_GPM="0", **settings)
    (first,), (second,) = answer["sweeps"]
    assert answer["calls"] == [1]
    assert first == FIRST | {"pcie_rx_mib_per_s": 130.0, "pcie_tx_mib_per_s": 140.0}
    assert second == FIRST


def test_an_old_driver_gives_what_it_has_and_each_lack_is_said_once(tmp_path: Path) -> None:
    answer = sweeps(nvml.build(tmp_path, "-DOLD_DRIVER"), UUIDS[1], UUIDS[2], SWEEPS="3")
    assert answer["sweeps"][0][0] == FIRST | {"memory_used_mib": 1700, "memory_used_by_us_mib": None}
    assert answer["sweeps"][2][1]["power_w"] == 250.0
    assert len(answer["said"]) == len(set(answer["said"])) == 4
    for what in ("activity", "memory", "throttle", "memory_used_by_us_mib"):
        assert sum(f": {what} is not known" in text for text in answer["said"]) == 1


def test_a_mig_instance_gives_memory_and_activity(library: Path) -> None:
    bare = "01010000-aaaa-bbbb-cccc-000000000000"
    (first,), (second,) = sweeps(library, bare, FAKE_NVML_MIG="1:2")["sweeps"]
    known = {key: value for key, value in second.items() if value is not None}
    assert known == {
        "memory_used_mib": 1100, "memory_used_by_us_mib": 300, "memory_total_mib": 10240,
        "sm_activity_pct": 4.5, "tensor_activity_pct": 2.2, "lost": False,
    }  # fmt: skip
    assert first["xids"] is None  # of an instance no errors are told: none is not the same


def test_a_failed_question_leaves_its_field_unknown_is_said_once_and_asked_again(library: Path) -> None:
    settings = {"SWEEPS": "4", "COUNTED": "nvmlDeviceGetPowerUsage,nvmlDeviceGetTemperature"}
    errors = "nvmlDeviceGetPowerUsage:1:999,nvmlDeviceGetTemperature:1:3"
    answer = sweeps(library, UUIDS[1], FAKE_NVML_ERROR=errors, **settings)
    assert answer["sweeps"][0] == [FIRST | {"power_w": None, "temperature_c": None}]
    assert [text.partition("): ")[2] for text in answer["said"]] == [
        "power_w is not known: NVML: Unknown Error",
        "temperature_c is not known: NVML: Not Supported",
    ]
    assert answer["calls"] == [4, 1]  # what is not supported is not asked again


def test_reasons_for_lower_clocks_have_names(library: Path) -> None:
    for bits, names in (
        ("1", []),  # idle
        ("4", ["power"]),
        ("40", ["hardware", "thermal"]),
        ("72", ["thermal_hardware"]),  # with the bit that says hardware of any kind
        ("136", ["power_brake"]),
        ("32768", []),  # one that is not known yet
    ):
        answer = sweeps(library, UUIDS[1], SWEEPS="1", FAKE_NVML_THROTTLE=f"1:{bits}")
        assert answer["sweeps"][0][0]["throttle"] == names


def test_a_gpu_that_is_lost_is_told_once_and_the_others_go_on(library: Path) -> None:
    settings = {"SWEEPS": "5", "COUNTED": "nvmlDeviceGetMemoryInfo_v2"}
    answer = sweeps(library, UUIDS[0], UUIDS[2], FAKE_NVML_LOST="2:2", FAKE_NVML_XID="2:2:79", **settings)
    lost = [sweep[1] for sweep in answer["sweeps"]]
    assert lost[0]["utilization_pct"] == 25
    assert lost[1] == dict.fromkeys(READINGS) | {"lost": True, "xids": [79]}
    assert lost[2:] == [None] * 3
    assert [sweep[0]["utilization_pct"] for sweep in answer["sweeps"]] == [5] * 5
    assert answer["gone"] is False
    assert len(answer["alarms"]) == 2
    assert all(text.startswith(f"GPU 2 (NVIDIA Fake 2, {UUIDS[2]}): ") for text in answer["alarms"])
    assert "Xid 79, the GPU has fallen off the bus; see dmesg" in answer["alarms"][0]
    assert "it has fallen off the bus; it is not read any more" in answer["alarms"][1]
    assert answer["calls"] == [5 + 2]  # after that nothing is asked of it


def test_when_all_gpus_are_lost_nothing_is_left_to_read(library: Path) -> None:
    assert sweeps(library, UUIDS[2], FAKE_NVML_LOST="2:1")["gone"] is True
    # lost before the first question, as after an error of an earlier job
    assert sweeps(library, UUIDS[2], FAKE_NVML_LOST="2:0")["gone"] is True
    reset = sweeps(library, UUIDS[2], FAKE_NVML_ERROR="nvmlDeviceGetPowerUsage:2:16")
    assert "does not work until it is reset" in reset["alarms"][0]


def test_a_critical_error_is_told_once_and_stands_in_the_next_reading(library: Path) -> None:
    answer = sweeps(library, UUIDS[1], UUIDS[2], SWEEPS="4", FAKE_NVML_XID="2:2:48")
    assert [sweep[1]["xids"] for sweep in answer["sweeps"]] == [[], [48], [], []]
    assert [sweep[0]["xids"] for sweep in answer["sweeps"]] == [[]] * 4
    assert answer["alarms"] == [
        f"GPU 2 (NVIDIA Fake 2, {UUIDS[2]}): Xid 48, uncorrectable memory error; see dmesg"
    ]
