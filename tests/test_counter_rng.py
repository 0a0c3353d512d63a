"""Random numbers by counter: exact values, spread and independence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from disttrain import counter_rng

KEYS = [0, 1, 1234567, 2**63, 2**64 - 1]


def test_bits_are_splitmix64() -> None:
    expected = [  # of the reference implementation (Vigna, splitmix64.c)
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert counter_rng.bits(1234567, 5).tolist() == expected


def test_values_do_not_change_between_versions() -> None:
    assert counter_rng.derive(0) == 16294208416658607535
    assert counter_rng.derive(7, 1, 3) == 11465198217520495270
    assert counter_rng.integers(42, 8, 10).tolist() == [7, 1, 2, 3, 0, 8, 2, 8]
    assert counter_rng.permutation(42, 8).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]
    assert counter_rng.uniform(42, 3).tolist() == [
        0.7415648787718233,
        0.15991039287692022,
        0.27860113025513866,
    ]
    found = [counter_rng.symmetric_beta(42, alpha) for alpha in (0.2, 0.5, 1.0, 8.0)]
    expected = [0.012903987292186544, 0.14996285959379496, 0.6798974813812959, 0.5530108918704013]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.6, 1.0, 8.0])
def test_beta_numbers_are_distributed_as_numpys(alpha: float) -> None:
    found = [counter_rng.symmetric_beta(counter_rng.derive(7, i), alpha) for i in range(10_000)]
    reference = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    for share, value in zip(shares, np.quantile(found, shares), strict=True):
        # As many of the reference lie below as of ours, within five deviations.
        assert abs((reference < value).mean() - share) < 5 * (share * (1 - share) / 10_000) ** 0.5 + 0.005


@pytest.mark.parametrize("key", KEYS)
def test_a_longer_draw_begins_with_the_shorter(key: int) -> None:
    assert counter_rng.bits(key, 1000)[:10].tolist() == counter_rng.bits(key, 10).tolist()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("below", [1, 2, 9, 1000, 2**31 - 1])
def test_integers_are_uniform(key: int, below: int) -> None:
    values = counter_rng.integers(key, 100_000, below)
    assert values.min() >= 0
    assert values.max() < below
    cells = min(below, 100)
    counts = np.bincount(values * cells // below, minlength=cells)
    chances = np.diff(-(-np.arange(cells + 1) * below // cells)) / below  # a cell may hold one value more
    expected = 100_000 * chances
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < cells - 1 + 5 * (2 * cells) ** 0.5


def test_neighbouring_draws_are_independent() -> None:
    values = counter_rng.integers(3, 100_000, 10)
    pairs = np.bincount(10 * values[1:] + values[:-1], minlength=100)
    assert np.abs(pairs - 1000).max() < 160  # five standard deviations


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_has_each_number_once(key: int, count: int) -> None:
    assert sorted(counter_rng.permutation(key, count).tolist()) == list(range(count))


def test_permutations_of_all_keys_differ() -> None:
    orders = {tuple(counter_rng.permutation(key, 50).tolist()) for key in range(500)}
    assert len(orders) == 500


def test_all_permutations_are_as_likely() -> None:
    orders = [tuple(counter_rng.permutation(counter_rng.derive(key), 3).tolist()) for key in range(6000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert max(abs(count - 1000) for count in counts) < 150  # five standard deviations


def test_derive_depends_on_every_part_and_on_their_order() -> None:
    parts = [(), *itertools.product(range(12)), *itertools.product(range(12), repeat=2)]
    parts += itertools.product(range(12), repeat=3)
    keys = {counter_rng.derive(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(0 <= key < 2**64 for key in keys)


def test_derive_takes_the_largest_seed() -> None:
    assert counter_rng.derive(2**63 - 1, 1, 0) != counter_rng.derive(2**63 - 2, 1, 0)
