"""The numbers of a record, each with its name in trackers and Prometheus.

    train/<key>, eval/<key>         each number of a record of metrics.jsonl: train/loss, eval/accuracy
    gpu/<host>/<index>/<key>        gpu/node1/0/utilization_pct; a MIG instance has its UUID for an index
    process/<host>/<rank>/<key>     process/node1/3/cpu_pct, on CPUs

A section within a record adds its name: train/phases_ms/data. For Prometheus the same numbers are called
disttrain_train_loss or disttrain_gpu_utilization_pct, with host, index and rank as labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from disttrain.config import flatten
from disttrain.runs.records import EvalRecord, TrainRecord


class MetricValue(NamedTuple):
    """One number of a record.

    Attributes:
        group: train, eval, gpu or process.
        place: host and index or rank of what was measured; empty for the run as a whole.
        field: the key, with those of the sections around it.
        value: finite.
    """

    group: str
    place: dict[str, str]
    field: str
    value: float

    @property
    def name(self) -> str:
        """The name in trackers, such as gpu/node1/0/power_w."""
        return "/".join([self.group, *self.place.values(), self.field])


def samples(record: TrainRecord | EvalRecord) -> Iterator[MetricValue]:
    """Yields every known number of a record."""
    document = msgspec.to_builtins(record)
    kind = document.pop("kind")
    for row in document.pop("gpus", ()):
        place = {"host": row.pop("host"), "index": str(row.pop("index"))}
        if place["index"] == "None" or row["uuid"].startswith("MIG-"):
            place["index"] = row["uuid"]
        yield from _numbers("gpu", place, row)
    for row in document.pop("processes", ()):
        yield from _numbers("process", {"host": row.pop("host"), "rank": str(row.pop("rank"))}, row)
    yield from _numbers(kind, {}, document)


def _numbers(group: str, place: dict[str, str], tree: Mapping[str, Any]) -> Iterator[MetricValue]:
    for key, value in flatten(tree).items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield MetricValue(group, place, key.replace(".", "/"), value)
