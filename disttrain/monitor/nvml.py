"""The GPUs of this node, and those that CUDA programs see, from NVML through nvidia-ml-py.

GPUs are identified by UUID, because NVML and CUDA may number them differently. This module does not import
torch, and imports pynvml only when it queries GPUs. The readings (load, power, ...) are in readings.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.monitor import nvml_module
from disttrain.monitor.cuda_driver import cuda_gpus
from disttrain.units import MIB

_log = logging.getLogger("disttrain")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU, as NVML reports it.

    Attributes:
        index: NVML index of the GPU (the one nvidia-smi shows); of the parent for a MIG instance.
        uuid: with its prefix, `GPU-` or `MIG-`.
        name: product name.
        memory_total_mib: None if it cannot be read, or if the GPU has no memory of its own.
        minor: number of its device file /dev/nvidia<minor>. In a container with some of the GPUs, indexes
            start at 0, but this number stays the same.
        lost: NVML's error for a GPU that does not answer; its unknown fields are then empty or None.
    """

    index: int
    uuid: str
    name: str
    memory_total_mib: int | None
    minor: int | None = None
    lost: str | None = None


class Trouble(NamedTuple):
    """Why NVML cannot be used.

    Attributes:
        text: in words.
        absent: it is what NVML says on a machine without GPUs; device files tell whether it is one.
    """

    text: str
    absent: bool


def trouble() -> Trouble | None:
    """Returns why NVML cannot be used; None where it can."""
    nvml, problem, _ = nvml_module.find()
    if nvml is None:
        return Trouble(str(problem), absent=False)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        missing = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return Trouble(f"NVML: {_text(error)}", getattr(error, "value", None) in missing)
    ask(nvml.nvmlShutdown)
    return None


def visible_gpus() -> list[Gpu]:
    """Returns the GPUs that CUDA programs see in this environment, in CUDA's order; [] without NVML.

    Honours CUDA_VISIBLE_DEVICES. Plain indexes are taken in PCI bus order. CUDA uses the same order unless
    the GPUs of the node differ in speed and CUDA_DEVICE_ORDER is not PCI_BUS_ID. Match a GPU to a rank by
    UUID, not by its place in this list.
    """
    with session() as nvml:
        if nvml is None:
            return _seen_by_cuda() if device_files() else []
        gpus, instances, _ = _list(nvml)
        spec = os.environ.get("CUDA_VISIBLE_DEVICES")
        if spec is not None and "MIG-GPU-" in spec:  # MIG names before driver 470
            entries = [part.strip() for part in spec.split(",")]
            found = [gpu_of(nvml, ask(nvml.nvmlDeviceGetHandleByUUID, entry)) for entry in entries]
            spec = ",".join(
                gpu.uuid if gpu is not None else entry for gpu, entry in zip(found, entries, strict=True)
            )
    return _cuda_order(spec, gpus, instances)


def _seen_by_cuda() -> list[Gpu]:
    """Returns the GPUs that CUDA sees, for use without NVML; their index is -1."""
    return [Gpu(-1, gpu.uuid, gpu.name, gpu.memory_total_mib) for gpu in cuda_gpus()]


def node_gpus() -> list[Gpu]:
    """Returns the GPUs of this node, lost ones included, each followed by its MIG instances."""
    with session() as nvml:
        gpus, instances, lost = ([], {}, []) if nvml is None else _list(nvml)
    in_order = sorted([*gpus, *lost], key=lambda gpu: gpu.index)
    return [each for gpu in in_order for each in (gpu, *instances.get(gpu.uuid, ()))]


def lost_gpus() -> list[Gpu]:
    """Returns the GPUs of this node that do not answer."""
    return [gpu for gpu in node_gpus() if gpu.lost is not None]


def device_files(devices: Path = Path("/dev")) -> list[str]:
    """Returns the GPU device files that this process may open; Slurm denies access to those of other jobs.

    Args:
        devices: the folder of device files.
    """
    usable = []
    for path in sorted(devices.glob("nvidia[0-9]*")):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDWR))
            usable.append(str(path))
    return usable


def unusable_gpus(devices: Path = Path("/dev")) -> str | None:
    """Returns why CUDA programs see none of the GPUs of this node; None if nothing is wrong.

    Args:
        devices: the folder of device files.
    """
    files = device_files(devices)
    if not files or not wants_gpus() or visible_gpus():
        return None
    why = trouble()
    if why is not None:
        return f"{', '.join(files)}: {why.text}"
    spec = os.environ.get("CUDA_VISIBLE_DEVICES")
    if spec is not None and any(gpu.lost is None for gpu in node_gpus()):
        return f"{', '.join(files)}: CUDA_VISIBLE_DEVICES={spec} names no GPU that works here"
    return f"{', '.join(files)}: NVML shows no GPU to this process"


