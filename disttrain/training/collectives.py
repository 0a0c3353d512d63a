"""The collectives other than the gradient reduction. Every rank calls every function here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain import counter_rng
from disttrain.errors import TrainingError
from disttrain.heartbeat import Phase

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from accelerate import PartialState

Record = TypeVar("Record", bound="DataclassInstance")

_WIDTH = 64  # fewest numbers in a reduction, so that ranks which are out of step reduce equally many
_PLACE = 23  # the stream of hashes of (phase, step)


class Group(NamedTuple):
    """The process group, as one rank sees it.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of(cls, state: PartialState) -> Group:
        """Returns the group of Accelerate's state."""
        return cls(state.process_index, state.num_processes, state.device)


def reduce_sum(group: Group, phase: Phase, step: int, values: Sequence[float]) -> list[float]:
    """Sums numbers over the ranks in float64, and checks that all ranks are in the same phase and step.

    Waits for the device.

    Raises:
        TrainingError: a rank is in another phase or step, so the sums are meaningless.
    """
    if group.world_size == 1:
        return list(values)
    place = counter_rng.derive(_PLACE, phase, step) >> 24  # 40 bits: sums over 2**13 ranks are exact
    padding = [0.0] * (_WIDTH - 1 - len(values))
    totals = torch.tensor([place, *values, *padding], dtype=torch.float64, device=group.device)
    dist.all_reduce(totals)
    places, *sums = totals.tolist()
    if places != place * group.world_size:
        found = gather(group, (phase.name.lower(), step))
        where = ", ".join(f"rank {rank} {name} of step {at:,}" for rank, (name, at) in enumerate(found))
        raise TrainingError(f"the ranks are out of step: {where}; internal error, please report it")
    return sums[: len(values)]


def reduce_record(group: Group, phase: Phase, step: int, record: Record) -> Record:
    """Sums the numbers of a record over the ranks in one reduction; see `reduce_sum`.

    The record is a dataclass of numbers and lists of numbers. A list has the same length on every rank.
    """
    values = [getattr(record, field.name) for field in dataclasses.fields(record)]
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    sums = iter(reduce_sum(group, phase, step, flat))
    totals = [[next(sums) for _ in value] if isinstance(value, list) else next(sums) for value in values]
    return type(record)(*totals)


def stop_requested_anywhere(group: Group, phase: Phase, step: int, requested: bool) -> bool:
    """Returns whether any rank was asked to stop."""
    return reduce_sum(group, phase, step, [float(requested)])[0] > 0


def gather(group: Group, value: Any) -> list[Any]:
    """Returns the value of every rank, on every rank."""
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value)
    return values


def average_buffers(group: Group, model: nn.Module) -> None:
    """Averages the batch-norm statistics over the ranks; equal ones do not change."""
    if group.world_size == 1:
        return
    buffers = float_buffers(model)
    if buffers:
        # In float64, the mean of equal fp32 numbers is exactly that number for any world size.
        flat = packed(buffers)
        dist.all_reduce(flat)
        fill(buffers, flat / group.world_size)


def float_buffers(model: nn.Module) -> list[Tensor]:
    """Returns the floating-point buffers, such as batch-norm statistics."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the numbers of tensors, in order, as float64 [numbers]; at least one tensor.

    One operation joins all neighbours of one type.
    """
    groups = itertools.groupby((tensor.reshape(-1) for tensor in tensors), lambda flat: flat.dtype)
    joined = [torch.cat(list(group)).double() for _, group in groups]
    return torch.cat(joined) if len(joined) > 1 else joined[0]


def fill(buffers: Sequence[Tensor], flat: Tensor) -> None:
    """Copies the numbers of a flat tensor into buffers, in order."""
    pieces = flat.split([buffer.numel() for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        buffer.copy_(piece.view_as(buffer))
