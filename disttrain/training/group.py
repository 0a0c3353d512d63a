"""The process group: joining it, waiting for all ranks, and the errors of both."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Literal

from disttrain.config import Config
from disttrain.errors import BusyError, HangError, TrainingError, UsageError
from disttrain.host_memory import keep_freed_memory
from disttrain.parallel import cores_of_a_rank
from disttrain.training.network import prepare_gloo

if TYPE_CHECKING:
    from accelerate import PartialState


log = logging.getLogger("disttrain")

_LONG_WORK_S = 3600.0  # longest time that ranks wait for another to decode a data set
_FAILED = "disttrain/failed"  # key in the group's store


def collective_timeout_s(config: Config) -> float:
    """Returns the seconds that a rank waits in a collective; the launcher detects a stall before that."""
    return config.monitor.stall_timeout_s + 30


def timed_out(error: Exception) -> bool:
    """Returns whether a collective failed with a timeout."""
    return re.search(r"time(d )?out", str(error), re.IGNORECASE) is not None


def wait_for_all(what: str) -> None:
    """Waits until every rank calls this, an hour at most. Every rank calls this, once for each `what`.

    For long work that only some nodes have to do, such as decoding. A collective would time out after
    `collective_timeout_s`; the launcher finds a rank that stalls before this does.

    Raises:
        HangError: a rank did not arrive.
        TrainingError: a rank failed.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    store, world_size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    store.add(f"disttrain/{what}", 1)
    pause_s, deadline = 0.001, time.monotonic() + _LONG_WORK_S
    while (came := store.add(f"disttrain/{what}", 0)) < world_size:
        if store.add(_FAILED, 0):
            raise TrainingError(f"another rank failed while this one waited for it ({what})")
        if time.monotonic() > deadline:
            raise HangError(
                f"only {came} of {world_size} ranks arrived within an hour ({what}); "
                "check the logs of the others"
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 1.0)


def signal_failure() -> None:
    """Tells the ranks in `wait_for_all` that this rank failed."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # rank 0, which hosts the store, may have ended
            dist.distributed_c10d._get_default_store().add(_FAILED, 1)


def out_of_memory(error: Exception) -> str | None:
    """Returns torch's description of an out-of-memory error, or None for any other error."""
    import torch

    line = str(error).partition("\n")[0]
    if any(words in line for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")):
        return line  # from pinned memory, or from a library that does not use torch's allocator
    if isinstance(error, torch.OutOfMemoryError):
        return ". ".join(line.split(". ")[1:3]) or line  # how much was requested, how much there is
    return line.partition("DefaultCPUAllocator: ")[2] or None


def best_device() -> Literal["cuda", "cpu"]:
    """Returns the kind of device that this process computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_PLUGINS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")


def check_plugins(environ: Mapping[str, str]) -> None:
    """Raises UsageError if Accelerate is told to train in another way than with DDP."""
    for name in (f"ACCELERATE_USE_{plugin}" for plugin in _PLUGINS):
        if environ.get(name, "false").lower() in {"true", "1"}:
            raise UsageError(
                f"{name}={environ[name]}: disttrain trains with DDP only; unset it or, if a config file of "
                "Accelerate sets it, use `accelerate launch --config_file` with a file from launch/"
            )


def lower_debug_level(environ: MutableMapping[str, str]) -> None:
    """Sets TORCH_DISTRIBUTED_DEBUG=DETAIL to INFO for several ranks, and rank 0 says so.

    With DETAIL, DDP's constructor ends with SIGSEGV (torch 2.14 with gloo, without any of our settings).
    """
    name = "TORCH_DISTRIBUTED_DEBUG"
    if environ.get(name, "").upper() != "DETAIL" or environ.get("WORLD_SIZE", "1") == "1":
        return
    import torch.distributed as dist

    environ[name] = "INFO"
    dist.set_debug_level(dist.DebugLevel.INFO)  # type: ignore[attr-defined]
    if environ.get("RANK", "0") == "0":
        print(f"{name}=DETAIL makes torch's DDP crash; continuing with {name}=INFO", flush=True)


def join(config: Config, device: Literal["cuda", "cpu"]) -> PartialState:
    """Joins the process group, and sets this process's threads and determinism. Every rank calls this.

    Raises:
        BusyError: the master port is in use.
        HangError: another rank did not join.
        UsageError: the group does not have WORLD_SIZE ranks, or Accelerate is set to train without DDP.
    """
    check_plugins(os.environ)
    lower_debug_level(os.environ)
    import torch
    from accelerate import PartialState

    # cuBLAS reads it at its first use; train.reproducible needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    torch.backends.cudnn.benchmark = not config.train.reproducible
    if torch.are_deterministic_algorithms_enabled() != config.train.reproducible:
        torch.use_deterministic_algorithms(config.train.reproducible)  # imports the compiler: a second
    # Filling all new memory with NaN takes 3 % of a small network's step; our code reads none of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores_of_a_rank()))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    timeout = datetime.timedelta(seconds=collective_timeout_s(config))
    if expected > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        interface = prepare_gloo(os.environ["MASTER_ADDR"])
        if interface is not None:
            log.info("gloo listens on %s, because other nodes cannot reach this node's hostname", interface)
    try:
        group = PartialState(cpu=device == "cpu", timeout=timeout)
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise BusyError(f"{address} is in use on {socket.gethostname()}; choose another port") from None
        if not timed_out(error):
            raise
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        who = f"{came[1]} of {expected} ranks joined; " if came else ""
        raise HangError(
            f"{who}rank {os.environ.get('RANK')} waited {timeout.total_seconds():g} s for the others at "
            f"{address}; find out why they did not start"
        ) from None
    if group.num_processes != expected:
        raise UsageError(
            f"WORLD_SIZE is {expected}, but the process group has {group.num_processes} processes; "
            "use `disttrain run`, torchrun, or accelerate launch with a file from launch/"
        )
    if group.device == torch.device("cuda"):  # for a single process, Accelerate does not set the index
        group.device = torch.device("cuda", torch.cuda.current_device())
    return group
