"""The checks of `disttrain doctor` on GPUs: what NVML says of them, and what torch can use."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disttrain.doctor import rules
from disttrain.doctor.rules import Finding, failure, ok, warning
from disttrain.errors import reason
from disttrain.monitor import nvml_module
from disttrain.monitor.nvml import Gpu, ask, device_files, lost_gpus, trouble, visible_gpus, wants_gpus
from disttrain.monitor.readings import memory_of


def driver(_: str) -> Iterator[Finding]:
    """Checks the NVIDIA driver, its GPUs and how they are connected, with NVML."""
    nvml, problem, remedy = nvml_module.find()
    if problem is not None:
        then = "GPUs are not read" if nvml is None else "disttrain uses nvidia-ml-py's own file"
        yield warning("module pynvml", f"{problem}; {then}", remedy)
    if nvml is None:
        return
    if (why := trouble()) is not None:
        yield rules.no_driver(why.text, [*device_files(), *_pci_devices()], absent=why.absent)
        return
    nvml.nvmlInit()
    gpus, lost = visible_gpus(), lost_gpus()
    count, version = nvml.nvmlDeviceGetCount(), nvml.nvmlSystemGetDriverVersion()
    without = f", {len(lost)} of them lost" if lost else ""
    yield ok("NVIDIA driver", f"{version}, {count} GPUs{without}")
    for gpu in gpus:
        yield ok(f"GPU {gpu.index}", f"{gpu.name}, {_memory(gpu)}, {gpu.uuid}")
    for gpu in lost:
        yield rules.lost_gpu(gpu)
    if len(gpus) > 1:
        handles = [nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
        pairs = itertools.combinations(range(len(gpus)), 2)
        ways = {(a, b): _way(nvml, handles[a], handles[b]) for a, b in pairs}
        state, links = nvml.nvmlDeviceGetNvLinkState, range(nvml.NVML_NVLINK_MAX_LINKS)
        active = [sum(ask(state, handle, link) or 0 for link in links) for handle in handles]
        yield rules.topology(ways, active)


def _memory(gpu: Gpu) -> str:
    total_mib, shared = memory_of(gpu)
    if total_mib is None:
        return "memory n/a"
    return f"{total_mib / 1024:,.0f} GiB{' shared with the system' if shared else ''}"


def gpus(_: str) -> Iterator[Finding]:
    """Checks which GPUs torch can use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible_gpus()
    if not known and not (wants_gpus() and device_files()):
        why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})"
        yield ok("GPUs", f"none to train on{why}: runs use the CPU")
        return
    import torch

    problem = "torch is a build without CUDA"
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            problem = reason(error)
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    nvml: Any = nvml_module.find().module
    if nvml is not None and trouble() is None:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            major, rest = divmod(nvml.nvmlSystemGetCudaDriverVersion(), 1000)
            version = nvml.nvmlSystemGetDriverVersion()
            yield rules.driver(version, (major, rest // 10), torch.version.cuda, usable=count > 0)
    if count != len(known) or count == 0:
        why = f": {problem}" if count == 0 else ""
        found = f"NVML shows {len(known)}, torch can use {count}{why}"
        yield failure("GPUs", found, "see the lines on driver and packages; in a container, use --gpus all")
    archs = torch.cuda.get_arch_list()
    for i in range(count):
        device = torch.cuda.get_device_properties(i)
        found = f"{device.name}, compute capability {device.major}.{device.minor}, GPU-{device.uuid}"
        if rules.has_kernels((device.major, device.minor), archs):
            yield ok(f"cuda:{i}", found)
        else:
            found += f": torch has kernels only for {', '.join(archs)}"
            remedy = "install a torch for this GPU (https://pytorch.org/get-started/locally)"
            yield failure(f"cuda:{i}", found, remedy)
    if count > 1:
        both = list(itertools.permutations(range(count), 2))
        access = {(a, b): torch.cuda.can_device_access_peer(a, b) for a, b in both}
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
        yield rules.peers(access, _linked(nvml, uuids, both))


def _linked(nvml: Any, uuids: list[str], pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the pairs of GPUs that NVLink connects; none are known without NVML."""
    if nvml is None:
        return []
    handles = [ask(nvml.nvmlDeviceGetHandleByUUID, uuid) for uuid in uuids]
    return [(a, b) for a, b in pairs if _way(nvml, handles[a], handles[b]) == "NVLink"]


def _pci_devices() -> list[str]:
    """Returns the NVIDIA GPUs on the PCI bus, with or without a driver."""
    found = []
    for path in sorted(Path("/sys/bus/pci/devices").glob("*")):
        with contextlib.suppress(OSError):
            display = (path / "class").read_text().startswith("0x03")
            if display and (path / "vendor").read_text().strip() == "0x10de":
                found.append(f"PCI device {path.name}")
    return found


def _way(nvml: Any, a: Any, b: Any) -> str:
    """Returns how two GPUs are connected, with the names of nvidia-smi topo."""
    state = ask(nvml.nvmlDeviceGetP2PStatus, a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    if state == nvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    level = ask(nvml.nvmlDeviceGetTopologyCommonAncestor, a, b)
    return {0: "one board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}.get(level, "unknown")
