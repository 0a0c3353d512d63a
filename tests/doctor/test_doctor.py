"""`disttrain doctor`: rules by exact values, checks that crash or hang, and all of it on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from disttrain.doctor import _ending, isolated, report, rules
from disttrain.doctor.checks import CHECKS
from disttrain.doctor.rules import Finding
from disttrain.slurm_env import Allocation, allocation
from kit import nvml
from kit.commands import Run

GIB = 2**30


# --- Rules ------------------------------------------------------------------------------------------


def test_requirements_that_are_not_met() -> None:
    requirements = [
        ("torchvision", "torch==2.15.0"),
        ("accelerate", "torch>=2.0"),
        ("accelerate", "Safe_Tensors>=0.4; python_version > '3'"),
        ("webdataset", "braceexpand"),
        ("torch", "colorama; sys_platform == 'win32'"),
        ("torch", "torch-extra<3"),
    ]
    versions = {"torch": "2.14.1", "safe-tensors": "0.3", "torch-extra": "2.9rc1"}
    assert rules.unmet(requirements, versions) == [
        "torchvision needs torch==2.15.0, but 2.14.1 is installed",
        "accelerate needs Safe_Tensors>=0.4, but 0.3 is installed",
        "webdataset needs braceexpand, which is not installed",
    ]
    assert rules.unmet(requirements[:1], {"torch": "2.15.0+cu132"}) == []


@pytest.mark.parametrize(
    ("supported", "torch_cuda", "usable", "status"),
    [
        ((13, 2), "13.2", True, "ok"),
        ((13, 0), "13.2", True, "ok"),  # minor version compatibility
        ((14, 0), "13.2", True, "ok"),
        ((12, 8), "13.2", False, "failure"),
        ((12, 8), "13.2", True, "ok"),  # forward compatibility
        ((12, 2), "11.8", True, "ok"),
        ((12, 8), None, False, "failure"),
    ],
)
def test_driver_and_cuda(
    supported: tuple[int, int], torch_cuda: str | None, usable: bool, status: str
) -> None:
    assert rules.driver("550.1", supported, torch_cuda, usable=usable).status == status


def test_a_driver_that_is_too_old_names_the_least_one() -> None:
    found = rules.driver("550.54", (12, 4), "13.2", usable=False)
    assert found.found == "driver 550.54, CUDA up to 12.4, but torch is built for CUDA 13.2"
    assert found.remedy.startswith("update the driver to 580.65.06 or later, or install a torch for CUDA 12")


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),  # binary compatible within a major version
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80", "compute_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX
        ((12, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((10, 0), ["sm_100"], True),
        ((10, 0), ["sm_120"], False),
        ((9, 0), [], False),
    ],
)
def test_kernels_of_a_build(capability: tuple[int, int], archs: list[str], fits: bool) -> None:
    assert rules.has_kernels(capability, archs) is fits


@pytest.mark.parametrize(
    ("packages", "loaded", "cuda", "status"),
    [
        ({"nvidia-nccl-cu13": "2.30.7"}, "2.30.7", "13.2", "ok"),
        ({"nvidia-nccl-cu13": "2.30.7"}, "2.19.3", "13.2", "warning"),  # another library comes first
        ({"nvidia-nccl-cu13": "2.30.7", "nvidia-nccl-cu12": "2.20.5"}, "2.30.7", "13.2", "warning"),
        ({}, "2.30.7", "13.2", "ok"),  # of the system, or in the build
        ({}, None, None, "ok"),
    ],
)
def test_nccl_versions(packages: dict[str, str], loaded: str | None, cuda: str | None, status: str) -> None:
    assert rules.nccl(packages, loaded, cuda).status == status


def test_topology() -> None:
    pairs = {(0, 1): "PHB", (0, 2): "SYS", (1, 2): "SYS"}
    assert rules.topology(pairs, [0, 0, 0]) == Finding(
        "topology", "ok", "PHB between 0-1; SYS between 0-2, 1-2"
    )
    assert rules.topology(dict.fromkeys(pairs, "NVLink"), [18, 18, 18]) == Finding(
        "topology", "ok", "NVLink between all 3 GPUs, 18 NVLinks each"
    )
    broken = rules.topology(dict.fromkeys(pairs, "NVLink"), [18, 17, 18])
    assert (broken.status, broken.found) == ("warning", "NVLink between all 3 GPUs, 17/18 NVLinks each")
    assert broken.remedy.startswith("GPU 1 has fewer active NVLinks")


def test_peer_access() -> None:
    both = {(0, 1): True, (1, 0): True}
    assert rules.peers(both, []).found == "between all GPUs"
    none = dict.fromkeys(both, False)
    assert rules.peers(none, []).status == "ok"  # GeForce over PCIe
    linked = rules.peers(none, [(0, 1), (1, 0)])
    assert (linked.status, linked.found) == (
        "warning",
        "none between 0-1, 1-0, although NVLink connects them",
    )


@pytest.mark.parametrize(
    ("finding", "status", "part"),
    [
        (rules.cores(2, 8, None), "ok", "2 of 8 usable"),
        (rules.cores(8, 8, Allocation("1", None, 1, 8)), "ok", "8"),
        (rules.cores(1, 8, Allocation("1", "0", 1, 4)), "warning", "the job asked for 4 per task"),
        (rules.shared_memory(64 * 2**20, 0), "ok", "0.06 GiB"),
        (rules.shared_memory(64 * 2**20, 1), "ok", "0.06 GiB"),
        (rules.shared_memory(64 * 2**20, 2), "warning", "too small for NCCL between 2 GPUs"),
        (rules.shared_memory(8 * GIB, 8), "ok", "8.00 GiB"),
        (rules.shared_memory(None, 0), "ok", "does not exist"),
        (rules.shared_memory(None, 8), "warning", "does not exist"),
        (rules.open_files(256, 4096), "warning", "at most 256"),
        (rules.open_files(1024, 4096), "ok", "at most 1,024"),
        (rules.open_files(-1, -1), "ok", "no limit"),
        (rules.locked_memory(8 * 2**20, []), "ok", "at most 8 MiB"),
        (rules.locked_memory(8 * 2**20, ["mlx5_0"]), "warning", "with mlx5_0"),
        (rules.locked_memory(-1, ["mlx5_0"]), "ok", "no limit"),
        (rules.disk("d", "/x", 50 * GIB, None), "ok", "50.0 GiB free in /x"),
        (rules.disk("d", "/x", GIB // 2, None), "warning", "0.5 GiB free"),
        (rules.disk("d", "/x", GIB // 20, None), "failure", "0.0 GiB free"),
        (rules.disk("d", "/x", 50 * GIB, 0), "failure", "only 0 files can be created"),
        (rules.clock((0.1, 0.1), 1e9, 1e9 - 5, 1e9 + 1), "ok", "steady"),
        (rules.clock((0.0, 0.1), 1e9, 1e9, 1e9), "failure", "the monotonic clock advanced 0.000 s"),
        (rules.clock((0.1, 0.1), 1e9, 1e9 + 3 * 86400, 1e9), "failure", "is 3 days before"),
        (rules.clock((0.1, 3.1), 1e9, 1e9, 1e9), "warning", "jumped by 3.0 s"),
        (rules.clock((0.1, 0.1), 1e9, 1e9, 1e9 - 60), "warning", "are dated -60 s from now"),
        (rules.cluster(None, None, None), "ok", "not installed"),
        (rules.cluster(None, "slurm 22.05", "Slurmctld(primary) at a is UP"), "ok", "slurm 22.05, outside"),
        (rules.cluster(None, "slurm 22.05", "Slurmctld(primary) at a is DOWN"), "warning", "is DOWN"),
        (rules.cluster(None, "srun: fatal", "scontrol: fatal: no config"), "ok", "not connected"),
        (rules.cluster(Allocation("7", "0", 2, None), "slurm 22.05", "at a is UP"), "ok",
         "in job 7, step 0, of 2 nodes"),
        (rules.cluster(Allocation("7", None, 1, None), None, None), "warning", "in job 7 of 1 node, but"),
        (rules.losses("cpu", [2.0, 1.5], [2.001, 1.5], 1e-3, 1.25), "ok", "1.25 ms, loss 2.0000 -> 1.5000"),
        (rules.losses("cpu", [2.0, 1.5], [2.01, 1.5], 1e-3, 1), "failure", "instead of 2.0100 -> 1.5000"),
        (rules.losses("cpu", [2.0, float("nan")], [2.0, 1.5], 1e-3, 1), "failure", "2.0000 -> nan"),
    ],
)  # fmt: skip
def test_what_facts_are_worth(finding: Finding, status: str, part: str) -> None:
    assert finding.status == status
    assert part in finding.found
    assert bool(finding.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("names", "setting", "expected"),
    [
        (["lo", "eth0", "eth1", "docker0"], None, ["eth0", "eth1"]),
        (["lo", "eth0", "ib0", "ib1"], None, ["ib0", "ib1"]),
        (["lo", "docker0"], None, ["docker0"]),
        (["lo"], None, ["lo"]),
        ([], None, []),
        (["eth0", "eth01", "ib0"], "eth0", ["eth0", "eth01"]),  # a prefix
        (["eth0", "eth01", "ib0"], "=eth0", ["eth0"]),
        (["eth0", "docker0", "lo"], "^docker,lo", ["eth0"]),
        (["eth0", "eth01"], "^=eth0", ["eth01"]),
        (["eth0"], "bond", []),
    ],
)
def test_interfaces_that_nccl_takes(names: list[str], setting: str | None, expected: list[str]) -> None:
    assert rules.nccl_interfaces(names, setting) == expected
    assert rules.nccl_network(names, setting).status == ("ok" if expected else "failure")


@pytest.mark.parametrize(("level", "found"), [("", 0), ("INFO", 0), ("DETAIL", 1), ("detail", 1)])
def test_a_debug_level_with_which_ddp_crashes_is_a_warning(level: str, found: int) -> None:
    assert [finding.status for finding in rules.torch_debugging(level)] == ["warning"] * found


ADDRESSES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5"], "ib0": ["10.1.0.5"]}


@pytest.mark.parametrize(
    ("setting", "own", "nodes", "status", "found"),
    [
        (None, "10.1.0.5", 2, "ok", "ib0 (n1 is 10.1.0.5)"),
        (None, "127.0.1.1", 1, "ok", "lo (n1 is 127.0.1.1); for CPU runs on several nodes: "),
        (None, "127.0.1.1", 2, "warning", "lo (n1 is 127.0.1.1): no other node can reach this one"),
        (
            None,
            None,
            2,
            "warning",
            "lo (the name n1 does not resolve to an address of this host): no other node",
        ),
        ("eth0", "127.0.1.1", 2, "ok", "eth0 (GLOO_SOCKET_IFNAME)"),
        ("eth0,bond0", None, 1, "failure", "GLOO_SOCKET_IFNAME=eth0,bond0: bond0 does not exist or is down"),
    ],
)
def test_the_interface_that_gloo_takes(
    setting: str | None, own: str | None, nodes: int, status: str, found: str
) -> None:
    finding = rules.gloo_network(ADDRESSES, setting, "n1", own, nodes)
    assert finding.status == status
    assert finding.found.startswith(found)


def test_the_job_by_its_environment() -> None:
    assert allocation({}) is None
    batch = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "8"}
    assert allocation(batch) == Allocation("12", None, 3, 8)
    assert allocation({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}) == Allocation("12", "0", 1, None)


def test_report_shows_the_remedy() -> None:
    assert report(Finding("clock", "ok", "steady")) == "\x1b[32mok      \x1b[0m clock              steady"
    lines = report(Finding("clock", "failure", "late", "set it")).splitlines()
    assert lines == ["\x1b[31mfailure \x1b[0m clock              late", f"{'':>27} -> set it"]


# --- Isolation --------------------------------------------------------------------------------------

FIRST = 'print(\'{"subject": "a", "status": "ok", "found": "b", "remedy": ""}\', flush=True)\n'


def run_isolated(program: str, limit_s: float = 60) -> list[Finding]:
    return list(isolated([sys.executable, "-c", program], limit_s, "it"))


def test_what_a_check_finds() -> None:
    assert run_isolated(f"{FIRST}print('noise'); print('[1]')") == [Finding("a", "ok", "b")]


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("raise OSError(5, 'no disk')", "failed: OSError: [Errno 5] no disk"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        (
            "import faulthandler, os\nfaulthandler.enable()\ndef deep(): os.abort()\ndeep()",
            "ended by SIGABRT, in deep (<string>:4)",
        ),
    ],
)
def test_a_check_that_crashes_is_a_failure_after_what_it_found(program: str, found: str) -> None:
    first, second = run_isolated(FIRST + program)
    assert first == Finding("a", "ok", "b")
    assert (second.subject, second.status, second.found) == ("it", "failure", found)
    assert second.remedy.startswith("see the output of: python -c ")


@pytest.mark.integration
def test_a_check_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    program = f"""{FIRST}
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(3600)
"""
    first, second = run_isolated(program, 3)
    assert first.status == "ok"
    assert (second.status, second.found) == ("failure", "no answer within 3 s")
    pid = int((tmp_path / "pid").read_text())
    limit = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_where_a_check_was() -> None:
    dump = (
        "Timeout (0:00:20)!\nThread 0x00007f (most recent call first):\n"
        '  File "/a/other.py", line 1 in wait\n\nThread 0x00007e (most recent call first):\n'
        '  File "/usr/pynvml.py", line 17 in nvmlInit\n  File "/a/checks.py", line 3 in driver\n'
    )
    assert _ending(1, dump, 20) == "no answer within 20 s, in nvmlInit (pynvml.py:17)"


# --- The command ------------------------------------------------------------------------------------


def examined(disttrain: Run, *names: str, code: int = 0, **variables: str) -> list[dict[str, Any]]:
    done = disttrain("doctor", *names, "--json", env=variables, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert (code == 1) == any(finding["status"] == "failure" for finding in found)
    return found


def test_this_machine_is_well(disttrain: Run, digits_root: Path) -> None:
    found = examined(disttrain)
    assert {finding["check"] for finding in found} == set(CHECKS)
    by_subject = {finding["subject"]: finding for finding in found}
    assert by_subject["data set digits"]["found"] == "1,438 train, 359 val"
    assert by_subject["data root"]["found"] == str(digits_root)
    assert by_subject["all-reduce, gloo"]["found"].startswith("2 processes: ")
    for precision in ("fp32", "bf16"):
        assert "as expected" in by_subject[f"cpu {precision}"]["found"]


def test_text_and_names_of_checks(disttrain: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = disttrain("doctor", "data", "clock", env={"DISTTRAIN_CACHE": str(tmp_path / "file" / "cache")})
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("ok       clock ")  # in the order of the table, not of the command line
    assert (
        f"failure  cache              {tmp_path}/file/cache (will be created): cannot be written"
        in done.stdout
    )
    assert lines[-1] == f"{'':>27} -> set DISTTRAIN_CACHE to a writable folder"
    wrong = disttrain("doctor", "netwrok")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.endswith("allreduce, step; did you mean network?\n")
    assert " ".join(", ".join(CHECKS).split()) in " ".join(disttrain("doctor", "--help").stdout.split())


def test_a_wrong_network_setting_and_a_damaged_data_set(disttrain: Run, tmp_path: Path) -> None:
    (tmp_path / "data/broken").mkdir(parents=True)
    (tmp_path / "data/broken/index.json").write_text("{")
    found = examined(
        disttrain,
        "network",
        "data",
        code=1,
        GLOO_SOCKET_IFNAME="nope0",
        DISTTRAIN_DATA=str(tmp_path / "data"),
    )
    status = {finding["subject"]: finding["status"] for finding in found}
    assert status["gloo network"] == "failure"
    assert status["data set broken"] == "warning"
    assert status["cache"] == "ok"


def test_slurm_commands_that_hang_or_answer(disttrain: Run, tmp_path: Path) -> None:
    for name, answer in (("srun", "slurm 99.1"), ("scontrol", "Slurmctld(primary) at head is UP")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_NNODES": "4"}
    (found,) = examined(disttrain, "slurm", PATH=path, **variables)
    assert found["found"] == "slurm 99.1, in job 7, step 2, of 4 nodes"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 3600\n")
    (found,) = examined(disttrain, "slurm", PATH=path, **variables)
    assert found["status"] == "warning"
    assert "timed out after 10 seconds" in found["found"]


# --- GPUs, by the stand-in for NVIDIA's library -----------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": str(nvml.build(tmp_path_factory.mktemp("nvml")))}


def test_gpus_and_their_topology(disttrain: Run, library: dict[str, str]) -> None:
    found = examined(disttrain, "driver", **library)
    assert [(finding["subject"], finding["status"]) for finding in found] == [
        ("NVIDIA driver", "ok"), *((f"GPU {i}", "ok") for i in range(4)), ("topology", "ok"),
    ]  # fmt: skip
    assert found[0]["found"] == "999.10.05, 4 GPUs"
    assert found[2]["found"] == "NVIDIA Fake 1, 80 GiB, GPU-01000000-aaaa-bbbb-cccc-000000000001"
    assert found[-1]["found"] == "PHB between 0-1, 2-3; SYS between 0-2, 0-3, 1-2, 1-3"
    linked = examined(disttrain, "driver", CUDA_VISIBLE_DEVICES="2,3", FAKE_NVML_NVLINK="4", **library)
    assert [finding["subject"] for finding in linked] == ["NVIDIA driver", "GPU 2", "GPU 3", "topology"]
    assert linked[-1]["status"] == "warning"
    assert linked[-1]["found"] == "NVLink between all 2 GPUs, 3/4 NVLinks each"


def test_a_gpu_that_is_lost_is_a_failure(disttrain: Run, library: dict[str, str]) -> None:
    error = "nvmlDeviceGetHandleByIndex_v2:2:15"
    found = examined(disttrain, "driver", code=1, FAKE_NVML_ERROR=error, **library)
    assert found[0]["found"] == "999.10.05, 4 GPUs, 1 of them lost"
    (lost,) = (finding for finding in found if finding["status"] == "failure")
    assert (lost["subject"], lost["found"]) == ("GPU 2", "lost (unknown GPU): NVML: GPU is lost")
    assert lost["remedy"].startswith("take the node out of use; `dmesg` has the cause")


def test_a_driver_that_does_not_match_its_library(disttrain: Run, library: dict[str, str]) -> None:
    (found,) = examined(disttrain, "driver", FAKE_NVML_INIT="18", **library)
    assert (found["status"], found["found"]) == (
        "warning", "NVML: RM has detected an NVML/RM version mismatch",
    )  # fmt: skip
    assert "reboot after a driver update" in found["remedy"]


def test_memory_that_is_not_known_or_shared(disttrain: Run, library: dict[str, str], tmp_path: Path) -> None:
    path = {"LD_LIBRARY_PATH": f"{library['LD_LIBRARY_PATH']}:{nvml.build_cuda(tmp_path)}"}
    found = examined(disttrain, "driver", FAKE_NVML_TOTAL="1:0", **path)
    assert ", memory n/a, " in found[2]["found"]
    found = examined(disttrain, "driver", FAKE_NVML_TOTAL="1:0", FAKE_CUDA_INTEGRATED="1", **path)
    assert " GiB shared with the system, " in found[2]["found"]


def test_another_module_pynvml_is_named_with_its_remedy(
    disttrain: Run, library: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "packages" / "pynvml.py"
    file.parent.mkdir()
    file.write_text("x = 1")
    found = examined(disttrain, "driver", PYTHONPATH=str(file.parent), **library)
    assert [finding["subject"] for finding in found[:2]] == ["module pynvml", "NVIDIA driver"]
    assert found[0]["found"].startswith(f"the module pynvml ({file}) is not that of nvidia-ml-py")
    assert found[0]["remedy"] == f"rename {file}, or leave its folder out of PYTHONPATH"


def test_gpus_that_torch_cannot_use_are_a_failure(disttrain: Run, library: dict[str, str]) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("torch can use the real GPUs of this machine")
    found = examined(disttrain, "gpus", code=1, **library)
    assert [finding["subject"] for finding in found] == ["torch for CUDA", "GPUs"]
    assert found[1]["found"].startswith("NVML shows 4, torch can use 0: ")
    (hidden,) = examined(disttrain, "gpus", CUDA_VISIBLE_DEVICES="", **library)
    assert hidden["found"] == "none to train on (CUDA_VISIBLE_DEVICES=): runs use the CPU"


def test_a_library_that_crashes_is_a_line_and_the_rest_goes_on(
    disttrain: Run, library: dict[str, str]
) -> None:
    found = examined(disttrain, "driver", "clock", code=1, FAKE_NVML_CRASH="1", **library)
    assert [finding["check"] for finding in found] == ["driver", "clock"]
    assert found[0]["found"].startswith("ended by SIGABRT, in nvmlInit")
    assert found[0]["remedy"] == "see the output of: python -m disttrain.doctor.checks driver"


@pytest.mark.integration
def test_a_library_that_hangs_says_where(library: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import sys
from disttrain.doctor import checks
checks.CHECKS["driver"] = checks.CHECKS["driver"]._replace(limit_s=6)
sys.argv = ["", "driver"]
checks.main()
"""
    monkeypatch.setenv("FAKE_NVML_HANG", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", library["LD_LIBRARY_PATH"])
    (finding,) = run_isolated(program, 6)
    assert finding.found.startswith("no answer within 6 s, in nvmlInit")
