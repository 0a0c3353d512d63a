"""What a rank makes of the errors of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttrain.training.group import out_of_memory, timed_out
from kit.commands import succeeded, torchrun

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


SLOW_RANK = """
import datetime, os, time
import torch
import torch.distributed as dist
from disttrain.training.group import wait_for_all

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
one = torch.ones(1)
dist.all_reduce(one)
time.sleep(5 * dist.get_rank())
wait_for_all("data")
dist.all_reduce(one)
assert one == 4
wait_for_all("more")
"""


@pytest.mark.integration
@pytest.mark.nightly
def test_ranks_wait_longer_for_work_than_a_collective_would(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_RANK)
    assert succeeded(torchrun(tmp_path / "slow.py"))


FAILING_RANK = """
import datetime
import torch.distributed as dist
from disttrain.errors import TrainingError
from disttrain.training.group import signal_failure, wait_for_all

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
if dist.get_rank():
    signal_failure()
else:
    try:
        wait_for_all("data")
    except TrainingError as error:
        print(error)
dist.barrier()
"""


@pytest.mark.integration
def test_ranks_do_not_wait_for_one_that_has_failed(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING_RANK)
    done = torchrun(tmp_path / "failing.py")
    assert succeeded(done)
    assert done.stdout == "another rank failed while this one waited for it (data)\n"
