"""The content of a safetensors file in pieces, without copying large tensors.

A checkpoint competes with training for memory and its bandwidth. The library's `save` copies all tensors
before the first byte is written. Its `save_file` does not, but returns neither the bytes, which must be
hashed and compared, nor the error number of the disk. Files are read with the library.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

_ALIGNMENT = 8  # bytes, of the first tensor
_SMALL_BYTES = 2**16  # copying is faster than writing and comparing separately


def file_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Returns the bytes of a safetensors file, in pieces to be written in order.

    Args:
        tensors: by name, of any shape; on the CPU and contiguous. The large ones are not copied, and must
            not change before they are written.

    Raises:
        Exception: of the library, if it does not support a dtype.
    """
    # The widest first, so that each begins at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].itemsize, pair[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _dtype(tensor.dtype), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    found: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    for _, tensor in ordered:
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        if len(memory) <= _SMALL_BYTES:
            small.append(memory)
        else:
            found += [b"".join(small), memory]
            small = []
    return [*found, b"".join(small)]


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in a safetensors header."""
    header = save({"": torch.empty(0, dtype=dtype)})[8:]
    name: str = json.loads(header)[""]["dtype"]
    return name
