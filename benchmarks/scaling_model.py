"""Where data-parallel training stops scaling: a step's arithmetic and its all-reduce, as a pure model.

The global batch stays as it is, so more ranks compute less each while the gradients to be summed up stay the
same. How well the model holds is measured by benchmarks/scaling.py; docs/scaling.md has the results.
"""

from __future__ import annotations

from typing import NamedTuple


class Link(NamedTuple):
    """The link between neighbours of a ring.

    Attributes:
        latency_s: of one message, software included.
        bytes_per_s: of one rank to its neighbour, while all ranks send.
        what: in words.
    """

    latency_s: float
    bytes_per_s: float
    what: str = ""


class Ranks(NamedTuple):
    """The ranks of a run and the links between them.

    Attributes:
        nodes: number of nodes.
        per_node: ranks on each.
        inside: the link between ranks of a node.
        between: the link between nodes, as much of it as one rank has.
    """

    nodes: int
    per_node: int
    inside: Link
    between: Link

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.per_node


class Step(NamedTuple):
    """The measured compute time of one rank per step.

    Attributes:
        fixed_s: whatever the batch: kernel launches, the optimizer.
        sample_s: of each sample of the rank.
    """

    fixed_s: float
    sample_s: float


NVLINK = Link(5e-6, 200e9, "NVLink, assumed")
INFINIBAND = Link(15e-6, 12e9, "100 Gbit/s for each GPU, assumed")

_BACKWARD = 2 / 3  # of a step's arithmetic: gradients of the inputs and of the weights, after the outputs


def all_reduce_s(size_bytes: float, ranks: Ranks) -> float:
    """Returns the time of one all-reduce: rings within the nodes, with a ring over the nodes between them.

    A ring of n passes the data on 2 (n - 1) times in pieces of 1/n (Patarasuk & Yuan 2009).

    Args:
        size_bytes: what each rank has.
        ranks: that take part.
    """

    def ring(size: float, members: int, link: Link) -> float:
        return 2 * (members - 1) * (link.latency_s + size / members / link.bytes_per_s)

    share = size_bytes / ranks.per_node
    return ring(size_bytes, ranks.per_node, ranks.inside) + ring(share, ranks.nodes, ranks.between)


def step_s(compute_s: float, gradient_bytes: float, bucket_bytes: float, ranks: Ranks) -> float:
    """Returns the time of a step whose buckets are reduced one after the other while later ones are computed.

    A single bucket is complete when all is computed: nothing overlaps.

    Args:
        compute_s: the step of one rank without communication.
        gradient_bytes: of all parameters that are trained.
        bucket_bytes: the size from which DDP sends a bucket.
        ranks: of the run.
    """
    if ranks.world_size == 1:
        return compute_s
    done, sent = 0.0, 0.0
    while sent < gradient_bytes:
        bucket = min(bucket_bytes, gradient_bytes - sent)
        sent += bucket
        ready = compute_s * (1 - _BACKWARD * (1 - sent / gradient_bytes))
        done = max(ready, done) + all_reduce_s(bucket, ranks)
    return done


def efficiency(step: Step, batch: int, gradient_bytes: float, bucket_bytes: float, ranks: Ranks) -> float:
    """Returns the speed-up over one rank divided by the number of ranks, 0..1.

    Args:
        step: what a rank computes.
        batch: the global batch.
        gradient_bytes: of all parameters that are trained.
        bucket_bytes: the size of DDP's buckets.
        ranks: of the run.
    """
    alone = step.fixed_s + step.sample_s * batch
    own = step.fixed_s + step.sample_s * batch / ranks.world_size
    return alone / (ranks.world_size * step_s(own, gradient_bytes, bucket_bytes, ranks))
