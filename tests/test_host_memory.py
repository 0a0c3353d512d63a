"""Memory that is freed and taken again, as the activations of each step are."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from disttrain.host_memory import keep_freed_memory

if {keep}:
    keep_freed_memory()

def step():
    return [torch.ones(2 * 2**20 + number) for number in range(4)]  # 8 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(8):  # until the heap has a place for each
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


def page_faults(*, keep: bool) -> int:
    command = [sys.executable, "-c", STEPS.format(keep=keep)]
    small_pages = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=small_pages)
    return int(run.stdout)


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_a_step_takes_the_memory_of_the_one_before():
    pages = 3 * 4 * 8 * 2**20 // 4096
    assert page_faults(keep=True) < pages / 50 < page_faults(keep=False)
