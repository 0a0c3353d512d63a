"""Processes that end with their parent and leave no orphans, and signals that ask for an end. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def stop_signals() -> set[signal.Signals]:
    """Returns the signals that ask a run to save and stop.

    SIGHUP, which comes when the terminal closes, is one of them unless it is ignored, as under nohup.
    """
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}
    return stops if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else stops | {signal.SIGHUP}


@contextlib.contextmanager
def received_stops() -> Iterator[list[int]]:
    """Yields the list of the signals received that ask to stop: the first means save, the second end."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if number != signal.SIGHUP or not received:  # the shell and the kernel both send it
            received.append(number)

    previous = {number: signal.signal(number, receive) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent ends.

    Args:
        parent: pid of the process that started this one; if it has ended already, this one exits at once.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of orphaned descendants, so that it can end and reap them."""
    before = ctypes.c_int()
    _LIBC.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, before.value)
