"""Work that leaves Python, spread over threads, with its results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from disttrain.launch import slurm

_T = TypeVar("_T")
_R = TypeVar("_R")


def usable_cores() -> int:
    """Returns the cores that this process may use; of those of a Slurm job, its task's."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, slurm.task_cores(os.environ) or cores)


def cores_of_a_rank() -> int:
    """Returns the cores for this rank alone: its share of those of the processes started with it."""
    together = 1 if slurm.task_is_rank(os.environ) else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, usable_cores() // together)


def in_order(
    function: Callable[[_T], _R], items: Iterable[_T], threads: int, ahead: int | None = None
) -> Iterator[_R]:
    """Yields `function(item)` in the order of the items, computed ahead by threads.

    Args:
        function: work that leaves Python, such as reading or decoding images.
        items: taken in the caller's thread.
        threads: 0 computes in the caller's thread, when a result is asked for.
        ahead: results that may be ready or under way; None means two per thread.
    """
    if threads == 0:
        yield from map(function, items)
        return
    limit = 2 * threads if ahead is None else ahead
    pending: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="disttrain-data")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
