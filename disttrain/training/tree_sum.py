"""Sums over virtual ranks in one fixed order, for any number of ranks.

Floating-point addition is not associative, so the order is part of the result. It is a binary tree over the
virtual ranks of a step: a node is the sum of its two halves, down to the single virtual rank. A rank adds up
the nodes whose virtual ranks are all its own. The ranks exchange only these sums: each receives one part of
all of them, finishes the tree for that part, and sends the result to the others. Collectives only move bytes
here; every addition is done in the order of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.data.epoch_plan import rank_slice
from disttrain.training.collectives import Group


class Node(NamedTuple):
    """A node of the tree: the sum over the virtual ranks begin..end-1."""

    begin: int
    end: int

    @property
    def halves(self) -> tuple[Node, Node]:
        """The two nodes that it is the sum of; only if it has more than one virtual rank."""
        middle = (self.begin + self.end) // 2
        return Node(self.begin, middle), Node(middle, self.end)


def own_nodes(node: Node, own: range) -> list[Node]:
    """Returns the largest nodes below `node` that have only virtual ranks of `own`, in order."""
    if node.end <= own.start or node.begin >= own.stop:
        return []
    if own.start <= node.begin and node.end <= own.stop:
        return [node]
    left, right = node.halves
    return own_nodes(left, own) + own_nodes(right, own)


def own_sums(count: int, own: range, values_of: Callable[[int], list[Tensor]]) -> dict[Node, list[Tensor]]:
    """Returns the sum of each node of `own_nodes`.

    Args:
        count: virtual ranks of the step, over all ranks.
        own: the virtual ranks of this rank.
        values_of: returns the tensors of a virtual rank, which are overwritten. It is called once for each of
            `own`, in order.
    """
    return {node: _add_up(node, values_of) for node in own_nodes(Node(0, count), own)}


def _add_up(node: Node, values_of: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """Returns the sum of a node. At any time, at most one sum of each level of the tree is in memory."""
    if node.end - node.begin == 1:
        return values_of(node.begin)
    left, right = node.halves
    totals = _add_up(left, values_of)
    values = _add_up(right, values_of)
    types = dict.fromkeys(total.dtype for total in totals)
    for dtype in types:  # one call adds many tensors of one type
        chosen = [i for i, total in enumerate(totals) if total.dtype == dtype]
        torch._foreach_add_([totals[i] for i in chosen], [values[i] for i in chosen])
    return totals


def reduce_tree(
    group: Group, count: int, sums: Mapping[Node, list[Tensor]], like: Sequence[Tensor]
) -> list[Tensor]:
    """Returns the sum over all virtual ranks of a step, the same bits on every rank. Every rank calls this.

    Args:
        group: the ranks.
        count: virtual ranks of the step.
        sums: `own_sums` of this rank; they are overwritten.
        like: tensors with the shapes, types and memory orders of the sums.
    """
    root = Node(0, count)
    if group.world_size == 1:
        return sums[root]
    nodes = [
        own_nodes(root, rank_slice(range(count), rank, group.world_size)) for rank in range(group.world_size)
    ]
    totals = [torch.empty_like(each) for each in like]
    for dtype in dict.fromkeys(each.dtype for each in like):
        chosen = [i for i, each in enumerate(like) if each.dtype == dtype]
        length = sum(like[i].numel() for i in chosen)
        flat = [torch.cat([sums[node][i].reshape(-1) for i in chosen]) for node in nodes[group.rank]]
        total = _exchange(group, nodes, flat, root, torch.empty(0, dtype=dtype, device=group.device), length)
        pieces = total.split([like[i].numel() for i in chosen])
        for i, piece in zip(chosen, pieces, strict=True):
            totals[i].copy_(piece.view(like[i].shape))
    return totals


def _exchange(
    group: Group, nodes: list[list[Node]], own: list[Tensor], root: Node, empty: Tensor, length: int
) -> Tensor:
    """Returns the flat sum over all nodes, from this rank's flat sums, each of `length` elements."""
    world = group.world_size
    part = -(-length // world)
    sent = empty.new_zeros(world, len(own), part)
    for place, flat in enumerate(own):
        for rank, piece in enumerate(flat.split(part)):
            sent[rank, place, : len(piece)] = piece
    counts = [len(found) * part for found in nodes]
    received = empty.new_empty(sum(counts))
    dist.all_to_all_single(received, sent.view(-1), counts, [len(own) * part] * world)
    by_node = dict(zip([node for found in nodes for node in found], received.view(-1, part), strict=True))
    result = empty.new_empty(world * part)
    dist.all_gather_into_tensor(result, _total(root, by_node))
    return result[:length]


def _total(node: Node, sums: Mapping[Node, Tensor]) -> Tensor:
    """Returns the sum of a node; overwrites those below it."""
    if node in sums:
        return sums[node]
    left, right = node.halves
    return _total(left, sums).add_(_total(right, sums))
