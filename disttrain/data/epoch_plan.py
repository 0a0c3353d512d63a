"""Which samples make up each batch: pure functions of the seed, the epoch and the index.

The order suits sequential reads of shards, and does not depend on the number of ranks. The shards are
concatenated in a random order. This sequence is cut into a fixed number of streams, and each stream is
shuffled within a window. The positions of the epoch go to the streams in turn. Within a global batch, the
samples are sorted by stream. A rank takes a contiguous part of each global batch, so it reads only a few
streams. The decoded copy and the shards give the same order.

With data.sampling = balanced, each class has the same number of places in an epoch. Its samples take turns:
each of them gets as many places as any other of the class, or one more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from disttrain import counter_rng
from disttrain.config import Config, TrainConfig
from disttrain.errors import UsageError
from disttrain.shards.index import Index

_ORDER = 1  # the stream of random numbers that orders an epoch
_DIGEST = 0x6F8E  # the key of the hashes in `digest`
_SHARDS, _CUT, _SHUFFLE = range(3)  # streams of random numbers within _ORDER
_TURNS = 31  # the stream of random numbers that orders the samples of a class

Ids = npt.NDArray[np.int64]
"""Positions of samples in their split, counted through its shards in the order of the index."""


@dataclass(frozen=True)
class Plan:
    """The order of the samples in every epoch, for any number of ranks.

    Attributes:
        seed: the seed of the run.
        shards: number of samples in each shard of the split, in the order of the index.
        batch_size: the global batch.
        drop_remainder: whether to drop the samples that do not fill the last batch.
        streams: number of streams.
        shuffle_buffer: samples, over all streams, from which the next one is chosen.
        skipped: ids of bad samples, which every epoch leaves out.
        labels: of all samples of the split, int64 [samples]: an epoch has each class equally often. None: it
            has every sample once.
    """

    seed: int
    shards: tuple[int, ...]
    batch_size: int
    drop_remainder: bool = False
    streams: int = 16
    shuffle_buffer: int = 65536
    skipped: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    labels: Ids | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"train.batch_size = {self.batch_size} is more than the {self.samples} training samples, and "
                "data.remainder = drop leaves none; lower it or use data.remainder = keep"
            )

    @cached_property
    def samples(self) -> int:
        """Number of usable samples."""
        return sum(self.shards) - len(self.skipped)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples trained on in one epoch."""
        return min(self.samples, self.steps_per_epoch * self.batch_size)

    def order(self, epoch: int) -> Ids:
        """Returns the ids of this epoch in its order: int64 [samples]."""
        key = counter_rng.derive(self.seed, _ORDER, epoch)
        sequence = self._sequence(key, epoch)
        # Stream s has the positions s, s + streams, ... of the epoch, before batches are sorted by stream.
        lengths = (len(sequence) - np.arange(self.streams) + self.streams - 1) // self.streams
        starts = np.cumsum(lengths) - lengths
        self._shuffle(sequence, starts, lengths, key)
        # Sorted by stream within a batch, so that a rank's part has only a few streams.
        places = np.arange(len(sequence))
        dealt = np.argsort(places // self.batch_size * self.streams + places % self.streams, kind="stable")
        order: Ids = sequence[starts[dealt % self.streams] + dealt // self.streams]
        return order

    def _sequence(self, key: int, epoch: int) -> Ids:
        """Returns the ids of the epoch, shard after shard in a random order."""
        shards = np.split(np.arange(sum(self.shards)), np.cumsum(self.shards)[:-1])
        turns = counter_rng.permutation(counter_rng.derive(key, _SHARDS), len(shards))
        sequence = np.concatenate([shards[i] for i in turns])
        if len(self.skipped):
            sequence = sequence[~np.isin(sequence, self.skipped)]
        if self.labels is not None:
            sequence = np.repeat(sequence, self.times(epoch)[sequence])
        # Rotated, so that the streams are not cut at the same samples in every epoch.
        return np.roll(sequence, -(counter_rng.derive(key, _CUT) % len(sequence)))

    def _shuffle(self, sequence: Ids, starts: Ids, lengths: Ids, key: int) -> None:
        """Shuffles each stream in place, in full or within its share of the buffer if that is smaller."""
        draws = counter_rng.bits(counter_rng.derive(key, _SHUFFLE), len(sequence))
        fractions = (draws >> np.uint64(11)) * 2.0**-53
        window = max(1, self.shuffle_buffer // self.streams)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            stream = slice(start, start + length)
            ranks = fractions[stream]
            if length > window:
                ranks = ranks * window + np.arange(length)
            sequence[stream] = sequence[stream][np.argsort(ranks, kind="stable")]

    @property
    def ids(self) -> Ids:
        """The usable ids, in the order of the index: int64 [samples]."""
        return usable_ids(sum(self.shards), self.skipped)

    def ids_between(self, epoch: int, order: Ids, begin: int, end: int) -> Ids:
        """Returns the ids at positions begin..end-1 of an epoch; for all of it, in the index's order."""
        if end - begin < self.samples:
            return order[begin:end]
        return self.ids if self.labels is None else np.repeat(self.ids, self.times(epoch)[self.ids])

    def times(self, epoch: int) -> Ids:
        """Returns how often an epoch has each id of the split, with `labels`: int64 [usable and skipped].

        The classes take turns with the places that are left over, over all epochs, and so do the samples of a
        class.
        """
        ids, sizes = self._by_class
        begin, end = (self._places_before(number) for number in (epoch, epoch + 1))
        each, more = np.divmod(end - begin, sizes)
        turns = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
        waiting = (turns - np.repeat(begin, sizes)) % np.repeat(sizes, sizes)
        times = np.zeros(sum(self.shards), np.int64)
        times[ids] = np.repeat(each, sizes) + (waiting < np.repeat(more, sizes))
        return times

    def _places_before(self, epoch: int) -> Ids:
        """Returns how many places each class had in all earlier epochs: int64 [classes]."""
        classes = len(self._by_class[1])
        each, left_over = divmod(self.samples, classes)
        return epoch * each + (epoch * left_over - np.arange(classes) + classes - 1) // classes

    @cached_property
    def _by_class(self) -> tuple[Ids, Ids]:
        """The usable ids class by class, in the order of their turns, and the number of ids of each class."""
        assert self.labels is not None
        labels = self.labels[self.ids]
        turns = counter_rng.bits_at(counter_rng.derive(self.seed, _TURNS), self.ids.astype(np.uint64))
        sizes = np.bincount(labels)
        return self.ids[np.lexsort((turns, labels))], sizes[sizes > 0]

    def batch(self, step: int) -> range:
        """Returns the positions in the epoch's order of the global batch of a step of the epoch."""
        return range(step * self.batch_size, min((step + 1) * self.batch_size, self.samples))


def make_plan(config: Config, index: Index, skipped: Ids | None = None, labels: Ids | None = None) -> Plan:
    """Returns the plan of an experiment.

    Args:
        config: the experiment.
        index: its data set.
        skipped: ids of the train split to leave out.
        labels: of its samples, int64 [samples]; balanced sampling needs them, but for the sizes.

    Raises:
        UsageError: no samples are left for training.
    """
    return Plan(
        config.seed,
        tuple(shard.samples for shard in index.splits["train"].shards),
        config.train.batch_size,
        config.data.remainder == "drop",
        config.data.streams,
        config.data.shuffle_buffer,
        np.empty(0, np.int64) if skipped is None else skipped,
        labels,
    )


def usable_ids(samples: int, skipped: Ids) -> Ids:
    """Returns the ids 0..samples-1 without `skipped`: int64 [samples - skipped]."""
    usable = np.ones(samples, bool)
    usable[skipped] = False
    return np.flatnonzero(usable)


def digest(ids: Ids) -> tuple[int, int]:
    """Returns the number of ids and the sum of their hashes modulo 2**64.

    Neither depends on the order, and the results of disjoint parts add up. A missing, repeated or replaced
    sample changes the result, except with a probability of 2**-64.
    """
    hashes = counter_rng.bits_at(_DIGEST, ids.astype(np.uint64))
    return len(ids), int(hashes.sum(dtype=np.uint64))


def virtual_ranks(samples: int, config: TrainConfig) -> int:
    """Returns into how many parts train.reproducible cuts a global batch of so many samples.

    A smaller last batch has fewer parts, so that none has much less than the usual number of samples.
    """
    return -(-samples // (config.batch_size // config.virtual_ranks))


def rank_slice(places: range, rank: int, world_size: int) -> range:
    """Returns a rank's contiguous part of `places`; the first parts may be longer by one."""
    base, extra = divmod(len(places), world_size)
    begin = rank * base + min(rank, extra)
    return places[begin : begin + base + (rank < extra)]


def micro_batch_slices(places: range, rank: int, world_size: int, config: TrainConfig) -> list[range]:
    """Returns the micro-batches of a rank: its part of a global batch, in at most `accumulate` parts.

    A rank without a sample gets the first one of the batch, whose weight is zero. With train.reproducible,
    each virtual rank of this rank has a micro-batch, and there may be none.
    """
    if config.reproducible:
        number = virtual_ranks(len(places), config)
        return [rank_slice(places, i, number) for i in rank_slice(range(number), rank, world_size)]
    own = rank_slice(places, rank, world_size) or places[:1]
    number = min(config.accumulate, len(own))
    return [rank_slice(own, i, number) for i in range(number)]


def smallest_micro_batch(plan: Plan, world_size: int, config: TrainConfig) -> int:
    """Returns the samples of the smallest micro-batch that any rank gets in an epoch."""
    last = plan.batch(plan.steps_per_epoch - 1)  # no batch is smaller
    ranks = (micro_batch_slices(last, rank, world_size, config) for rank in range(world_size))
    return min(len(part) for parts in ranks for part in parts)
