"""GPUs as NVML knows them, through nvidia-ml-py and a stand-in for NVIDIA's library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import disttrain
from disttrain.monitor.nvml import Gpu, _cuda_order
from disttrain.monitor.nvml_module import NEEDED
from kit import nvml
from kit.nvml import UUIDS

pytestmark = pytest.mark.integration

VISIBLE = """
import json
from disttrain.monitor.nvml import visible_gpus
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
from disttrain.monitor.nvml import gpu_of_device, node_gpus, visible_gpus
from disttrain.monitor.readings import GpuReaders
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


UNUSABLE = """
import json
from pathlib import Path
from disttrain.monitor.nvml import unusable_gpus
print(json.dumps(unusable_gpus(Path({devices!r}))))
"""


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        (
            ["nvidia0", "nvidia1"],
            {"FAKE_NVML_BROKEN": "1"},
            "{0}/nvidia0, {0}/nvidia1: NVML: Driver Not Loaded",
        ),
        (
            ["nvidia0", "nvidia1"],
            {"FAKE_NVML_SEEN": ""},
            "{0}/nvidia0, {0}/nvidia1: NVML shows no GPU to this process",
        ),
        (["nvidia0"], {}, None),  # the GPUs are seen
        (["nvidiactl"], {"FAKE_NVML_BROKEN": "1"}, None),  # no GPU
        (["nvidia0"], {"FAKE_NVML_BROKEN": "1", "CUDA_VISIBLE_DEVICES": ""}, None),  # none is wanted
    ],
)
def test_gpus_that_cannot_be_used_are_no_secret(
    library: Path, tmp_path: Path, files: list[str], variables: dict[str, str], expected: str | None
) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = nvml.run(UNUSABLE.format(devices=str(tmp_path)), library, **variables)
    assert found == (expected and expected.format(tmp_path))


# --- A GPU that is lost -----------------------------------------------------------------------------

HANDLE_FAILS = {"FAKE_NVML_ERROR": "nvmlDeviceGetHandleByIndex_v2:2:15"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (HANDLE_FAILS, [2, "", "GPU is lost"]),
        ({"FAKE_NVML_LOST": "2:0"}, [2, UUIDS[2], "GPU is lost"]),  # its handle and UUID are remembered
        ({"FAKE_NVML_ERROR": "nvmlDeviceGetHandleByIndex_v2:2:999"}, [2, "", "Unknown Error"]),
        ({"FAKE_NVML_ERROR": "nvmlDeviceGetHandleByIndex_v2:2:4"}, None),  # another job's
        ({"FAKE_NVML_ERROR": "nvmlDeviceGetMemoryInfo:2:3"}, None),  # has no memory of its own
    ],
)
def test_a_gpu_that_does_not_answer_is_lost_and_none_that_cuda_sees(
    library: Path, variables: dict[str, str], expected: list[Any] | None
) -> None:
    program = VISIBLE + "from disttrain.monitor.nvml import lost_gpus, node_gpus\n"
    program = program.replace("print(json.dumps(", "seen = (").replace(
        "visible_gpus()]))", "visible_gpus()])"
    )
    program += "lost = [[gpu.index, gpu.uuid, gpu.lost] for gpu in lost_gpus()]\n"
    program += "print(json.dumps([[row[0] for row in seen], lost, [gpu.index for gpu in node_gpus()]]))\n"
    seen, lost, everything = nvml.run(program, library, **variables)
    assert lost == ([expected] if expected else [])
    if expected:
        assert (seen, everything) == ([0, 1, 3], [0, 1, 2, 3])
    else:
        assert 2 in seen or variables["FAKE_NVML_ERROR"].endswith(":4")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FAKE_NVML_INIT": "18"}, ["NVML: RM has detected an NVML/RM version mismatch", False]),
        ({"FAKE_NVML_BROKEN": "1"}, ["NVML: Driver Not Loaded", True]),
        ({}, None),
    ],
)
def test_why_nvml_cannot_be_used(
    library: Path, variables: dict[str, str], expected: list[object] | None
) -> None:
    program = "import json\nfrom disttrain.monitor.nvml import trouble\nprint(json.dumps(trouble()))"
    assert nvml.run(program, library, **variables) == expected


