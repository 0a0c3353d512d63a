"""What CUDA's driver library says of GPUs: what NVML does not know, or where NVML cannot be used."""

from __future__ import annotations

import ctypes
import functools
import uuid
from typing import NamedTuple

from disttrain.units import MIB

_INTEGRATED = 18  # CU_DEVICE_ATTRIBUTE_INTEGRATED


class CudaGpu(NamedTuple):
    """A GPU that CUDA programs of this environment see.

    Attributes:
        uuid: with the prefix `GPU-`.
        name: product name.
        memory_total_mib: of an integrated GPU, the part of the system's memory that it may use.
        integrated: whether it shares the system's memory and has none of its own.
    """

    uuid: str
    name: str
    memory_total_mib: int
    integrated: bool


@functools.cache
def cuda_gpus() -> tuple[CudaGpu, ...]:
    """Returns the GPUs in CUDA's order; () without CUDA. Asked once in a process, and makes no context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return ()
        found = [_describe(cuda, index) for index in range(count.value)]
    except (OSError, AttributeError):  # no library, or one that lacks a function
        return ()
    return tuple(gpu for gpu in found if gpu is not None)


def _describe(cuda: ctypes.CDLL, index: int) -> CudaGpu | None:
    device, integrated, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name, identity = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetUuid_v2(ctypes.byref(identity), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(integrated), _INTEGRATED, device)
    )
    if failed:
        return None
    text = name.value.decode(errors="replace")
    return CudaGpu(
        f"GPU-{uuid.UUID(bytes=bytes(identity))}", text, total.value // MIB, bool(integrated.value)
    )


def is_integrated(gpu_uuid: str) -> bool:
    """Tells whether CUDA knows that a GPU, by its UUID with or without prefix, shares the system's memory."""
    return any(gpu.integrated and gpu.uuid.endswith(gpu_uuid) for gpu in cuda_gpus())
