"""Balanced sampling: the labels that the plan of an epoch needs, and what it draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from disttrain.config import Config
from disttrain.data.epoch_plan import Ids, Plan, rank_slice, usable_ids
from disttrain.preflight import UNIFORM_REMEDY, expect_every_class
from disttrain.shards.index import Index
from disttrain.shards.label_format import Labels
from disttrain.shards.reader import open_shard, sample_error
from disttrain.training.collectives import Group, gather


def train_labels(
    config: Config, index: Index, skipped: Ids, decoded: Labels | None, group: Group
) -> Ids | None:
    """Returns the labels of the train split for balanced sampling, int64 [samples]. Every rank calls this.

    Each rank reads the labels of a part of the shards. Nodes may differ in whether they have a decoded copy.

    Args:
        config: the experiment; with uniform sampling, the labels are not needed and None is returned.
        index: its data set.
        skipped: ids of samples that are left out; their labels may be -1.
        decoded: the labels of this node's decoded copy, or None; then they are read from the shards.
        group: the ranks.

    Raises:
        UsageError: a class has no sample.
        DataError: a shard or a label is bad; the message names it.
    """
    if config.data.sampling == "uniform":
        return None
    first = index.first_ids("train").tolist()
    own = [
        _labels_of(index, number, skipped) if decoded is None else decoded[first[number] : first[number + 1]]
        for number in rank_slice(range(len(first) - 1), group.rank, group.world_size)
    ]
    labels = np.concatenate([part for parts in gather(group, own) for part in parts])
    used = labels[usable_ids(len(labels), skipped)]
    counts = np.bincount(used, minlength=len(index.classes)).tolist()
    expect_every_class(index, counts, "data.sampling = balanced", UNIFORM_REMEDY)
    return labels


def _labels_of(index: Index, number: int, skipped: Ids) -> Labels:
    """Returns the labels of a shard of the train split; -1 for samples that are left out."""
    begin, end = index.first_ids("train")[number : number + 2].tolist()
    left_out = np.isin(np.arange(begin, end), skipped)
    if left_out.all():  # maybe the shard cannot be read
        return np.full(end - begin, -1, np.int64)
    shard = open_shard(index, "train", number)
    labels = shard.contents.labels
    for position in np.flatnonzero((labels < 0) & ~left_out).tolist():
        problem = ValueError(shard.contents.problems.get(position, "its label is not known"))
        raise sample_error(index, shard.place, shard.contents.keys[position], problem)
    return labels


def say_sampling(plan: Plan, say: Callable[[str], None]) -> None:
    """Says what an epoch of balanced sampling draws."""
    if plan.labels is None:
        return
    times = plan.times(0)[plan.ids]
    drawn = np.bincount(plan.labels[plan.ids], weights=times).astype(np.int64)
    several, none = np.count_nonzero(times > 1), np.count_nonzero(times == 0)
    say(
        f"data.sampling = balanced: {drawn[drawn > 0].min():,} or more places for each class in an epoch; "
        f"{several:,} samples have several, at most {times.max():,}, and {none:,} none in the first epoch"
    )
