"""Tells whether two runs with train.reproducible are the same to the bit, and if not, where they part."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from msgspec import UNSET

from disttrain.runs.jsonl import parts
from disttrain.runs.records import METRICS, TrainRecord


class Comparison(NamedTuple):
    """Whether two runs have the same weights at all log points that both have, and where they part."""

    same: bool
    text: str


def weight_digests(metrics: Path) -> dict[int, dict[str, str]]:
    """Returns the digests of each tensor by step, from the log points of a metrics.jsonl that have them."""
    return {
        record.step: record.weights
        for part in parts(metrics, METRICS)
        for record in part.rows
        if isinstance(record, TrainRecord) and record.weights is not UNSET
    }


def compared(one: dict[int, dict[str, str]], other: dict[int, dict[str, str]]) -> Comparison | None:
    """Compares the digests of two runs by step; None if no log point has digests in both."""
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    same = 0
    for step in common:
        names = dict.fromkeys([*one[step], *other[step]])
        parted = [name for name in names if one[step].get(name) != other[step].get(name)]
        if parted:
            more = f" and {len(parted) - 1} more" if len(parted) > 1 else ""
            before = f"the same bits up to step {same:,}" if same else "other bits from the first log point"
            where = f"at step {step:,} {parted[0]}{more} of {len(names)} tensors differ"
            return Comparison(False, f"{before}; {where}")
        same = step
    text = f"the same bits at {len(common)} of {len(common)} log points, up to step {same:,}"
    return Comparison(True, text)
