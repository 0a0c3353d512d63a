"""The order of an epoch, the global batches and the shares of the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.config import TrainConfig
from disttrain.data.epoch_plan import (
    Plan,
    digest,
    micro_batch_slices,
    rank_slice,
    smallest_micro_batch,
    usable_ids,
)
from disttrain.errors import UsageError

WORLDS = [1, 2, 3, 4, 8]
SEVEN = (3, 701, 1, 250, 99, 13, 433)  # uneven shards
SIZES = {"prime": (997,), "smaller than the world": (2, 1), "seven": SEVEN, "10,000": (4000, 4000, 2000)}


def plan(shards: tuple[int, ...] = (1000,), batch_size: int = 64, **options: Any) -> Plan:
    return Plan(options.pop("seed", 0), shards, batch_size, **options)


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop", "steps", "trained", "last"),
    [
        (1000, 100, False, 10, 1000, 100),
        (1000, 100, True, 10, 1000, 100),
        (1001, 100, False, 11, 1001, 1),
        (1001, 100, True, 10, 1000, 100),
        (5, 8, False, 1, 5, 5),
        (8, 8, True, 1, 8, 8),
        (1, 1, True, 1, 1, 1),
    ],
)
def test_steps_of_an_epoch(
    samples: int, batch_size: int, drop: bool, steps: int, trained: int, last: int
) -> None:
    epoch = plan((samples,), batch_size, drop_remainder=drop)
    assert epoch.steps_per_epoch == steps
    assert epoch.samples_per_epoch == trained
    sizes = [len(epoch.batch(step)) for step in range(steps)]
    assert sizes == [batch_size] * (steps - 1) + [last]


def test_dropping_the_remainder_must_leave_a_batch() -> None:
    with pytest.raises(UsageError, match=r"batch_size = 8 is more than the 5 training samples.*keep"):
        plan((5,), batch_size=8, drop_remainder=True)


# --- Order ------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): plan(seed=seed).order(epoch).tolist() for seed in range(3) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 12
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(1000))
        assert plan(seed=seed, drop_remainder=True).order(epoch).tolist() == order


def test_the_order_does_not_change_between_versions() -> None:
    order = plan((10,), streams=4).order(0)
    assert order.tolist() == [0, 9, 8, 3, 1, 2, 5, 4, 6, 7]
    order = plan((3, 6, 1), 4, seed=1, streams=2, shuffle_buffer=4).order(3)
    assert order.tolist() == [5, 6, 1, 2, 7, 8, 9, 3, 0, 4]


@pytest.mark.integration
@settings(database=None, deadline=None)
@given(
    shards=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    batch_size=st.integers(1, 200),
    streams=st.integers(1, 40),
    shuffle_buffer=st.integers(1, 300),
    skipped=st.sets(st.integers(0, 60)),
    epoch=st.integers(0, 3),
)
def test_every_usable_sample_has_one_place(
    shards: list[int], batch_size: int, streams: int, shuffle_buffer: int, skipped: set[int], epoch: int
) -> None:
    left_out = np.array(sorted(i for i in skipped if i < sum(shards) - 1), np.int64)
    options = {"streams": streams, "shuffle_buffer": shuffle_buffer, "skipped": left_out}
    order = plan(tuple(shards), batch_size, **options).order(epoch)
    assert sorted(order.tolist()) == usable_ids(sum(shards), left_out).tolist()


@pytest.mark.parametrize("streams", [1, 5, 16])
def test_the_samples_seen_by_then_do_not_depend_on_the_batch_size(streams: int) -> None:
    orders = {size: plan(SEVEN, size, streams=streams).order(0).tolist() for size in (1, 50, 100, 300)}
    for end in (300, 600, 1500):
        assert len({frozenset(order[:end]) for order in orders.values()}) == 1


def shards_of(ids: np.ndarray, shards: tuple[int, ...]) -> list[int]:
    return np.searchsorted(np.cumsum(shards), ids, side="right").tolist()


def test_a_rank_reads_few_shards_at_a_time() -> None:
    shards = (100,) * 64
    epoch = plan(shards, batch_size=64, streams=16, shuffle_buffer=16 * 20)
    order = epoch.order(0)
    for world_size in (1, 2, 4, 8, 16):
        for rank in range(world_size):
            for begin in range(0, epoch.steps_per_epoch, 10):
                places = [
                    p
                    for step in range(begin, begin + 10)
                    for p in rank_slice(epoch.batch(step), rank, world_size)
                ]
                touched = set(shards_of(order[places], shards))
                assert len(touched) <= 16 // world_size * 3  # per stream at most what 40 + 20 samples span


@pytest.mark.parametrize("window", [4, 25])
def test_a_sample_is_moved_within_the_shuffle_buffer_of_its_stream(window: int) -> None:
    epoch = plan((4000,), batch_size=16, streams=4, shuffle_buffer=4 * window)
    order = epoch.order(0)
    moved = []
    for stream in range(4):
        own = np.concatenate(
            [order[list(epoch.batch(step))][4 * stream : 4 * stream + 4] for step in range(250)]
        )
        first = own.min() if own.max() - own.min() < 2000 else own[own > 2000].min()  # where the turn wraps
        moved.append(np.abs((own - first) % 4000 - np.arange(1000)))
    assert max(part.max() for part in moved) < window
    assert np.mean(moved) > window / 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shards", [(10_000,), (1000,) * 10, (9000, 500, 300, 50, 50, 70, 30)], ids=len)
def test_neighbours_of_a_shard_share_a_batch_no_more_often_than_by_chance(
    seed: int, shards: tuple[int, ...]
) -> None:
    epoch = plan(shards, 100, seed=seed)
    batch_of = np.empty(10_000, np.int64)
    batch_of[epoch.order(0)] = np.arange(10_000) // 100
    for distance in (1, 2, 100):
        together = int((batch_of[distance:] == batch_of[:-distance]).sum())
        assert together < 99 + 50  # five standard deviations
    again = np.empty(10_000, np.int64)
    again[epoch.order(1)] = np.arange(10_000) // 100
    assert abs(int((batch_of == again).sum()) - 100) < 50  # epochs are independent


def test_neighbours_of_a_batch_are_not_neighbours_of_a_shard() -> None:
    order = plan((5000, 5000), 64).order(0)
    assert (np.abs(np.diff(order)) <= 2).mean() < 0.01


def test_a_small_shuffle_buffer_still_mixes_the_shards() -> None:
    shards = (500,) * 20
    epoch = plan(shards, 100, streams=10, shuffle_buffer=1000)
    order = epoch.order(0)
    shards_per_batch = [len(set(shards_of(order[list(epoch.batch(step))], shards))) for step in range(100)]
    assert min(shards_per_batch) >= 8


# --- Shares -----------------------------------------------------------------------------------------


@settings(database=None, deadline=None)
@given(begin=st.integers(0, 10**6), count=st.integers(0, 2000), world_size=st.integers(1, 64))
def test_shares_partition_a_batch(begin: int, count: int, world_size: int) -> None:
    places = range(begin, begin + count)
    shares = [rank_slice(places, rank, world_size) for rank in range(world_size)]
    assert [place for part in shares for place in part] == list(places)
    sizes = [len(part) for part in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 512])
@pytest.mark.parametrize("shards", SIZES.values(), ids=SIZES.keys())
def test_every_world_trains_on_the_same_batches_and_on_each_sample_once(
    shards: tuple[int, ...], batch_size: int, drop: bool
) -> None:
    samples = sum(shards)
    if drop and samples < batch_size:
        return
    epoch = plan(shards, batch_size, seed=3, drop_remainder=drop)
    order = epoch.order(2)
    batches = [order[list(epoch.batch(step))].tolist() for step in range(epoch.steps_per_epoch)]
    seen = [sample for batch in batches for sample in batch]
    assert seen == order[: epoch.samples_per_epoch].tolist()
    assert len(set(seen)) == len(seen) == (samples - samples % batch_size if drop else samples)
    for world_size in WORLDS:
        for step, batch in enumerate(batches):
            shares = [rank_slice(epoch.batch(step), rank, world_size) for rank in range(world_size)]
            assert [sample for part in shares for sample in order[list(part)].tolist()] == batch


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop", "world_size", "parts", "expected"),
    [
        (9, 4, False, 1, 1, 1),
        (9, 4, True, 1, 1, 4),
        (8, 4, False, 2, 2, 1),
        (1000, 64, False, 4, 2, 5),  # the last batch has 40: four ranks, two passes
        (9, 8, False, 8, 1, 1),  # seven ranks without a sample take one with a weight of zero
        (3, 64, False, 1, 1, 3),
        (10, 8, False, 1, 4, 1),
        (
            13,
            8,
            False,
            3,
            {"reproducible": True, "virtual_ranks": 2},
            2,
        ),  # the last batch has parts of 3 and 2
    ],
)
def test_the_smallest_micro_batch(
    samples: int, batch_size: int, drop: bool, world_size: int, parts: Any, expected: int
) -> None:
    settings = parts if isinstance(parts, dict) else {"accumulate": parts}
    train = TrainConfig(epochs=1, batch_size=batch_size, **settings)
    epoch = plan((samples,), batch_size, drop_remainder=drop)
    assert smallest_micro_batch(epoch, world_size, train) == expected
    assert expected == min(
        len(part)
        for step in range(epoch.steps_per_epoch)
        for rank in range(world_size)
        for part in micro_batch_slices(epoch.batch(step), rank, world_size, train)
    )


# --- Proof ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**40), max_size=50), st.randoms(use_true_random=False))
@settings(database=None, deadline=None)
def test_a_digest_depends_on_the_samples_and_not_on_their_order(ids: list[int], random: Any) -> None:
    shuffled = ids.copy()
    random.shuffle(shuffled)
    cut = len(ids) // 3
    whole, parts = np.array(ids, np.int64), (np.array(p, np.int64) for p in (shuffled[:cut], shuffled[cut:]))
    counts, totals = zip(*(digest(part) for part in parts), strict=True)
    assert (sum(counts), sum(totals) % 2**64) == digest(whole)


def test_a_digest_notices_a_lost_a_repeated_and_a_replaced_sample() -> None:
    ids = np.arange(100)
    others = [ids[1:], np.r_[ids[1:], 1], np.r_[ids[2:], 3, -2 + 100], np.r_[ids[:-1], 100]]
    assert len({digest(ids), *(digest(other) for other in others)}) == 5
