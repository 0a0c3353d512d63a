"""What training in the process of the test needs."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def clean_process() -> Iterator[None]:
    """One thread, and no state of Accelerate that another test would meet."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
