"""Tests of the drawing of settings as parallel coordinates."""

import itertools

import pytest

from disttrain.report.parallel_coordinates import Line, draw
from disttrain.runs.eval_metrics import EVAL_METRICS


def test_a_line_for_each_setting_on_axes_that_suit_their_values() -> None:
    settings = [
        Line({"lr": "0.1", "name": "sgd", "batch": "20"}, 0.9, "a"),
        Line({"lr": "0.001", "name": "adam", "batch": "10"}, 0.8, "b"),
        Line({"lr": "0.01", "name": "sgd", "batch": "15"}, 0.7, "c"),
    ]
    drawing = draw(settings, EVAL_METRICS["accuracy"])
    assert drawing is not None
    top, bottom = drawing.top, drawing.bottom
    middle = (top + bottom) / 2
    assert [axis.name for axis in drawing.axes] == ["lr", "name", "batch", "accuracy"]
    assert [axis.ticks for axis in drawing.axes] == [
        [(top, "0.1"), (pytest.approx(middle), "0.01"), (bottom, "0.001")],
        [(bottom, "sgd"), (top, "adam")],
        [(top, "20"), (middle, "15"), (bottom, "10")],
        [(pytest.approx(top), "90.00 %"), (pytest.approx(middle), "80.00 %"), (bottom, "70.00 %")],
    ]
    xs = [axis.x for axis in drawing.axes]
    best = drawing.lines[-1]
    assert best.title == "a: 90.00 %"
    assert best.share == pytest.approx(1)
    ys = [top, bottom, top, top]
    assert best.points == " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def test_many_values_of_an_axis_leave_room_between_their_marks() -> None:
    settings = [Line({"lr": str(number)}, 1 - number / 1000, "x") for number in range(1, 1000)]
    drawing = draw(settings, EVAL_METRICS["accuracy"])
    assert drawing is not None
    places = [place for place, _ in drawing.axes[0].ticks]
    assert 4 < len(places) < 10
    assert [drawing.axes[0].ticks[0][1], drawing.axes[0].ticks[-1][1]] == ["500", "1"], "of the best 500"
    assert min(b - a for a, b in itertools.pairwise(places)) > 20


def test_one_setting_is_not_drawn() -> None:
    assert draw([Line({}, 0.5, "all runs")], EVAL_METRICS["accuracy"]) is None


def test_of_a_loss_the_lowest_is_the_best() -> None:
    settings = [Line({"lr": "0.1"}, 0.25, "a"), Line({"lr": "0.2"}, 0.75, "b")]
    drawing = draw(settings, EVAL_METRICS["loss"])
    assert drawing is not None
    assert drawing.axes[-1].name == "validation loss"
    assert [(line.title, line.share) for line in drawing.lines] == [("b: 0.7500", 0), ("a: 0.2500", 1)]
