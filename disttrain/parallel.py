"""Work spread over threads, if it leaves Python, or over processes, with its results in order."""

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
    """Returns the cores that this process may use; of those of a Slurm job, its task's."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, slurm_env.task_cores(os.environ) or cores)


def cores_of_a_rank() -> int:
    """Returns the cores for this rank alone: its share of those of the processes started with it."""
    together = 1 if slurm_env.task_is_rank(os.environ) else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, usable_cores() // together)


def ordered_map(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    threads: int,
    ahead: int | None = None,
    chunk: int = 1,
) -> Generator[_R, None, None]:
    """Yields `function(item)` in the order of the items, computed ahead by threads.

    Args:
        function: work that leaves Python, such as reading or decoding images.
        items: taken in the caller's thread.
        threads: 0 computes in the caller's thread, when a result is asked for.
        ahead: chunks of results that may be ready or under way; None means two per thread.
        chunk: items of a task. One that takes some microseconds is not worth a task of its own.
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
    """Yields the items in lists of this size; the last one may be shorter."""
    source = iter(items)
    return iter(lambda: list(itertools.islice(source, size)), [])


class KilledError(Exception):
    """A process that worked for this one was killed."""


def in_processes(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    processes: int,
    watch: Callable[[], object] = lambda: None,
) -> list[_R]:
    """Returns `function(item)` of all items, in their order, computed by processes that are started for it.

    Each process has a pipe of its own, and they share no queue and no lock: one that is killed leaves nothing
    that another waits for. (A ProcessPoolExecutor may wait for ever if one of its processes is killed while
    another is being started.) They end with this one, also where it is killed, and it alone hears Ctrl-C.

    Args:
        function: is pickled, as its items and results are.
        items: each process is given the next one when it has done one.
        processes: at most as many as there are items are started.
        watch: called a few times a second while they work, and after the last result.

    Raises:
        KilledError: a process was killed.
        Exception: `function` raised it, the traceback is a note of it. No process is left after either.
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
    """Around what is said to a process or heard from it."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise KilledError from None


def _serve(parent: Connection, pid: int, function: Callable[[_T], object]) -> None:
    """Computes what the parent sends, until it ends."""
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
