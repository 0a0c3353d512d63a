"""The rules of `disttrain doctor`: pure functions that turn facts into findings.

A failure means that training cannot work, a warning that it is slower or may break. A machine without a GPU
is fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from disttrain.monitor.nvml import Gpu
from disttrain.slurm_env import Allocation
from disttrain.units import gib, mib

_GIB = 2**30


class Finding(NamedTuple):
    """One line of the report: what was checked, its status, the facts with units, and a remedy."""

    subject: str
    status: Literal["ok", "warning", "failure"]
    found: str
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """Returns a finding without a problem."""
    return Finding(subject, "ok", found)


def warning(subject: str, found: str, remedy: str) -> Finding:
    """Returns a finding that makes training slower, or may break it."""
    return Finding(subject, "warning", found, remedy)


def failure(subject: str, found: str, remedy: str) -> Finding:
    """Returns a finding with which training cannot work."""
    return Finding(subject, "failure", found, remedy)


def unmet(requirements: Iterable[tuple[str, str]], versions: Mapping[str, str]) -> list[str]:
    """Returns the requirements (PEP 508) of packages that are not met; `versions` are by canonical name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    problems = []
    for package, text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            problems.append(f"{package} needs {requirement.name}, which is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problems.append(f"{package} needs {wanted}, but {version} is installed")
    return problems


def nccl(packages: Mapping[str, str], loaded: str | None, torch_cuda: str | None) -> Finding:
    """Judges the NCCL that torch has loaded, and the versions of the installed packages nvidia-nccl-cu*.

    `loaded` is its version, and `torch_cuda` the CUDA version of torch. Both are None for a build without
    CUDA.
    """
    if loaded is None or torch_cuda is None:
        return ok("NCCL", "none in this build of torch; only GPUs need it")
    own = f"nvidia-nccl-cu{torch_cuda.partition('.')[0]}"
    others = sorted(set(packages) - {own})
    if own in packages and others:
        return warning(
            "NCCL", f"{own} and {', '.join(others)} install into the same folder; {loaded} is in use",
            f"pip uninstall -y {own} {' '.join(others)} && pip install {own}=={packages[own]}",
        )  # fmt: skip
    if own in packages and packages[own] != loaded:
        remedy = "unset LD_LIBRARY_PATH and LD_PRELOAD, or remove the other NCCL from them"
        return warning("NCCL", f"{loaded} is in use, but {own} {packages[own]} is installed", remedy)
    return ok("NCCL", loaded)


_LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # CUDA release notes, table 2


def no_driver(problem: str, devices: Sequence[str], *, absent: bool) -> Finding:
    """Judges a machine on which NVML fails.

    Args:
        problem: NVML's error.
        devices: the GPUs that exist nevertheless.
        absent: whether the error is that of a machine without GPUs.
    """
    if absent and not devices:
        return ok("NVIDIA driver", "none, and no NVIDIA GPU")
    has = f"; but this machine has {', '.join(devices)}" if devices else ""
    return warning(
        "NVIDIA driver", f"{problem}{has}",
        "load the driver (nvidia-smi must work), or reboot after a driver update; in a container, use "
        "--gpus all with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    )  # fmt: skip


def lost_gpu(gpu: Gpu) -> Finding:
    """Judges a GPU that does not answer."""
    which = f"{gpu.name}, {gpu.uuid}" if gpu.uuid else gpu.name
    return failure(
        f"GPU {gpu.index}", f"lost ({which}): NVML: {gpu.lost}",
        "take the node out of use; `dmesg` has the cause (Xid); reset the GPU with nvidia-smi -r, or reboot",
    )  # fmt: skip


def driver(version: str, driver_cuda: tuple[int, int], torch_cuda: str | None, *, usable: bool) -> Finding:
    """Judges whether a driver supports torch's CUDA version; `torch_cuda` is None for a build without CUDA.

    A driver supports all versions of its major version of CUDA (CUDA compatibility guide). If an older driver
    has a `usable` GPU, forward compatibility libraries are installed.
    """
    has = f"driver {version}, CUDA up to {driver_cuda[0]}.{driver_cuda[1]}"
    if torch_cuda is None:
        remedy = "pip install --force-reinstall torch torchvision"
        return failure("torch for CUDA", f"{has}, but torch is a build without CUDA", remedy)
    major = int(torch_cuda.partition(".")[0])
    if driver_cuda[0] >= major:
        return ok("torch for CUDA", f"{has}; torch is built for CUDA {torch_cuda}")
    if usable:
        return ok("torch for CUDA", f"{has}; CUDA {torch_cuda} uses forward compatibility libraries")
    least = _LEAST_DRIVER.get(major)
    return failure(
        "torch for CUDA", f"{has}, but torch is built for CUDA {torch_cuda}",
        f"update the driver{f' to {least} or later' if least else ''}, or install a torch for CUDA "
        f"{driver_cuda[0]} (https://pytorch.org/get-started/locally)",
    )  # fmt: skip


def has_kernels(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Returns whether a build of torch has kernels for a compute capability.

    `archs` are from torch.cuda.get_arch_list: sm_80, sm_90a, compute_90.
    """

    def fits(arch: str) -> bool:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if found is None:
            return False
        kind, built, suffix = found[1], (int(found[2]), int(found[3])), found[4]
        if suffix == "a":  # only for this architecture
            return built == capability
        if kind == "compute" and not suffix:  # PTX, which the driver compiles for any newer GPU
            return built <= capability
        return built[0] == capability[0] and built[1] <= capability[1]

    return any(map(fits, archs))


def topology(pairs: Mapping[tuple[int, int], str], nvlinks: Sequence[int]) -> Finding:
    """Judges how GPUs are connected.

    Args:
        pairs: how two GPUs are connected: NVLink, or over PCIe PIX, PXB, PHB, NODE or SYS as in nvidia-smi.
        nvlinks: number of active NVLinks of each GPU.
    """
    ways: dict[str, list[tuple[int, int]]] = {}
    for pair, way in sorted(pairs.items()):
        ways.setdefault(way, []).append(pair)
    found = "; ".join(f"{way} between {_names(its)}" for way, its in ways.items())
    if len(ways) == 1:
        found = f"{next(iter(ways))} between all {len(nvlinks)} GPUs"
    if any(nvlinks):
        found += f", {'/'.join(map(str, sorted(set(nvlinks))))} NVLinks each"
    if len(set(nvlinks)) > 1:
        fewer = [str(i) for i, count in enumerate(nvlinks) if count < max(nvlinks)]
        return warning(
            "topology", found,
            f"GPU {', '.join(fewer)} has fewer active NVLinks than others: see `nvidia-smi nvlink -s`, check "
            "bridges and, with NVSwitch, that nvidia-fabricmanager runs",
        )  # fmt: skip
    return ok("topology", found)


def peers(access: Mapping[tuple[int, int], bool], linked: Iterable[tuple[int, int]]) -> Finding:
    """Judges whether the first GPU of a pair can access the memory of the second; `linked` have NVLink."""
    without = sorted(pair for pair, reached in access.items() if not reached)
    if broken := sorted(set(without) & set(linked)):
        return warning(
            "peer access", f"none between {_names(broken)}, although NVLink connects them",
            "see `nvidia-smi topo -p2p r`; disable ACS or IOMMU on the host, start nvidia-fabricmanager",
        )  # fmt: skip
    if not without:
        return ok("peer access", "between all GPUs")
    if len(without) == len(access):
        return ok("peer access", "none, as usual for these GPUs; NCCL uses host memory")
    return ok("peer access", f"none between {_names(without)}")


def _names(pairs: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{a}-{b}" for a, b in pairs)


def cores(usable: int, present: int, allocation: Allocation | None) -> Finding:
    """Judges the CPU cores that this process may use."""
    found = f"{usable} of {present} usable" if usable < present else str(present)
    if allocation is not None and allocation.cpus_per_task is not None and usable < allocation.cpus_per_task:
        wanted = allocation.cpus_per_task
        remedy = f"use srun --cpus-per-task={wanted}: srun does not inherit it from sbatch"
        return warning("cores", f"{found}, but the job asked for {wanted} per task", remedy)
    return ok("cores", found)


def shared_memory(total_bytes: int | None, gpus: int) -> Finding:
    """Judges /dev/shm, which NCCL uses between processes of a node; None if it does not exist."""
    found = "does not exist" if total_bytes is None else gib(total_bytes, 2)
    if gpus > 1 and (total_bytes or 0) <= 64 * 2**20:
        remedy = "start the container with --shm-size=1g or --ipc=host"
        return warning("/dev/shm", f"{found}: too small for NCCL between {gpus} GPUs", remedy)
    return ok("/dev/shm", found)


def open_files(soft: int, hard: int) -> Finding:
    """Judges the limit on open files; -1 means no limit."""
    if 0 <= soft < 1024:
        return warning(
            "open files", f"at most {soft:,}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
        )
    return ok("open files", "no limit" if soft < 0 else f"at most {soft:,}")


def locked_memory(soft_bytes: int, infiniband: Sequence[str]) -> Finding:
    """Judges the limit on locked memory, which InfiniBand needs; -1 means no limit."""
    found = "no limit" if soft_bytes < 0 else f"at most {mib(soft_bytes)}"
    if infiniband and 0 <= soft_bytes < _GIB:
        remedy = "ulimit -l unlimited, or LimitMEMLOCK=infinity for slurmd or the container"
        return warning("locked memory", f"{found}, with {', '.join(infiniband)}: NCCL cannot use it", remedy)
    return ok("locked memory", found)


def cluster(job: Allocation | None, version: str | None, ping: str | None) -> Finding:
    """Judges Slurm by the job of this process and the output of `srun --version` and `scontrol ping`."""
    place = "outside a job"
    if job is not None:
        step = "" if job.step is None else f", step {job.step},"
        place = f"in job {job.job}{step} of {job.nodes} node{'s' * (job.nodes > 1)}"
    if version is None or ping is None:
        if job is None:
            return ok("Slurm", "not installed")
        return warning("Slurm", f"{place}, but srun was not found", "add Slurm's commands to PATH")
    if " is UP" in ping:
        return ok("Slurm", f"{version}, {place}")
    if job is None and " is DOWN" not in ping:
        return ok("Slurm", "installed, but not connected to a cluster")
    return warning("Slurm", f"{place}; scontrol ping: {ping}", "no job can start until slurmctld is up")


def disk(subject: str, path: str, free_bytes: int, free_files: int | None) -> Finding:
    """Judges the free space on the disk of a folder; `free_files` is None if there is no such limit."""
    found = f"{gib(free_bytes)} free in {path}"
    remedy = "delete old runs and caches, or choose another disk: --run-dir, DISTTRAIN_DATA, DISTTRAIN_CACHE"
    if free_files is not None and free_files < 100:
        return failure(subject, f"{found}, but only {free_files} files can be created", remedy)
    if free_bytes < 2**30 // 10:
        return failure(subject, found, remedy)
    if free_bytes < _GIB:
        return warning(subject, found, remedy)
    return ok(subject, found)


def clock(elapsed_s: Sequence[float], now_s: float, newest_s: float, file_s: float) -> Finding:
    """Judges the clocks.

    Args:
        elapsed_s: length of the same pause by the monotonic clock and by the wall clock.
        now_s: wall clock, in seconds since 1970.
        newest_s: time of the newest file of this installation, in seconds since 1970.
        file_s: time that the file system gives to a file written now, in seconds since 1970.
    """
    monotonic, wall = elapsed_s
    set_it = "start chrony or another NTP client"
    if monotonic <= 0:
        found = f"the monotonic clock advanced {monotonic:.3f} s during a pause"
        return failure("clock", found, "reboot or repair the host")
    if now_s < newest_s - 86400:
        return failure("clock", f"is {(newest_s - now_s) / 86400:,.0f} days before this installation", set_it)
    if abs(wall - monotonic) > 1:
        return warning("clock", f"the wall clock jumped by {wall - monotonic:.1f} s during a pause", set_it)
    if abs(file_s - now_s) > 5:
        return warning(
            "clock", f"files in the current folder are dated {file_s - now_s:+.0f} s from now",
            f"{set_it}, here and on the file server",
        )  # fmt: skip
    return ok("clock", "steady, and agrees with the file system")


def nccl_interfaces(names: Sequence[str], setting: str | None) -> list[str]:
    """Returns the interfaces that NCCL may use, in order of preference.

    Args:
        names: interfaces that are up, in the order of the system.
        setting: NCCL_SOCKET_IFNAME: prefixes; a leading ^ excludes them, a leading = means exact names.
    """
    if setting:
        excluded, exact = setting.startswith("^"), setting.lstrip("^").startswith("=")
        listed = tuple(filter(None, setting.lstrip("^=").split(",")))
        return [name for name in names if (name in listed if exact else name.startswith(listed)) != excluded]
    special = {kind: [name for name in names if name.startswith(kind)] for kind in ("ib", "docker", "lo")}
    rest = [name for name in names if not name.startswith(tuple(special))]
    return special["ib"] or rest or special["docker"] or special["lo"]


def nccl_network(names: Sequence[str], setting: str | None) -> Finding:
    """Judges the interface that NCCL uses between nodes; arguments as for `nccl_interfaces`."""
    taken = nccl_interfaces(names, setting)
    given = f" (NCCL_SOCKET_IFNAME={setting})" if setting else ""
    if not taken:
        return failure(
            "NCCL network", f"no interface of {', '.join(names) or 'none that is up'}{given}",
            "unset NCCL_SOCKET_IFNAME, or set it to one of these",
        )  # fmt: skip
    return ok("NCCL network", f"{', '.join(taken)}{given}")


def torch_debugging(level: str) -> Iterator[Finding]:
    """Judges TORCH_DISTRIBUTED_DEBUG; there is nothing to say of a level with which DDP works."""
    if level.upper() == "DETAIL":
        yield warning(
            "torch's debugging", "TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch's DDP crash; runs use INFO",
            "unset it, or set it to INFO",
        )  # fmt: skip


def gloo_network(
    addresses: Mapping[str, Sequence[str]], setting: str | None, host: str, own: str | None, nodes: int
) -> Finding:
    """Judges the interface that gloo uses.

    Args:
        addresses: addresses of the interfaces that are up.
        setting: GLOO_SOCKET_IFNAME, or None.
        host: name of this host.
        own: address of this host that its name resolves to; None if there is none.
        nodes: number of nodes of the job.
    """
    subject = "gloo network"
    if setting:
        missing = ", ".join(name for name in setting.split(",") if name not in addresses)
        if not missing:
            return ok(subject, f"{setting} (GLOO_SOCKET_IFNAME)")
        found = f"GLOO_SOCKET_IFNAME={setting}: {missing} does not exist or is down"
        return failure(subject, found, f"unset it, or set it to one of {', '.join(addresses)}")
    taken = next((name for name, owned in addresses.items() if own in owned), "lo")
    resolved = f"{host} is {own}" if own else f"the name {host} does not resolve to an address of this host"
    found = f"{taken} ({resolved})"
    if taken != "lo":
        return ok(subject, found)
    other = next((name for name in addresses if name != "lo"), "INTERFACE")
    remedy = f"export GLOO_SOCKET_IFNAME={other} on every node"
    if nodes > 1:
        return warning(subject, f"{found}: no other node can reach this one", remedy)
    return ok(subject, f"{found}; for CPU runs on several nodes: {remedy}")


def losses(
    subject: str, found: Sequence[float], expected: Sequence[float], tolerance: float, step_ms: float
) -> Finding:
    """Judges a training step by the losses before and after it.

    The `expected` losses are from float64 on the CPU; `tolerance` is the largest allowed relative difference.
    """
    text = " -> ".join(f"{loss:.4f}" for loss in found)
    if any(not abs(a - b) <= tolerance * abs(b) for a, b in zip(found, expected, strict=True)):
        right = " -> ".join(f"{loss:.4f}" for loss in expected)
        remedy = "stop using the device; on a GPU, see `nvidia-smi -q -d ECC` and reinstall torch"
        return failure(subject, f"wrong result: loss {text} instead of {right}", remedy)
    return ok(subject, f"a training step takes {step_ms:.3g} ms, loss {text} as expected")
