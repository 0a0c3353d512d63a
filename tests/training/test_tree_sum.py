"""Sums over virtual ranks in one order, however they are spread over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from disttrain.data.epoch_plan import rank_slice
from disttrain.training.collectives import Group
from disttrain.training.tree_sum import Node, _total, own_nodes, own_sums, reduce_tree


def values_of(virtual_rank: int) -> list[Tensor]:
    """Returns tensors of two types whose sums depend on the order of the additions."""
    generator = torch.Generator().manual_seed(virtual_rank)
    scale = 10.0 ** (virtual_rank % 5)
    return [torch.randn(3, 2, generator=generator) * scale, torch.randn(5, generator=generator).double()]


def by_hand(node: Node) -> list[Tensor]:
    """Returns the sum of a node by its definition."""
    if node.end - node.begin == 1:
        return values_of(node.begin)
    left, right = (by_hand(half) for half in node.halves)
    return [a + b for a, b in zip(left, right, strict=True)]


@given(st.integers(1, 40), st.integers(1, 12))
def test_nodes_of_the_ranks_cover_each_virtual_rank_once(count: int, world_size: int) -> None:
    nodes = [
        node
        for rank in range(world_size)
        for node in own_nodes(Node(0, count), rank_slice(range(count), rank, world_size))
    ]
    assert [v for node in nodes for v in range(node.begin, node.end)] == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_the_sum_is_that_of_the_tree_for_any_number_of_ranks(count: int, world_size: int) -> None:
    sums = {}
    for rank in range(world_size):
        own = rank_slice(range(count), rank, world_size)
        found = own_sums(count, own, values_of)
        assert list(found) == own_nodes(Node(0, count), own)
        sums |= found
    for i, expected in enumerate(by_hand(Node(0, count))):
        parts = {node: values[i] for node, values in sums.items()}
        assert torch.equal(_total(Node(0, count), parts), expected)


def test_one_rank_needs_no_exchange() -> None:
    sums = own_sums(4, range(4), values_of)
    found = reduce_tree(Group(0, 1, torch.device("cpu")), 4, sums, values_of(0))
    assert all(map(torch.equal, found, by_hand(Node(0, 4))))
    assert not torch.equal(found[0], sum(values_of(v)[0] for v in range(4)))  # another order, other bits
