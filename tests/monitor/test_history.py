"""The history of a run: its bounds, its means and the characters that it is drawn with."""

from __future__ import annotations

import math

import pytest

from disttrain.monitor.history import History, blocks, dots, limits


def test_a_run_of_days_is_kept_in_few_points_whose_means_are_right() -> None:
    history = History()
    for step in range(1, 100_001):
        history.add(step, {"loss": float(step), "odd": float(step) if step % 2 else None})
    assert 250 < len(history.steps) <= 512
    assert history.columns("loss", 4) == pytest.approx([12_500, 37_500, 62_500, 87_500], rel=0.01)
    assert history.columns("odd", 1) == pytest.approx([50_000], rel=0.01)


def test_a_point_holds_from_the_one_before_to_its_own_step() -> None:
    history = History()
    for step, value in ((10, 1.0), (20, 3.0), (40, 5.0)):
        history.add(step, {"loss": value})
    assert history.columns("loss", 8) == [1, 1, 3, 3, 5, 5, 5, 5]
    assert history.columns("loss", 2) == [2, 5]
    assert history.columns("other", 2) == [None, None]


def test_what_is_unknown_is_a_gap() -> None:
    history = History()
    for step, use in ((1, None), (2, 50.0), (3, math.nan), (4, 100.0)):
        history.add(step, {"use": use, "loss": 1.0})
    assert history.columns("use", 4) == [None, 50.0, None, 100.0]
    assert blocks(history.columns("use", 4)) == " ▄ ▇"
    assert history.smooth("use", 4)[0] is None


def test_noise_is_smoothed_and_few_points_are_joined() -> None:
    history = History()
    for step in range(1, 401):
        history.add(step, {"loss": 2.0 + (-1) ** step})
    smooth = [value for value in history.smooth("loss", 80) if value is not None]
    assert max(smooth) - min(smooth) < 0.5
    few = History()
    few.add(10, {"loss": 2.0})
    few.add(20, {"loss": 1.0})
    curve = [value for value in few.smooth("loss", 40) if value is not None]
    assert curve == sorted(curve, reverse=True)
    assert len(set(curve)) > 15
    assert (curve[0], curve[-1]) == (2.0, 1.0)


def test_the_axis_is_set_neither_by_the_first_losses_nor_by_noise() -> None:
    assert limits([100.0, *[2.0 - i / 100 for i in range(100)]]) == pytest.approx((1.01, 1.99))
    low, high = limits([0.99, 1.0]) or (0.0, 0.0)
    assert high - low == pytest.approx(0.1)
    assert limits([0.0]) == (0.0, 0.5)
    assert limits([None]) is None


def test_dots() -> None:
    assert dots([0, 1, 2, 3], 1, 0, 3) == [["⡠", "⠊"]]
    assert dots([0, 7], 2, 0, 7) == [["⢸"], ["⡸"]]
    assert dots([None, 0], 1, 0, 1) == [["⢀"]]
    assert dots([9, 9], 2, 0, 1) == [["⠉"], [" "]]


def test_blocks() -> None:
    assert blocks([0, 1, 2, 3, 4, 5, 6], 0, 6) == "▁▂▃▄▅▆▇"
    assert blocks([-5, 400]) == "▁▇"
