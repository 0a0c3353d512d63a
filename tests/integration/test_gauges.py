"""GPUs of real processes under every way to hand them out, with a stand-in for NVIDIA's library.

torch sees no GPU here: what it would say of one (its UUID and PCI bus) is given to each rank by the
environment of the test, as CUDA would choose it. All else is real: processes, NVML's binding, the reduction.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kit import REPOSITORY, nvml
from kit.commands import succeeded, torchrun

UUIDS = [f"{i:02d}000000-aaaa-bbbb-cccc-{i:012d}" for i in range(4)]
NONE = "00000000-0000-0000-0000-000000000000"
RANK = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
rank = int(os.environ["RANK"])
import msgspec, torch
from accelerate import PartialState
from disttrain.monitor.gauges import RunGauges, gather_devices
from disttrain.runs.runfolder import RunFolder
from disttrain.training.collectives import Group

PartialState(cpu=True)
group = Group(rank, 2, torch.device("cuda", 0))
for name, tasks in json.loads(os.environ["TASKS"]).items():
    task, folder, alarms = tasks[rank], Path(sys.argv[1], name), []
    os.environ.update(task["environment"])
    said = {"uuid": task["uuid"], "name": "as torch says"}
    if task["uuid"] == "00000000-0000-0000-0000-000000000000":  # else as by a torch that knows no bus
        said |= {"pci_domain_id": 0, "pci_bus_id": task["bus"], "pci_device_id": 0}
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(**said)
    devices = gather_devices(group)
    gauges = RunGauges(devices, rank, 0.1, RunFolder(folder), alarms.append)
    gauges.start()
    limit = time.monotonic() + 60
    def sweeps():
        texts = [path.read_text() for path in folder.glob("gpu.jsonl")]
        return min(sum(text.count(device["uuid"]) for text in texts) for device in devices)
    while time.monotonic() < limit and sweeps() < 4:
        time.sleep(0.05)
    totals = torch.tensor(gauges.read(), dtype=torch.float64)
    torch.distributed.all_reduce(totals)
    gauges.stop()
    rows = msgspec.to_builtins(gauges.rows(totals.tolist())["gpus"])
    readers = [each["reader"] for each in devices]
    (folder / f"{rank}.json").write_text(json.dumps([rows, readers, alarms]))
    for variable in task["environment"]:
        del os.environ[variable]
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def task(gpu: int, uuid: str | None = None, **environment: str) -> dict[str, Any]:
    """Returns what a rank is given: its environment, and the GPU that CUDA would choose by it."""
    return {"uuid": uuid or UUIDS[gpu], "bus": 16 + gpu, "environment": environment}


WHOLE: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int]], list[int]]] = {
    # name: tasks, (index, GPU) of each, who reads it
    "indexes": (
        [task(3, CUDA_VISIBLE_DEVICES="3,1"), task(1, CUDA_VISIBLE_DEVICES="3,1")],
        [(3, 3), (1, 1)],
        [0, 0],
    ),
    "one_visible_each": (
        [task(2, CUDA_VISIBLE_DEVICES="2"), task(0, CUDA_VISIBLE_DEVICES=f"GPU-{UUIDS[0]}")],
        [(2, 2), (0, 0)],
        [0, 0],
    ),
    # By control groups or containers: each is GPU 0 to its task, and /dev/nvidia<i> to all.
    "one_allowed_each": (
        [task(2, FAKE_NVML_SEEN="2"), task(1, FAKE_NVML_SEEN="1")],
        [(2, 2), (1, 1)],
        [0, 1],
    ),
    # NVML's order is not that of the GPUs, and it does not know the UUIDs that CUDA gives.
    "by_bus": (
        [task(3, NONE, FAKE_NVML_SEEN="0,3,1"), task(1, NONE, FAKE_NVML_SEEN="0,3,1")],
        [(1, 3), (2, 1)],
        [0, 0],
    ),
}
INSTANCES = [f"MIG-020{slot}0000-aaaa-bbbb-cccc-000000000000" for slot in (0, 1)]
SPLIT = [
    task(2, INSTANCES[1].removeprefix("MIG-"), CUDA_VISIBLE_DEVICES=INSTANCES[1], FAKE_NVML_MIG="2:2"),
    task(2, CUDA_VISIBLE_DEVICES="MIG-0200", FAKE_NVML_MIG="2:2"),  # where CUDA names the whole GPU
]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks gathered in each case, in one pair of processes for all cases."""
    folder = tmp_path_factory.mktemp("gauges")
    tasks = {name: tasks for name, (tasks, _, _) in WHOLE.items()} | {"split": SPLIT}
    for name in tasks:
        (folder / name).mkdir()
    (folder / "rank.py").write_text(RANK)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "FAKE_NVML_"))}
    environment |= {
        "LD_LIBRARY_PATH": str(nvml.build(folder)),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TASKS": json.dumps(tasks),
    }
    assert succeeded(torchrun(folder / "rank.py", folder, env=environment))
    return folder


def result(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the rows of the GPUs and who reads them, of which the ranks agree."""
    (rows, readers, alarms), again = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert again[:2] == [rows, readers]
    assert alarms == []
    return rows, readers


@pytest.mark.parametrize("name", WHOLE)
def test_every_rank_shows_the_gpus_that_compute(gathered: Path, name: str) -> None:
    _, expected, readers = WHOLE[name]
    rows, found = result(gathered / name)
    assert found == readers
    assert [row["index"] for row in rows] == [index for index, _ in expected]
    for (_, gpu), row in zip(expected, rows, strict=True):
        assert (row["uuid"], row["name"]) == (f"GPU-{UUIDS[gpu]}", f"NVIDIA Fake {gpu}")
        assert row["utilization_pct"] == 10 * gpu + 5
        assert (row["memory_used_mib"], row["memory_total_mib"]) == (1000 * gpu + 100, 81920)
        assert (row["power_w"], row["power_limit_w"], row["temperature_c"]) == (100 * gpu + 50, 700, 40 + gpu)
    samples = [json.loads(line) for line in (gathered / name / "gpu.jsonl").read_text().splitlines()]
    assert {(sample["index"], sample["uuid"]) for sample in samples} == {
        (row["index"], row["uuid"]) for row in rows
    }
    for _, gpu in expected:
        (seen,) = {sample["power_w"] for sample in samples if sample["uuid"] == f"GPU-{UUIDS[gpu]}"}
        assert seen == 100 * gpu + 50


def test_two_instances_of_a_split_gpu_are_two_gpus(gathered: Path) -> None:
    rows, readers = result(gathered / "split")
    assert [row["uuid"] for row in rows] == [INSTANCES[1], INSTANCES[0]]
    assert readers == [0, 0]
    for row in rows:
        assert (row["index"], row["memory_used_mib"], row["memory_total_mib"]) == (2, 2100, 10240)
        assert row["name"] == "NVIDIA Fake 2 MIG 1g.10gb"
        assert row["sm_activity_pct"] == 7.5
        assert (row["utilization_pct"], row["power_w"], row["critical_events"]) == (None, None, None)
