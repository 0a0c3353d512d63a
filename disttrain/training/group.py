"""How a rank joins the others."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from disttrain.config import Config
from disttrain.errors import BusyError, HangError, TrainingError, UsageError
from disttrain.host_memory import keep_freed_memory
from disttrain.parallel import cores_of_a_rank
from disttrain.training.network import prepare_gloo

if TYPE_CHECKING:
    from accelerate import PartialState


log = logging.getLogger("disttrain")

_LONG_WORK_S = 3600.0  # in which a rank may decode a data set while others wait
_FAILED = "disttrain/failed"  # in the store of the group


def collective_timeout_s(config: Config) -> float:
    """Returns the seconds for which a rank waits for others; a launcher that watches it is sooner."""
    return config.monitor.stall_timeout_s + 30


def timed_out(error: Exception) -> bool:
    """Tells whether a collective failed because it had waited for too long."""
    return re.search(r"time(d )?out", str(error), re.IGNORECASE) is not None


def wait_for_all(what: str) -> None:
    """Waits until every rank has come here, an hour at most. Every rank calls this, once for each `what`.

    For what one node may have to do while another has it already, such as decoding: a collective would give
    up after `collective_timeout_s`, and a launcher sees sooner whether one of the ranks hangs.

    Raises:
        HangError: a rank has not come.
        TrainingError: a rank has failed.
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
                f"{came} of {world_size} ranks have come within an hour ({what}); look for the others"
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 1.0)


def signal_failure() -> None:
    """Lets the ranks that wait in `wait_for_all` know that this one will not come."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # rank 0, which keeps the store, may have gone
            dist.distributed_c10d._get_default_store().add(_FAILED, 1)


def out_of_memory(error: Exception) -> str | None:
    """Returns what torch says of a tensor for which there was too little memory; None of any other error."""
    import torch

    line = str(error).partition("\n")[0]
    if any(words in line for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")):
        return line  # by pinned memory, or by a library beside torch's own memory
    if isinstance(error, torch.OutOfMemoryError):
        return ". ".join(line.split(". ")[1:3]) or line  # how much was tried, how much there is
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


def join(config: Config, device: Literal["cuda", "cpu"]) -> PartialState:
    """Joins the process group and sets what holds for all arithmetic of this process.

    Raises:
        BusyError: the port on which the ranks meet is taken.
        HangError: another rank has not come.
        UsageError: the group is smaller than promised, or Accelerate is set to train without DDP.
    """
    check_plugins(os.environ)
    import torch
    from accelerate import PartialState

    # Read at the first use of cuBLAS, where train.reproducible asks for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    torch.backends.cudnn.benchmark = not config.train.reproducible
    torch.use_deterministic_algorithms(config.train.reproducible)
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores_of_a_rank()))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    patience = datetime.timedelta(seconds=collective_timeout_s(config))
    if expected > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        interface = prepare_gloo(os.environ["MASTER_ADDR"])
        if interface is not None:
            log.info("gloo listens on %s, because the name of this host leads nowhere", interface)
    try:
        group = PartialState(cpu=device == "cpu", timeout=patience)
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise BusyError(f"{address} is taken on {socket.gethostname()}; choose another port") from None
        if not timed_out(error):
            raise
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        who = f"{came[1]} of {expected} ranks joined; " if came else ""
        raise HangError(
            f"{who}rank {os.environ.get('RANK')} waited {patience.total_seconds():g} s for the others at "
            f"{address}; look for the ranks that did not start"
        ) from None
    if group.num_processes != expected:
        raise UsageError(
            f"the launcher promised {expected} processes, the group has {group.num_processes}; "
            "use `disttrain run`, torchrun, or accelerate launch with a file from launch/"
        )
    if group.device == torch.device("cuda"):  # a single process: Accelerate leaves the number open
        group.device = torch.device("cuda", torch.cuda.current_device())
    return group
