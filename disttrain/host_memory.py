"""How this process keeps its memory between the steps of training."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Has malloc keep memory that is freed, for the next step to use.

    By default glibc gives large blocks, and the free end of its heap, back to the system: the activations of
    every step are then new pages, zeroed one by one. The process stays as large as it once was. Does nothing
    with a C library that has no `mallopt`.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
