"""Parallel work in threads (for calls that release the GIL) or processes, with results in order."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import TypeVar, cast

from disttrain import slurm_env
from disttrain.lifetime import end_with_parent

_POLL_S = 0.2

_T = TypeVar("_T")
_R = TypeVar("_R")


def usable_cores() -> int:
    """Returns the CPU cores that this process may use; in a Slurm job, at most those of its task."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, slurm_env.task_cores(os.environ) or cores)


def cores_of_a_rank() -> int:
    """Returns the CPU cores for this rank: an equal share of those that the ranks of its node share."""
    sharers = 1 if slurm_env.task_is_rank(os.environ) else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, usable_cores() // sharers)


def ordered_map(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    threads: int,
    ahead: int | None = None,
    chunk: int = 1,
) -> Generator[_R, None, None]:
    """Yields `function(item)` in the order of the items, computed ahead by threads.

    Args:
        function: work that releases the GIL, such as reading or decoding images.
        items: iterated in the caller's thread.
        threads: 0 computes each result in the caller's thread, when it is requested.
        ahead: chunks of results that may be finished or in progress; None means two per thread.
        chunk: items per task; more than one if an item takes only microseconds.
    """
    if chunk > 1:
        done = ordered_map(lambda part: list(map(function, part)), chunked(items, chunk), threads, ahead)
        with contextlib.closing(done):
            yield from itertools.chain.from_iterable(done)
        return
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


def chunked(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yields the items in lists of this size; the last list may be shorter."""
    source = iter(items)
    return iter(lambda: list(itertools.islice(source, size)), [])


class KilledError(Exception):
    """A worker process was killed."""


def in_processes(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    processes: int,
    watch: Callable[[], object] = lambda: None,
) -> list[_R]:
    """Returns `function(item)` for all items, in their order, computed by new worker processes.

    Each process has its own pipe, without a shared queue or lock, so nothing waits for a process that was
    killed. (A ProcessPoolExecutor may wait for ever if one of its processes is killed while another starts.)
    The processes end with this one, even if it is killed, and ignore Ctrl-C. None is left after an error.

    Args:
        function: is pickled, like its items and results.
        items: a process gets the next item when it has finished one.
        processes: how many to start, limited to the number of items.
        watch: called a few times a second while they work, and after the last result.

    Raises:
        KilledError: a process was killed.
        Exception: raised by `function`; its traceback is added as a note.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(enumerate(items))
    results: dict[int, _R] = {}
    with contextlib.ExitStack() as stack:
        busy: list[Connection] = []
        for _ in range(min(processes, len(items))):
            ours, theirs = context.Pipe()
            stack.enter_context(ours)
            process = context.Process(target=_serve, args=(theirs, os.getpid(), function), daemon=True)
            with _unless_killed(), theirs:
                process.start()
                stack.callback(process.join)
                stack.callback(process.terminate)  # in the middle of an item, after an error or Ctrl-C
                ours.send(waiting.popleft())
            busy.append(ours)
        while busy:
            for end in cast(list[Connection], wait(busy, timeout=_POLL_S)):
                with _unless_killed():
                    number, result, error = end.recv()
                    if waiting:
                        end.send(waiting.popleft())
                    else:
                        busy.remove(end)
                if error is not None:
                    raise error
                results[number] = result
            watch()
    return [results[number] for number in range(len(items))]


@contextlib.contextmanager
def _unless_killed() -> Iterator[None]:
    """Raises KilledError if the other end of a pipe is gone."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise KilledError from None


def _serve(parent: Connection, pid: int, function: Callable[[_T], object]) -> None:
    """Computes the items that the parent sends, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(pid)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, item = parent.recv()
            result, problem = None, None
            try:
                result = function(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                problem = error
            parent.send((number, result, problem))