def wants_gpus() -> bool:
    """Tells whether CUDA_VISIBLE_DEVICES leaves CUDA programs a GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1", "NoDevFiles")


def gpu_of_device(uuid: str, pci_bus_id: str | None) -> Gpu | None:
    """Returns the GPU or MIG instance behind a CUDA device of this process; None if NVML does not list it.

    Args:
        uuid: as CUDA reports it, without prefix.
        pci_bus_id: `<domain>:<bus>:<device>.0` in hexadecimal, used if NVML does not know the UUID; None if
            CUDA does not report it.
    """
    with session() as nvml:
        if nvml is None:
            return None
        handle = handle_of(nvml, uuid)
        if handle is None and pci_bus_id is not None:
            handle = ask(nvml.nvmlDeviceGetHandleByPciBusId, pci_bus_id)
        gpu = gpu_of(nvml, handle)
        if gpu is None or not _instances(nvml, handle):
            return gpu
    # CUDA reported the parent GPU, but it runs on the one MIG instance that it sees.
    return next((seen for seen in visible_gpus() if seen.index == gpu.index), gpu)


def _list(nvml: Any) -> tuple[list[Gpu], dict[str, list[Gpu]], list[Gpu]]:
    """Returns the GPUs in NVML's order, the MIG instances of each by its UUID, and the GPUs that are lost."""
    gpus: list[Gpu] = []
    instances: dict[str, list[Gpu]] = {}
    lost: list[Gpu] = []
    for index in range(ask(nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        gpu = gpu_of(nvml, handle, index)
        if error := _loss(nvml, index):
            unknown = Gpu(index, "", "unknown GPU", None)
            lost.append(replace(gpu or unknown, memory_total_mib=None, lost=error))
        elif gpu is not None:
            gpus.append(gpu)
            described = [gpu_of(nvml, instance, index) for instance in _instances(nvml, handle)]
            instances[gpu.uuid] = [instance for instance in described if instance is not None]
    return gpus, instances, lost


def _loss(nvml: Any, index: int) -> str | None:
    """Returns NVML's error for a GPU that does not answer; None for one that does, or that is not ours."""
    not_lost = (nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NOT_FOUND)
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        return None if error.value in not_lost else _text(error)
    try:
        nvml.nvmlDeviceGetMemoryInfo(handle)  # not remembered from before, as the UUID is
    except nvml.NVMLError as error:
        gone = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
        return _text(error) if error.value in gone else None
    except nvml.NVMLLibraryMismatchError:
        return None
    return None


def _text(error: Exception) -> str:
    return str(error).rstrip(".")


def _instances(nvml: Any, handle: Any) -> list[Any]:
    """Returns the handles of the MIG instances of a GPU."""
    slots = range(ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    found = (ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in slots)
    return [instance for instance in found if instance is not None]


def handle_of(nvml: Any, uuid: str) -> Any:
    """Returns the handle for a UUID with or without prefix; None if there is no such GPU."""
    found = (ask(nvml.nvmlDeviceGetHandleByUUID, prefix + uuid) for prefix in ("", "GPU-", "MIG-"))
    return next((handle for handle in found if handle is not None), None)


def gpu_of(nvml: Any, handle: Any, index: int | None = None) -> Gpu | None:
    """Returns the GPU or MIG instance of a handle; None without a handle or if the GPU is lost."""
    if handle is None:
        return None
    parent = ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    whole = handle if parent is None else parent
    if index is None:
        index = ask(nvml.nvmlDeviceGetIndex, whole)
    uuid = ask(nvml.nvmlDeviceGetUUID, handle)
    if uuid is None or index is None:
        return None
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    total_mib = None if memory is None or not memory.total else memory.total // MIB
    name = ask(nvml.nvmlDeviceGetName, handle) or "unknown GPU"
    return Gpu(index, uuid, name, total_mib, ask(nvml.nvmlDeviceGetMinorNumber, whole))


def _cuda_order(spec: str | None, gpus: Sequence[Gpu], instances: Mapping[str, Sequence[Gpu]]) -> list[Gpu]:
    """Returns the GPUs that CUDA selects by CUDA_VISIBLE_DEVICES (CUDA C++ Programming Guide).

    Args:
        spec: the value; None when it is not set.
        gpus: in NVML's order.
        instances: the MIG instances of each GPU, by the UUID of the GPU.
    """
    chosen: list[Gpu] = []
    if spec is None:
        chosen = list(gpus)
    else:
        everything = [*gpus, *(instance for group in instances.values() for instance in group)]
        prefix = spec.strip()[:4] if spec.strip()[:4] in ("GPU-", "MIG-") else ""
        for entry in (part.strip() for part in spec.split(",")):
            if prefix:
                matches = [gpu for gpu in everything if gpu.uuid.startswith(entry)]
                known = entry.startswith(prefix) and len(matches) == 1
            else:
                number = re.match(r"\+?[0-9]+", entry)  # CUDA reads "1abc" as 1
                matches = list(gpus[int(number.group()) :][:1]) if number else []
                known = bool(matches)
            if not known:
                break
            if matches[0] in chosen:
                return []  # a repeated entry hides all
            chosen.append(matches[0])
    for gpu in chosen:  # CUDA sees at most one MIG instance, and no GPU beside it (MIG user guide)
        if gpu.uuid.startswith("MIG-"):
            return [gpu]
        if instances.get(gpu.uuid):
            return [instances[gpu.uuid][0]]
    return chosen


@contextlib.contextmanager
def session() -> Iterator[Any]:
    """Yields the NVML module, initialised, or None if NVML cannot be used; sessions may overlap."""
    nvml: Any
    nvml, problem, _ = nvml_module.find()
    if nvml is None:
        _log.info("no readings of GPUs: %s; see `disttrain doctor`", problem)
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        _log.info("no readings of GPUs: NVML: %s", error)
        yield None
        return
    try:
        yield nvml
    finally:
        ask(nvml.nvmlShutdown)


def ask(query: Callable[..., Any], *args: object) -> Any:
    """Returns the result of an NVML query; None if it fails or is not supported."""
    nvml: Any = nvml_module.find().module
    try:
        return query(*args)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError, UnicodeDecodeError):
        return None
