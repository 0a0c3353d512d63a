"""All-reduce between two processes of one machine: whether they connect, and how fast they are."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from disttrain.launch.jobs import serve

if TYPE_CHECKING:
    import torch

LIMIT_S = 60.0  # for the processes to connect, and for each message between them


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the seconds of an all-reduce of one number, and the bytes per second of a large one."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, device = request["backend"], torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=LIMIT_S))
    size = 2**26 if backend == "nccl" else 2**22  # numbers of 4 bytes
    return {
        "latency_s": reduction_s(torch.ones(1, device=device), 100),
        "bytes_per_s": 4 * size / reduction_s(torch.ones(size, device=device), 8),
    }


def reduction_s(ones: torch.Tensor, times: int) -> float:
    """Returns the median seconds of an all-reduce of a tensor of ones. Every rank calls this.

    Raises:
        RuntimeError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    seconds, right = [], sum(range(1, dist.get_world_size() + 1))
    for _ in range(times):
        numbers = ones * (dist.get_rank() + 1)
        if ones.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        if ones.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if not bool((numbers == right).all()):
            found = numbers.flatten()[0].item()
            raise RuntimeError(f"wrong sum of 1 to {dist.get_world_size()}: {found}")
    return statistics.median(seconds)


if __name__ == "__main__":
    serve(answer)
