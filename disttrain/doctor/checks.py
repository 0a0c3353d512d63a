"""The checks of `disttrain doctor`: each gathers facts and passes them to a rule.

`python -m disttrain.doctor.checks NAME [ARGUMENT]` runs one check, and prints a finding as JSON on each line.
A check may crash or hang: it has its own process, which prints its stack and exits at the time limit. Heavy
imports are in the function bodies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import disttrain
from disttrain import slurm_env
from disttrain.doctor import gpu_checks, rules
from disttrain.doctor.rules import Finding, failure, ok, warning
from disttrain.errors import DisttrainError, reason
from disttrain.monitor.nvml import visible_gpus
from disttrain.parallel import usable_cores
from disttrain.userdirs import cache_folder


class Check(NamedTuple):
    """A check and how it is run.

    Attributes:
        run: yields the findings.
        limit_s: time limit in seconds; importing torch from a network disk can take a minute.
        arguments: returns the arguments to run it with, for the usable GPUs (cuda:0, ...); one process each.
    """

    run: Callable[[str], Iterator[Finding]]
    limit_s: float = 30.0
    arguments: Callable[[Sequence[str]], list[str]] = lambda gpus: [""]


def packages(_: str) -> Iterator[Finding]:
    """Checks that the packages that training needs are installed in compatible versions."""
    import torch
    import torchvision  # fails to import with a torch that it was not built for
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    yield ok("disttrain", f"{disttrain.__version__}, Python {platform.python_version()}, {sys.prefix}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield ok("torch", f"{torch.__version__}, {cuda}, torchvision {torchvision.__version__}")
    versions: dict[str, str] = {}
    for one in importlib.metadata.distributions():  # the first with a name is the one that is imported
        versions.setdefault(canonicalize_name(one.name), one.version)
    requirements, todo, done = [], ["disttrain"], set[str]()
    while todo:  # the requirements of disttrain, their requirements, and so on
        name = todo.pop()
        if name in done or name not in versions:
            continue
        done.add(name)
        for text in importlib.metadata.requires(name) or []:
            if "extra ==" not in text:
                requirements.append((name, text))
                todo.append(canonicalize_name(Requirement(text).name))
    problems = rules.unmet(requirements, versions)
    remedy = "run pip install --upgrade disttrain in a new environment"
    yield from (warning("requirement", problem, remedy) for problem in problems)
    if "disttrain" not in versions:
        text = "not checked: this source tree is not installed"
        yield warning("requirements", text, "run pip install -e . in the source tree")
    elif not problems:
        yield ok("requirements", f"{len(done)} packages are compatible")
    loaded = None
    with contextlib.suppress(RuntimeError, AttributeError):
        loaded = ".".join(map(str, torch.cuda.nccl.version()))
    nccls = {name: version for name, version in versions.items() if name.startswith("nvidia-nccl-cu")}
    yield rules.nccl(nccls, loaded, torch.version.cuda)


def machine(_: str) -> Iterator[Finding]:
    """Checks cores, memory, shared memory and limits."""
    import psutil

    yield rules.cores(usable_cores(), os.cpu_count() or 1, slurm_env.allocation(os.environ))
    memory = psutil.virtual_memory()
    yield ok("memory", f"{memory.available / 2**30:,.1f} of {memory.total / 2**30:,.1f} GiB available")
    shm = Path("/dev/shm")
    yield rules.shared_memory(shutil.disk_usage(shm).total if shm.exists() else None, len(visible_gpus()))
    yield rules.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield rules.locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], infiniband)


def disk(_: str) -> Iterator[Finding]:
    """Checks the free space for runs, caches and data sets."""
    from disttrain.shards.index import data_root, server_root

    folders = {"disk of runs": Path.cwd(), "disk of the cache": cache_folder()}
    if server_root(None) is None:
        folders["disk of data"] = data_root(None)
    for subject, folder in folders.items():
        state = os.statvfs(_existing(folder))
        free_files = state.f_favail if state.f_files else None
        yield rules.disk(subject, str(folder), state.f_bavail * state.f_frsize, free_files)


def clock(_: str) -> Iterator[Finding]:
    """Checks that the clocks run, and agree with the file system."""
    monotonic, wall = time.monotonic(), time.time()
    time.sleep(0.1)
    elapsed = (time.monotonic() - monotonic, time.time() - wall)
    newest = max(path.stat().st_mtime for path in Path(disttrain.__file__).parent.rglob("*.py"))
    now = file_time = time.time()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=".") as file:
        file.write(b"now")
        file.flush()
        file_time = os.fstat(file.fileno()).st_mtime
        now = time.time()
    yield rules.clock(elapsed, now, newest, file_time)


def network(_: str) -> Iterator[Finding]:
    """Checks the network interfaces that connect the processes of several nodes."""
    import psutil

    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    every = psutil.net_if_addrs()
    addresses = {
        name: [one.address for one in every.get(name, []) if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name in up
    }
    host, job = socket.gethostname(), slurm_env.allocation(os.environ)
    setting = os.environ.get("GLOO_SOCKET_IFNAME")
    yield rules.gloo_network(addresses, setting, host, _own_address(host), job.nodes if job else 1)
    yield rules.nccl_network([name for name in up if addresses[name]], os.environ.get("NCCL_SOCKET_IFNAME"))
    yield from rules.torch_debugging(os.environ.get("TORCH_DISTRIBUTED_DEBUG", ""))


def _own_address(host: str) -> str | None:
    """Returns the first address that a host name resolves to and that belongs to this host, like gloo."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return str(address[0])
    return None


