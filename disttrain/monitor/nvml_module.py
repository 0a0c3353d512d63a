"""The Python module for NVML: that of nvidia-ml-py, whatever else is called pynvml in this environment.

Other packages install a module of the same name, pynvml before version 12 and nvidia-ml-py3, and so may the
user. They lack functions that are used here. A package beside nvidia-ml-py only hides its file, which is then
loaded by its path.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.errors import error_text

_PACKAGE = "nvidia-ml-py"
_NAME = "disttrain_nvidia_ml_py"  # of its module, where another one is called pynvml
_NAMES = """
    NVMLError NVMLLibraryMismatchError NVML_CLOCK_MEM NVML_CLOCK_SM NVML_ERROR_DRIVER_NOT_LOADED
    NVML_ERROR_FUNCTION_NOT_FOUND NVML_ERROR_GPU_IS_LOST NVML_ERROR_INVALID_ARGUMENT
    NVML_ERROR_LIBRARY_NOT_FOUND NVML_ERROR_NOT_FOUND NVML_ERROR_NOT_SUPPORTED NVML_ERROR_NO_PERMISSION
    NVML_ERROR_RESET_REQUIRED NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES NVML_FI_DEV_PCIE_COUNT_TX_BYTES NVML_GPM_METRICS_GET_VERSION
    NVML_GPM_METRIC_ANY_TENSOR_UTIL NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC
    NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC NVML_GPM_METRIC_PCIE_RX_PER_SEC NVML_GPM_METRIC_PCIE_TX_PER_SEC
    NVML_GPM_METRIC_SM_UTIL NVML_MEMORY_ERROR_TYPE_CORRECTED NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_NVLINK_MAX_LINKS NVML_P2P_CAPS_INDEX_NVLINK NVML_P2P_STATUS_OK NVML_PCIE_UTIL_RX_BYTES
    NVML_PCIE_UTIL_TX_BYTES NVML_SUCCESS NVML_TEMPERATURE_GPU NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
    NVML_VOLATILE_ECC c_nvmlGpmMetricsGet_t nvmlDeviceGetClockInfo nvmlDeviceGetComputeRunningProcesses
    nvmlDeviceGetCount nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons
    nvmlDeviceGetDeviceHandleFromMigDeviceHandle nvmlDeviceGetEnforcedPowerLimit nvmlDeviceGetFieldValues
    nvmlDeviceGetGpuInstanceId nvmlDeviceGetHandleByIndex nvmlDeviceGetHandleByPciBusId
    nvmlDeviceGetHandleByUUID nvmlDeviceGetIndex nvmlDeviceGetMaxMigDeviceCount nvmlDeviceGetMemoryInfo
    nvmlDeviceGetMigDeviceHandleByIndex nvmlDeviceGetMinorNumber nvmlDeviceGetName nvmlDeviceGetNvLinkState
    nvmlDeviceGetP2PStatus nvmlDeviceGetPcieThroughput nvmlDeviceGetPowerUsage
    nvmlDeviceGetSupportedEventTypes nvmlDeviceGetTemperature nvmlDeviceGetTopologyCommonAncestor
    nvmlDeviceGetTotalEccErrors nvmlDeviceGetUUID nvmlDeviceGetUtilizationRates nvmlDeviceRegisterEvents
    nvmlEventSetCreate nvmlEventSetFree nvmlEventSetWait_v2 nvmlEventTypeXidCriticalError nvmlGpmMetricsGet
    nvmlGpmMigSampleGet nvmlGpmQueryDeviceSupport nvmlGpmSampleAlloc nvmlGpmSampleFree nvmlGpmSampleGet
    nvmlInit nvmlLib nvmlMemory_v2 nvmlShutdown nvmlSystemGetCudaDriverVersion nvmlSystemGetDriverVersion
"""
NEEDED = frozenset(_NAMES.split())
"""Every name of the module that this package uses."""


class Found(NamedTuple):
    """The module for NVML, and what is wrong with the one that is called pynvml.

    Attributes:
        module: that of nvidia-ml-py; None where there is none.
        problem: where the module pynvml comes from and why it does not serve; None where it does.
        remedy: a command, or what to do; empty without a problem.
    """

    module: Any
    problem: str | None = None
    remedy: str = ""


@functools.cache
def find() -> Found:
    """Returns the module for NVML; imported once in a process."""
    try:
        module = importlib.import_module("pynvml")
    except (Exception, SystemExit) as error:  # whatever a file of this name does
        problem = f"the module pynvml ({_file()}) cannot be imported: {error_text(error)}"
        return Found(_own_file(), problem, _remedy())
    lacking = _lacking(module)
    if lacking is None:
        return Found(module)
    # nvidia-ml-py3 has the path of nvidia-ml-py: what the file has tells them apart, not where it is.
    problem = f"the module pynvml ({_file()}) is not that of {_PACKAGE}: it has no {lacking}"
    return Found(_own_file(), problem, _remedy())


def _lacking(module: Any) -> str | None:
    return next((name for name in sorted(NEEDED) if not hasattr(module, name)), None)


def _own_file() -> Any:
    """Returns the module that nvidia-ml-py has installed, loaded by its path; None if there is none."""
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file("pynvml.py")))
        spec = importlib.util.spec_from_file_location(_NAME, path)
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module  # where it looks for itself
        spec.loader.exec_module(module)
    except (Exception, SystemExit):  # it is not installed, or its file is another one or damaged
        return None
    return module if _lacking(module) is None else None


def _file() -> str | None:
    """Returns the file that `import pynvml` takes."""
    spec = importlib.util.find_spec("pynvml")
    return None if spec is None else spec.origin


def _remedy() -> str:
    """Returns how the module of nvidia-ml-py becomes the one that is called pynvml."""
    install = f"python -m pip install --upgrade --force-reinstall {_PACKAGE}"
    file = _file()
    if file is None:
        return install
    others = sorted({one.name for one in importlib.metadata.distributions() if _has(one, Path(file))})
    if foreign := [name for name in others if name != _PACKAGE]:
        return f"python -m pip uninstall -y {' '.join(foreign)} && {install}"
    return install if others else f"rename {file}, or leave its folder out of PYTHONPATH"


def _has(one: importlib.metadata.Distribution, file: Path) -> bool:
    """Tells whether a package installed a file."""
    names = ("pynvml.py", "pynvml/__init__.py")
    return any(str(path) in names and Path(str(path.locate())) == file for path in one.files or ())
