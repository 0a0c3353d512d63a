"""Xids, the critical errors of GPUs: their meaning, and a watch for new ones."""

from __future__ import annotations

import ctypes
from typing import Any

from disttrain.monitor.nvml import ask

_AT_ONCE = 100  # a failing GPU can report thousands of errors a second
_XIDS = {  # those that a training run may see, after NVIDIA's catalogue of Xid errors
    13: "a kernel failed",
    31: "a program accessed memory outside its own",
    43: "a program's work stopped",
    45: "a program's work was cleaned up after an error",
    48: "uncorrectable memory error",
    63: "a row of memory is remapped at the next reset",
    64: "a row of memory cannot be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "error in the GPU's system processor",
}


def meaning(xid: int) -> str:
    """Returns the meaning of an Xid."""
    return _XIDS.get(xid, "a critical error")


def address_of(handle: Any) -> int:
    """Returns an address that identifies the GPU of a handle within a session."""
    return ctypes.addressof(handle.contents)


class XidWatch:
    """Collects critical errors of GPUs as they happen. NVML reports none for MIG instances.

    Args:
        nvml: pynvml, in a session.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._set: Any = None
        if hasattr(nvml.nvmlLib, "nvmlEventSetWait_v2"):
            self._set = ask(nvml.nvmlEventSetCreate)

    def add(self, handle: Any) -> bool:
        """Watches a GPU; returns whether it supports these events.

        Raises:
            pynvml.NVMLError: the query failed.
        """
        kind = self._nvml.nvmlEventTypeXidCriticalError
        if self._set is None or not self._nvml.nvmlDeviceGetSupportedEventTypes(handle) & kind:
            return False
        self._nvml.nvmlDeviceRegisterEvents(handle, kind, self._set)
        return True

    def close(self) -> None:
        """Ends the watch."""
        if self._set is not None:
            ask(self._nvml.nvmlEventSetFree, self._set)

    def take(self) -> dict[int, list[int]]:
        """Returns the Xids since the last call, by `address_of` the handle of the GPU."""
        found: dict[int, list[int]] = {}
        for _ in range(_AT_ONCE if self._set is not None else 0):
            event = ask(self._nvml.nvmlEventSetWait_v2, self._set, 0)
            if event is None:  # a time-out: nothing more
                break
            found.setdefault(address_of(event.device), []).append(int(event.eventData))
        return found
