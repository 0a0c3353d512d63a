"""What NVML says of GPUs, through nvidia-ml-py and a stand-in for NVIDIA's library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from disttrain.runs.records import READINGS
from kit import nvml
from kit.nvml import UUIDS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


SWEEPS = """
import json, logging, os, time
import pynvml
from disttrain.monitor import readings

said, alarms = [], []
class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("disttrain").addHandler(Handler())
logging.getLogger("disttrain").setLevel(logging.INFO)
readings._RARELY_S = float(os.environ.get("RARELY_S", "1000"))
calls = lambda name: pynvml.nvmlLib.fake_calls(name.encode())
sweeps = []
with readings.GpuReaders(os.environ["UUIDS"].split(","), [1000, 2001, 77], alarms.append) as readers:
    for _ in range(int(os.environ.get("SWEEPS", "2"))):
        sweeps.append(readers.sweep())
        time.sleep(0.05)
    gone = readers.gone
counted = [calls(name) for name in os.environ.get("COUNTED", "").split(",")]
print(json.dumps({"sweeps": sweeps, "said": said, "alarms": alarms, "gone": gone, "calls": counted}))
"""
FIRST = {  # of GPU 1
    "utilization_pct": 15, "memory_utilization_pct": 3, "memory_used_mib": 1100, "memory_used_by_us_mib": 300,
    "memory_total_mib": 81920, "memory_shared": False, "power_w": 150.0, "power_limit_w": 700.0,
    "temperature_c": 41,
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
    assert answer["said"] == ["GPU unknown: not visible to this process through NVML; it is not read"]
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
        "memory_shared": False,
        "sm_activity_pct": 4.5, "tensor_activity_pct": 2.2, "lost": False,
    }  # fmt: skip
    assert first["xids"] is None  # of an instance no errors are told: none is not the same


def test_a_failed_nvml_query_is_unknown_logged_once_and_retried(library: Path) -> None:
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
    assert "it has fallen off the bus; it is no longer read" in answer["alarms"][1]
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


# --- Memory that NVML does not know -----------------------------------------------------------------

NOT_SUPPORTED = {"FAKE_NVML_ERROR": "nvmlDeviceGetMemoryInfo:1:3,nvmlDeviceGetMemoryInfo_v2:1:3"}


@pytest.mark.parametrize("variables", [{"FAKE_NVML_TOTAL": "1:0"}, NOT_SUPPORTED])
def test_memory_that_is_not_known_is_none_and_not_nothing(library: Path, variables: dict[str, str]) -> None:
    (row,) = sweeps(library, UUIDS[1], SWEEPS="1", **variables)["sweeps"][0]
    assert (row["memory_used_mib"], row["memory_total_mib"], row["memory_shared"]) == (None, None, None)


@pytest.mark.parametrize("variables", [{"FAKE_NVML_TOTAL": "1:0"}, NOT_SUPPORTED])
def test_an_integrated_gpu_shares_the_memory_of_the_system(
    library: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    path = f"{library}:{nvml.build_cuda(tmp_path)}"
    rows = nvml.run(
        SWEEPS, None, UUIDS=",".join(UUIDS[:2]), SWEEPS="1", LD_LIBRARY_PATH=path, FAKE_CUDA_INTEGRATED="1",
        **variables,
    )["sweeps"][0]  # fmt: skip
    assert rows[0]["memory_shared"] is False
    total_mib = psutil.virtual_memory().total // 2**20
    assert (rows[1]["memory_total_mib"], rows[1]["memory_shared"]) == (total_mib, True)
    assert 0 < rows[1]["memory_used_mib"] < total_mib
