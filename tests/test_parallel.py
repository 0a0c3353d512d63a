"""Work that is spread over threads or processes: results in order, errors, processes that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from disttrain.parallel import KilledError, in_processes, ordered_map


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_keep_the_order_and_raise(threads: int) -> None:
    for chunk in (1, 7, 2000):
        assert list(ordered_map(str, range(1000), threads, chunk=chunk)) == [str(i) for i in range(1000)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(inverse, [1, 0, 2], threads))


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_end_where_results_are_left(threads: int) -> None:
    taken: list[int] = []
    before = threading.active_count()

    def source() -> Iterator[int]:
        for i in range(10_000):
            taken.append(i)
            yield i

    results = ordered_map(str, source(), threads)
    assert next(results) == "0"
    results.close()
    assert len(taken) < 100
    assert threading.active_count() == before


def slower_first(last: int, number: int) -> tuple[int, int]:
    time.sleep(0.02 * (last - number))
    return number, os.getpid()


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_are_in_the_order_of_the_items(count: int) -> None:
    calls = []
    found = in_processes(partial(slower_first, count), range(count), 2, lambda: calls.append(1))
    assert [number for number, _ in found] == list(range(count))
    assert len({process for _, process in found}) == min(count, 2)
    assert os.getpid() not in {process for _, process in found}
    assert bool(calls) == (count > 0)


def inverse(number: int) -> float:
    return 1 / number


def test_an_error_tells_where_it_came_from() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        in_processes(inverse, [1, 2, 0, 3], 2)
    assert "in inverse" in caught.value.__notes__[0]


def die_at(victim: int, ballast: bytes, number: int) -> int:
    if number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


# With more bytes than the pipe to a new process holds, the second is still being started when the first dies.
@pytest.mark.parametrize(("victim", "ballast"), [(0, 2**20), (0, 0), (3, 0), (7, 0)])
def test_a_killed_process_is_told(victim: int, ballast: int) -> None:
    with pytest.raises(KilledError):
        in_processes(partial(die_at, victim, bytes(ballast)), range(8), 2)
