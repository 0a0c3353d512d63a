"""How malloc reuses memory between training steps."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next step.

    By default glibc returns large blocks and the top of its heap to the system. Every step then gets new
    pages for its activations, which the kernel has to zero. With this, the process never shrinks. Does
    nothing if the C library has no `mallopt`.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
