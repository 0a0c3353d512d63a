"""The proof that the ranks together trained on every sample exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain.data.plan import Ids, digest
from disttrain.errors import DataError
from disttrain.heartbeat import Phase
from disttrain.training.collectives import reduce_sum
from disttrain.training.parts import Parts


def check_exactly_once(parts: Parts, step: int, seen: Sequence[Ids], expected: Ids) -> None:
    """Checks that all ranks together trained on exactly the expected samples. Every rank calls this.

    Args:
        parts: what was trained with.
        step: optimizer steps taken.
        seen: ids that this rank trained on.
        expected: ids that all ranks should have trained on, in any order.

    Raises:
        DataError: a sample was left out, repeated or replaced.
    """
    count, total = digest(np.concatenate(seen) if seen else np.empty(0, np.int64))
    # In halves, whose sums are exact in float64.
    sums = reduce_sum(parts, Phase.REPORT, step, [count, total & 0xFFFFFFFF, total >> 32])
    found = (int(sums[0]), (int(sums[1]) + (int(sums[2]) << 32)) % 2**64)
    if found != digest(expected):
        raise DataError(
            f"the ranks trained on {found[0]:,} samples, the plan has {len(expected):,}, or not on the same "
            "ones: this must not be; please report it"
        )
