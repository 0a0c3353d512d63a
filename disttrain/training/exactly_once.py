"""Checks that the ranks together saw every sample exactly once, in training and in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.data.epoch_plan import Ids, digest
from disttrain.errors import DataError
from disttrain.heartbeat import Phase
from disttrain.training.collectives import reduce_record
from disttrain.training.state import TrainState


@dataclass
class Seen:
    """The digest of the samples seen, as numbers that can be summed over ranks; exact in float64.

    Attributes:
        samples: number of samples.
        digest_low: the lower 32 bits of the sum of their hashes; see `digest`.
        digest_high: the upper 32 bits.
    """

    samples: float
    digest_low: float
    digest_high: float

    def check(self, expected: Ids, who: str) -> None:
        """Compares the sums over all ranks with the expected ids, in any order.

        Raises:
            DataError: a sample was left out, repeated or replaced. Its message starts with `who`.
        """
        found = int(self.samples), (int(self.digest_low) + (int(self.digest_high) << 32)) % 2**64
        if found != digest(expected):
            raise DataError(
                f"{who} {found[0]:,} samples instead of {len(expected):,}, or not the expected ones; "
                "internal error, please report it"
            )


def seen_by_rank(ids: Sequence[Ids]) -> Seen:
    """Returns the digest of the samples that this rank has seen, from the ids of its batches."""
    count, total = digest(np.concatenate(ids) if ids else np.empty(0, np.int64))
    return Seen(count, total & 0xFFFFFFFF, total >> 32)


def check_exactly_once(state: TrainState, step: int, seen: Sequence[Ids], expected: Ids) -> None:
    """Checks that all ranks together trained on exactly the expected samples. Every rank calls this.

    Raises:
        DataError: a sample was left out, repeated or replaced.
    """
    total = reduce_record(state.group, Phase.REPORT, step, seen_by_rank(seen))
    total.check(expected, "the ranks trained on")