def test_a_choice_of_gpus_that_names_none_is_no_wish_for_the_cpu(library: Path, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    program = UNUSABLE.format(devices=str(tmp_path))
    found = nvml.run(program, library, CUDA_VISIBLE_DEVICES="7")
    assert found == f"{tmp_path}/nvidia0: CUDA_VISIBLE_DEVICES=7 names no GPU that works here"
    mismatch = nvml.run(program, library, CUDA_VISIBLE_DEVICES="0", FAKE_NVML_INIT="18")  # as Slurm sets it
    assert mismatch == f"{tmp_path}/nvidia0: NVML: RM has detected an NVML/RM version mismatch"


# --- Another module that is called pynvml -----------------------------------------------------------


def test_every_name_that_is_used_of_the_module_is_looked_for() -> None:
    used: set[str] = set()
    for path in Path(disttrain.__file__).parent.rglob("*.py"):
        if path.name != "nvml_module.py":
            used |= set(re.findall(r'nvml\.((?:c_)?(?:nvml|NVML)\w+)|"(NVML_\w+)"', path.read_text()))
    assert {name for pair in used for name in pair if name} == NEEDED


FIND = """
import json
from disttrain.monitor import nvml_module
from disttrain.monitor.nvml import visible_gpus
found = nvml_module.find()
print(json.dumps([found.module is not None, found.problem, found.remedy, len(visible_gpus())]))
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with another module pynvml."""
    (tmp_path / "pynvml.py").write_text("class NVMLError(Exception):\n    pass\ndef nvmlInit():\n    pass\n")
    return tmp_path


def test_another_module_pynvml_only_hides_ours(library: Path, foreign: Path) -> None:
    found = nvml.run(FIND, library, PYTHONPATH=str(foreign))
    file = foreign / "pynvml.py"
    assert found == [
        True,
        f"the module pynvml ({file}) is not that of nvidia-ml-py: it has no NVMLLibraryMismatchError",
        f"rename {file}, or leave its folder out of PYTHONPATH",
        4,
    ]


def test_a_package_with_another_module_pynvml_is_named_for_removal(library: Path, foreign: Path) -> None:
    info = foreign / "pynvml-11.5.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pynvml\nVersion: 11.5.3\n")
    (info / "RECORD").write_text("pynvml.py,,\n")
    remedy = nvml.run(FIND, library, PYTHONPATH=str(foreign))[2]
    assert remedy == (
        "python -m pip uninstall -y pynvml && python -m pip install --upgrade --force-reinstall nvidia-ml-py"
    )


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "x = 1"])
def test_without_our_module_nothing_is_read_and_nothing_fails(
    library: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "pynvml.py").write_text(text)
    info = tmp_path / "nvidia_ml_py-99.dist-info"  # whose file another package has replaced
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-ml-py\nVersion: 99\n")
    (info / "RECORD").write_text("pynvml.py,,\n")
    ours, problem, remedy, gpus = nvml.run(FIND, library, PYTHONPATH=str(tmp_path))
    assert (ours, gpus) == (False, 0)
    assert f"the module pynvml ({tmp_path}/pynvml.py)" in problem
    assert remedy == "python -m pip install --upgrade --force-reinstall nvidia-ml-py"
    program = """
import json
from disttrain.monitor.nvml import gpu_of_device, node_gpus, trouble
from disttrain.monitor.readings import GpuReaders
with GpuReaders(["GPU-1"], [], print) as readers:
    sweep = readers.sweep()
print(json.dumps([node_gpus(), gpu_of_device("1", "00000000:10:00.0"), sweep, trouble()[1]]))
"""
    assert nvml.run(program, library, PYTHONPATH=str(tmp_path)) == [[], None, [None], False]


def test_where_nvml_cannot_be_used_cuda_says_which_gpus_there_are(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("x = 1")
    (tmp_path / "nvidia_ml_py-99.dist-info").mkdir()
    program = """
import json
from disttrain.monitor import nvml
nvml.device_files = lambda: ["/dev/nvidia0"]
print(json.dumps([[gpu.index, gpu.uuid, gpu.name, gpu.memory_total_mib] for gpu in nvml.visible_gpus()]))
"""
    folder = nvml.build_cuda(tmp_path)
    variables = {"PYTHONPATH": str(tmp_path), "FAKE_NVML_GPUS": "2"}
    expected = [[-1, UUIDS[i], f"NVIDIA Fake {i}", 81920] for i in range(2)]
    assert nvml.run(program, folder, **variables) == expected
    assert nvml.run(program, folder, FAKE_CUDA_BROKEN="1", **variables) == []