def slurm_(_: str) -> Iterator[Finding]:
    """Checks Slurm and the job of this process."""
    there = shutil.which("srun") is not None
    says = [_output(*words) if there else None for words in (("srun", "--version"), ("scontrol", "ping"))]
    yield rules.cluster(slurm_env.allocation(os.environ), *says)


def _output(*command: str) -> str:
    """Returns the output of a command within ten seconds, on one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join((done.stdout or done.stderr).split())


def data(_: str) -> Iterator[Finding]:
    """Checks the data root with its data sets, and the cache."""
    from disttrain.shards.index import data_root, load_index, server_root

    server = server_root(None)
    if server is not None:
        yield ok("data root", f"{server}, on a server and not checked")
    else:
        root = data_root(None)
        yield _folder("data root", root, "set DISTTRAIN_DATA to a writable folder", needed=False)
        names = sorted(path.parent.name for path in root.glob("*/index.json"))
        for name in names:
            try:
                splits = load_index(name, None).splits.items()
            except DisttrainError as error:
                remedy = f"`disttrain data verify {name}` lists all problems"
                yield warning(f"data set {name}", reason(error), remedy)
            else:
                yield ok(f"data set {name}", ", ".join(f"{split.samples:,} {part}" for part, split in splits))
        if not names:
            yield ok("data sets", "none yet; `disttrain data prepare digits|mnist|cifar10` makes one")
    yield _folder("cache", cache_folder(), "set DISTTRAIN_CACHE to a writable folder", needed=True)


def _folder(subject: str, folder: Path, remedy: str, *, needed: bool) -> Finding:
    """Judges whether a folder is writable or can be created; if not `needed`, it may be read-only."""
    place = _existing(folder)
    new = "" if place == folder else " (will be created)"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"disttrain")
            file.flush()
    except OSError as error:
        found = f"{folder}{new}: cannot be written: {reason(error)}"
        if needed or new:
            return (failure if needed else warning)(subject, found, remedy)
        return ok(subject, f"{found}; data sets can be read, but not made")
    return ok(subject, f"{folder}{new}")


def _existing(folder: Path) -> Path:
    """Returns a folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def allreduce(backend: str) -> Iterator[Finding]:
    """Checks an all-reduce between two processes, started like those of a run."""
    from disttrain.launch.jobs import plan_job, run_job

    plan = plan_job(gpus=2, procs=None) if backend == "nccl" else plan_job(gpus=None, procs=2)
    found = run_job(plan, "disttrain.doctor.allreduce", {"backend": backend})
    speed = (
        f"{1e6 * found['latency_s']:,.0f} us for one number, {found['bytes_per_s'] / 1e9:.2f} GB/s when large"
    )
    yield ok(f"all-reduce, {backend}", f"2 processes: {speed}")


def step(device_name: str) -> Iterator[Finding]:
    """Checks a training step on a device in fp32 and bf16 against the same step in float64 on the CPU."""
    import copy

    import torch
    import torch.nn.functional as F

    from disttrain.models import build_model
    from disttrain.training.autotune import allow_tf32

    torch.set_num_threads(1)  # with several, the time would depend on what else runs here
    torch.manual_seed(0)
    allow_tf32(False)
    model = build_model("cnn_mnist", num_classes=10, in_channels=1, image_size=(28, 28), args={})
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))

    def train(device: torch.device, dtype: torch.dtype, steps: int) -> tuple[list[float], float]:
        """Returns the losses of the first two steps, and the median seconds of all but the first."""
        low = dtype == torch.bfloat16
        kept = torch.float32 if low else dtype
        own = copy.deepcopy(model).to(device, kept)
        inputs, targets = images.to(device, kept), labels.to(device)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        found, times = [], []
        for _ in range(steps):
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                scores = own(inputs)
            loss = F.cross_entropy(scores if dtype == torch.float64 else scores.float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())  # waits for the device
            times.append(time.perf_counter() - begin)
        return found[:2], statistics.median(times[1:])

    expected, _ = train(torch.device("cpu"), torch.float64, 2)
    device = torch.device(device_name)
    for name, dtype, tolerance in (("fp32", torch.float32, 1e-3), ("bf16", torch.bfloat16, 3e-2)):
        if name == "bf16" and device.type == "cuda":
            torch.cuda.set_device(device)
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                yield ok(f"{device_name} bf16", "not supported by this GPU; train.precision=auto means fp16")
                continue
        found, seconds = train(device, dtype, 6)
        yield rules.losses(f"{device_name} {name}", found, expected, tolerance, 1e3 * seconds)


CHECKS = {
    "packages": Check(packages, 120),
    "driver": Check(gpu_checks.driver),
    "gpus": Check(gpu_checks.gpus, 120),
    "machine": Check(machine),
    "disk": Check(disk),
    "clock": Check(clock),
    "network": Check(network),
    "slurm": Check(slurm_, 30),
    "data": Check(data),
    "allreduce": Check(allreduce, 120, lambda gpus: ["gloo", "nccl"] if len(gpus) > 1 else ["gloo"]),
    "step": Check(step, 120, lambda gpus: ["cpu", *gpus]),
}


def main() -> None:
    """Runs the check named on the command line."""
    name, argument = (*sys.argv[1:], "")[:2]
    check = CHECKS[name]
    faulthandler.enable()
    faulthandler.dump_traceback_later(check.limit_s, exit=True)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries apart from the findings
    for finding in check.run(argument):
        print(json.dumps(finding._asdict()), file=out)
    out.close()


if __name__ == "__main__":
    main()
