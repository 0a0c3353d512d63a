"""Two processes of this machine that reduce tensors: whether they find one another, and how fast they are.

The first is the one that asks; it starts the second, which runs this module.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LIMIT_S = 60  # until the processes have found one another, and for each reduction


def measure_as_first(backend: str) -> tuple[float, float]:
    """Starts the second process and measures with it.

    Args:
        backend: gloo or nccl; nccl needs two GPUs.

    Returns:
        Seconds that a reduction of one number takes, and bytes per second of a large one.

    Raises:
        RuntimeError: the processes do not find one another, or the sum is wrong.
    """
    # Before the import of torch, which both then do at the same time.
    command = [sys.executable, "-m", "disttrain.doctor.allreduce", backend]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as second:
        try:
            import torch.distributed as dist

            timeout = datetime.timedelta(seconds=_LIMIT_S)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, 2, is_master=True, timeout=timeout, wait_for_workers=False
            )
            assert second.stdin is not None
            print(store.port, file=second.stdin, flush=True)
            return measure(backend, 0, store)
        finally:
            second.kill()


def measure(backend: str, rank: int, store: Any) -> tuple[float, float]:
    """Reduces small and large tensors. Both processes call this; returns and errors as above."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=_LIMIT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timeout)
    try:
        small = _reduce(torch.ones(1, device=device), 100, rank)
        size = 2**26 if backend == "nccl" else 2**22  # numbers of 4 bytes
        large = _reduce(torch.ones(size, device=device), 8, rank)
        return small, 4 * size / large
    finally:
        dist.destroy_process_group()


def _reduce(ones: torch.Tensor, times: int, rank: int) -> float:
    """Returns the median of the seconds of a reduction."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(times):
        numbers = ones * (rank + 1)
        if ones.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        if ones.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if not bool((numbers == 3).all()):
            raise RuntimeError(f"the sum of 1 and 2 over two processes is {numbers.flatten()[0].item()}")
    return statistics.median(seconds)


def main() -> None:
    """Takes part as the second process; reads the port of the first from standard input."""
    faulthandler.dump_traceback_later(3 * _LIMIT_S, exit=True)  # never outlives the first by long
    import torch.distributed as dist

    port = int(sys.stdin.readline())
    timeout = datetime.timedelta(seconds=_LIMIT_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, 2, is_master=False, timeout=timeout
    )
    measure(sys.argv[1], 1, store)
    os._exit(0)


if __name__ == "__main__":
    main()
