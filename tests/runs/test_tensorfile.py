"""The pieces of a safetensors file: the library reads what was given."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from disttrain.runs.tensorfile import file_pieces

INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
REALS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def read(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return load(b"".join(file_pieces(tensors)))


@pytest.mark.parametrize("dtype", [*INTEGERS, *REALS, torch.complex64], ids=str)
def test_every_dtype_is_read_by_the_library(dtype: torch.dtype) -> None:
    bits = torch.arange(240, dtype=torch.uint8).remainder(2 if dtype is torch.bool else 251)
    tensor = bits.view(dtype).view(2, 3, -1)
    found = read({"weight": tensor})["weight"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.contiguous().view(-1).view(torch.uint8), bits)


def test_tensors_of_all_widths_and_shapes_side_by_side() -> None:
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "none": torch.zeros(0),
        "none wide": torch.zeros(3, 0, dtype=torch.float64),
        "number": torch.tensor(7.5, dtype=torch.float64),
        "half": torch.ones(5, dtype=torch.float16),
        'a "name"\n of é': torch.arange(6.0).view(1, 2, 3),
        "last": torch.arange(3),
    }
    found = read(tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    data = b"".join(file_pieces(tensors))
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, described in json.loads(data[8 : 8 + length]).items():
        assert described["data_offsets"][0] % tensors[name].itemsize == 0
    assert len(data) <= len(save(tensors)) + 64  # the order of the file is another


def test_no_tensor() -> None:
    assert read({}) == {}


def test_the_memory_of_large_tensors_is_not_copied() -> None:
    tensors = {"small": torch.zeros(4), "large": torch.zeros(2**15), "other": torch.ones(2**15)}
    before, memory, between, other, after = file_pieces(tensors)
    assert (len(memory), len(between), len(other), len(after)) == (2**17, 0, 2**17, 16)
    tensors["large"] += 1
    assert torch.equal(torch.frombuffer(memory, dtype=torch.float32), torch.ones(2**15))
    assert torch.equal(load(b"".join([before, memory, between, other, after]))["large"], torch.ones(2**15))
