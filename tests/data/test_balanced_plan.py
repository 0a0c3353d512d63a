"""An epoch of balanced sampling: the same number of places for each class, and turns within a class."""

from __future__ import annotations

import numpy as np
import pytest

from disttrain.data.epoch_plan import Ids, Plan, digest

COUNTS = (500, 30, 7, 0, 463)
LABELS: Ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
SKIPPED = np.array([3, 700])


def plan(labels: Ids | None = LABELS, **options: int) -> Plan:
    return Plan(3, (300, 500, 200), 64, skipped=SKIPPED, labels=labels, **options)


def usable(label: int) -> Ids:
    """Returns the ids of a class that are not left out."""
    return np.setdiff1d(np.flatnonzero(label == LABELS), SKIPPED)


@pytest.mark.parametrize("options", [{}, {"streams": 4, "shuffle_buffer": 100}])
@pytest.mark.parametrize("epoch", [0, 1, 2, 1000])
def test_classes_and_the_samples_of_a_class_have_equal_shares(epoch: int, options: dict[str, int]) -> None:
    order = plan(**options).order(epoch)
    assert len(order) == plan().samples == 998
    assert not np.isin(SKIPPED, order).any()
    times = np.bincount(order, minlength=1000)
    assert np.array_equal(times, plan().times(epoch))
    places = np.bincount(LABELS[order], minlength=len(COUNTS))
    assert sorted(places.tolist()) == [0, 249, 249, 250, 250]
    for label in (0, 1, 2, 4):
        assert np.ptp(times[usable(label)]) <= 1


def test_over_several_epochs_the_places_left_over_go_round() -> None:
    epochs = 25
    times = sum(plan().times(epoch) for epoch in range(epochs))
    places = np.bincount(LABELS, weights=times)
    assert np.ptp(places[places > 0]) <= 1
    for label in (0, 1, 2, 4):
        assert np.ptp(times[usable(label)]) <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = plan()
    later = [first.order(epoch) for epoch in range(3)][-1]
    assert np.array_equal(plan().order(2), later)
    assert not np.array_equal(plan().order(1), later)


def test_the_check_of_an_epoch_expects_what_is_drawn() -> None:
    order = plan().order(5)
    expected = plan().ids_between(5, order, 0, 998)
    assert np.array_equal(np.sort(order), expected)
    assert digest(order) == digest(expected)
    swapped = np.append(expected[1:], expected[-1])  # one sample too often, and another too rarely
    assert digest(swapped) != digest(expected)
    assert np.array_equal(plan().ids_between(5, order, 64, 998), order[64:])


def test_uniform_sampling_has_every_sample_once() -> None:
    order = plan(labels=None).order(5)
    assert np.array_equal(np.sort(order), np.setdiff1d(np.arange(1000), SKIPPED))
