"""What a rank makes of the errors of torch."""

from __future__ import annotations

import pytest
import torch

from disttrain.training.group import out_of_memory, timed_out

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.25 "
    "GiB is free. Including non-PyTorch memory, this process has 138.55 GiB memory in use.\nSee documentation"
)


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            "Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.25 GiB is free",
        ),
        (torch.OutOfMemoryError("no memory"), "no memory"),
        (RuntimeError("CUDA error: out of memory\nsearch for"), "CUDA error: out of memory"),
        (
            RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: 8 bytes."),
            "can't allocate memory: 8 bytes.",
        ),
        (RuntimeError("the pump is dry"), None),
    ],
)
def test_the_lack_of_memory_is_told_from_other_errors(error: Exception, lacking: str | None) -> None:
    assert out_of_memory(error) == lacking


def test_a_wait_that_was_too_long_is_told_from_other_errors() -> None:
    assert timed_out(RuntimeError("[gloo] Timed out waiting 1000ms for recv operation"))
    assert timed_out(RuntimeError("wait timeout after 5000ms"))
    assert not timed_out(RuntimeError("Connection reset by peer"))
