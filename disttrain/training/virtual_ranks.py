"""A step that gives the same bits on any number of ranks (`train.reproducible`).

The global batch is cut into parts, one for each virtual rank. Their number is part of the experiment and does
not depend on the number of ranks. A rank takes a contiguous share of the virtual ranks, one after the other.
Each virtual rank has its own batch-norm statistics, its own random numbers and its own gradient, as a rank of
its own would. Gradients, losses and batch-norm statistics are summed over all virtual ranks in a fixed order
(tree_sum.py), and then every rank takes the same optimizer step.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from disttrain import counter_rng
from disttrain.config import TrainConfig
from disttrain.data.batches import Batch
from disttrain.data.epoch_plan import Ids, rank_slice, virtual_ranks
from disttrain.heartbeat import Phase
from disttrain.training.collectives import fill, packed
from disttrain.training.microbatch import Inputs, MicroBatch, next_inputs
from disttrain.training.phases import Phases
from disttrain.training.rng import seed_all
from disttrain.training.state import TrainState
from disttrain.training.step import backward, end_step, forward, train_step, update
from disttrain.training.tree_sum import own_sums, reduce_tree

TakeStep = Callable[[TrainState, Iterator[tuple[MicroBatch, Batch]], int, int, Phases], Ids]
"""Takes one optimizer step; see `train_step`."""

_STEP = 25  # the stream of random numbers that seeds the virtual ranks of a step


def step_function(config: TrainConfig) -> TakeStep:
    """Returns the function that takes the steps of a run."""
    return reproducible_step if config.reproducible else train_step


def reproducible_step(
    state: TrainState,
    batches: Iterator[tuple[MicroBatch, Batch]],
    step: int,
    global_batch: int,
    phases: Phases,
) -> Ids:
    """Takes one optimizer step, with the same result on any number of ranks. Every rank calls this.

    For arguments and result see `train_step`; a micro-batch has the samples of several virtual ranks.
    """
    config, device = state.config, state.group.device
    count = virtual_ranks(global_batch, config.train)
    own = rank_slice(range(count), state.rank, state.world_size)
    buffers = sorted(state.model.buffers(), key=lambda buffer: str(buffer.dtype))  # `packed` is fast then
    before = [buffer.clone() for buffer in buffers]
    waiting: deque[Inputs] = deque()
    ids: list[Ids] = []

    def values_of(virtual_rank: int) -> list[Tensor]:
        """Returns the gradients of a virtual rank, and its statistics and loss as float64 [numbers]."""
        number = virtual_rank - own.start
        if not waiting:
            waiting.extend(next_inputs(state, batches, step, number, phases))
        micro, images, labels, partners, own_ids = waiting.popleft()
        phases.enter(Phase.COMPUTE, step, number)
        seed_all(counter_rng.derive(config.seed, _STEP, step, virtual_rank), device)
        if number and buffers:
            torch._foreach_copy_(buffers, before)
        loss, scores = forward(state, micro, images, labels, partners)
        backward(state, loss, 1 / global_batch)
        state.meter.note(loss, scores, labels)
        ids.append(own_ids)
        return [*_take_gradients(state), packed([*buffers, loss.detach()])]

    sums = own_sums(count, own, values_of)
    phases.enter(Phase.REDUCE, step)
    numbers = torch.empty(sum(b.numel() for b in buffers) + 1, dtype=torch.float64, device=device)
    *gradients, numbers = reduce_tree(state.group, count, sums, [*state.parameters, numbers])
    phases.enter(Phase.OPTIMIZE, step)
    for parameter, gradient in zip(state.parameters, gradients, strict=True):
        parameter.grad = gradient
    if buffers:
        fill(buffers, numbers[:-1] / count)  # in float64 the mean of equal numbers is exactly that number
    if state.rank == 0:  # the others add nothing: this is the sum over all ranks
        state.meter.add_loss(numbers[-1])
    update(state)
    return end_step(state, ids)


def weight_digests(state: TrainState) -> dict[str, str]:
    """Returns a digest of each tensor of the model; the same on every rank. Waits for the device."""
    return {
        name: hashlib.blake2b(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), digest_size=5
        ).hexdigest()
        for name, value in state.bare_model.state_dict().items()
    }


def machine_facts(device: torch.device) -> dict[str, str]:
    """Returns what the bits of a run depend on besides its experiment: versions and the kind of device."""
    facts = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        facts |= {"GPU": torch.cuda.get_device_name(device), "cuDNN": str(torch.backends.cudnn.version())}
    else:
        facts |= {"CPU": _cpu_model(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return facts


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()


def _take_gradients(state: TrainState) -> list[Tensor]:
    """Returns the gradients and removes them from the parameters; 0 where a parameter took no part."""
    found = ((parameter, parameter.grad) for parameter in state.parameters)
    gradients = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in found]
    state.drop_gradients()
    return gradients
