"""The charts of a report as plain values, thinned so that the page of a long run stays small.

assets/report/charts.js draws them: it chooses ranges and ticks, smooths, zooms and names values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from disttrain.report.columns import Array, downsample
from disttrain.report.devices import MEASURES, Device
from disttrain.report.run import Event, Run

PALETTE = (
    "#2f7fd1", "#d2691e", "#1f9254", "#a35bd6", "#e0443e", "#138a96", "#d4509b", "#86800a",
)  # fmt: skip
"""Distinguishable on white, on black, and with the usual kinds of colour blindness."""

_POINTS = 2400  # of one curve
_ALL_POINTS = 120_000  # of all curves of the devices together
_MEANS = 400  # parts of a long curve, of which the smoothed curve has the means
_TABLE = 300  # points from which charts.js computes places on another x axis
_MOST_CURVES = 8  # with a colour of their own
_MOST_MARKS = 1000
_EVENTS = {
    "start": ("start", "#e0443e"),
    "evaluation": ("evaluation", "#1f9254"),
    "checkpoint": ("checkpoint", "#86800a"),
    "stall": ("stall", "#a35bd6"),
}


@dataclass
class Charts:
    """The charts of a page; the values in them are numbers joined by commas.

    Attributes:
        figures: name of a chart -> its group, options and curves.
        groups: name of a group -> the x axes to choose from, the first one first, and the marks.
        rulers: name of a ruler -> x axis -> the table that leads from the x of its curves to the axis.
    """

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    rulers: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)

    def add(self, name: str, group: str, series: Sequence[Mapping[str, Any]], **options: Any) -> None:
        """Adds a chart; `options` are unit, zero, log, clip and smooth."""
        self.figures[name] = {"group": group, "series": series, **options}


class Curve(NamedTuple):
    """A column of the train records, drawn over the steps.

    Attributes:
        key: name of the column.
        scale: factor from the recorded to the drawn value.
        form: Python format of the values in text.
        unit: unit after a value in text.
        options: of the chart.
    """

    key: str
    scale: float
    form: str
    unit: str
    options: dict[str, Any]


_LOSS = Curve("loss", 1.0, ".4f", "", {"log": True, "clip": True, "smooth": True})
_ACCURACY = Curve("accuracy", 100.0, ".2f", " %", {"unit": "%", "clip": True, "smooth": True})
_MAP = Curve("map", 100.0, ".2f", " %", {})
LEARNING = (
    _LOSS,
    _ACCURACY,
    Curve("lr", 1.0, ".3g", "", {"log": True, "zero": True}),
    Curve("images_per_s", 1.0, ",.0f", " images/s", {"zero": True, "clip": True, "smooth": True}),
    Curve("data_wait_pct", 1.0, ".1f", " %", {"unit": "%", "zero": True, "clip": True, "smooth": True}),
)


def learning(charts: Charts, run: Run) -> None:
    """Adds loss, accuracy, learning rate, throughput and data wait over epochs, steps or time."""
    steps, times = run.train["step"], run.train["time_s"]
    per_epoch = (run.env.get("run") or {}).get("steps_per_epoch")
    axes, tables = [_axis("step")], {}
    if isinstance(per_epoch, int) and per_epoch > 0:
        axes.insert(0, _axis("epoch"))
        tables["epoch"] = _table(steps, steps / per_epoch)
    known = np.isfinite(times)
    if known.any():
        axes.append(_axis("time", "time since the start", "duration"))
        tables["time"] = _table(steps[known], times[known] - _origin_s(run))
    charts.rulers["run"] = tables
    events = run.events if known.any() else []
    marks = _marks(events, lambda times_s: np.interp(times_s, times[known], steps[known]), "run")
    charts.groups["steps"] = {"axes": axes, "marks": marks}
    for curve in LEARNING:
        series = [_series("training", steps, curve.scale * run.train[curve.key], ruler="run")]
        if curve in (_LOSS, _ACCURACY):
            series += _validation("validation", run, curve, color=PALETTE[1], ruler="run")
        if curve is _ACCURACY:
            series += _validation("validation mAP", run, _MAP, color=PALETTE[2], ruler="run")
        charts.add(curve.key, "steps", series, **curve.options)


def timeline(charts: Charts, run: Run, devices: Sequence[Device], events: Sequence[Event]) -> list[str]:
    """Adds every device measure over time, with the events marked.

    Returns:
        The names of the charts.
    """
    measures = [key for key in MEASURES if any(_drawable(device, key) for device in devices)]
    points = max(100, min(_POINTS, _ALL_POINTS // max(1, len(devices) * len(measures))))
    origin_s = _origin_s(run, devices)
    axes = [_axis("since", "time since the start", "duration"), _axis("utc", "time, UTC", "utc")]
    charts.rulers["clock"] = {"utc": ("0,1", _text(np.array([origin_s, origin_s + 1]), 13))}
    marks = _marks(events, lambda times_s: times_s - origin_s, "clock")
    charts.groups["time"] = {"axes": axes, "marks": marks}
    for key in measures:
        many = sum(_drawable(device, key) for device in devices) > _MOST_CURVES
        series: list[dict[str, Any]] = []
        for device in devices:
            if not _drawable(device, key):
                continue
            x, y = _curve(device.time_s - origin_s, device.values[key], points)
            look = {"color": PALETTE[len(series) % len(PALETTE)], "ruler": "clock"}
            series.append(look | {"label": device.label, "x": _text(x), "y": _text(y, 5)})
            if many:  # of so many curves, noise would hide the one that differs
                means = _smooth(device.time_s - origin_s, device.values[key], points // 4)
                series[-1] |= {"many": True, "mean": means}
        charts.add(f"time_{key}", "time", series, unit=MEASURES[key][1], zero=True, smooth=many)
    return [f"time_{key}" for key in measures]


def _drawable(device: Device, key: str) -> bool:
    return key in device.values and bool((np.isfinite(device.time_s) & np.isfinite(device.values[key])).any())


def overlay(charts: Charts, runs: Mapping[str, Run]) -> None:
    """Adds accuracy and loss of several runs in shared charts, over epochs, training time or steps."""
    points = max(50, min(_POINTS // 2, _ALL_POINTS // (4 * len(runs))))
    time = _axis("time", "training time without evaluations and pauses", "duration")
    charts.groups["runs"] = {"axes": [_axis("epoch"), time, _axis("step")], "marks": []}
    for title, run in runs.items():
        steps = run.train["step"]
        axes = {"epoch": _epochs(run), "time": run.training_s}
        charts.rulers[title] = {axis: _table(steps, values, points) for axis, values in axes.items()}
    for curve in (_ACCURACY, _LOSS):
        series = []
        for number, (title, run) in enumerate(runs.items()):
            if not len(run.train["step"]):
                continue
            dash = ("", "7 4", "7 3 2 3", "2 3")[number // len(PALETTE) % 4]
            look = {"color": PALETTE[number % len(PALETTE)], "ruler": title}
            trained = curve.scale * run.train[curve.key]
            series.append(_series(title, run.train["step"], trained, points, faint=True, **look))
            series += _validation(title, run, curve, dash=dash, **look)
        charts.add(f"runs_{curve.key}", "runs", series, **curve.options)


def _epochs(run: Run) -> Array:
    """Returns the epochs trained up to each train record; whole epochs if their length is unknown."""
    whole = (run.env.get("run") or {}).get("samples_per_epoch")
    if isinstance(whole, (int, float)) and whole > 0:
        return run.train["samples"] / whole
    return run.train["epoch"]


def rising_rate(
    charts: Charts,
    rates: Sequence[float],
    losses: Sequence[float],
    smooth: Sequence[float],
    marks: Sequence[float],
) -> None:
    """Adds the chart `curve`: losses and smoothed losses over the learning rate, with `marks` marked."""
    known = np.isfinite(np.array(smooth))
    curves = (("each step", losses, "#8b929c"), ("mean", smooth, PALETTE[0]))
    series = [
        _series(name, np.array(rates)[known], np.array(y)[known], color=color) for name, y, color in curves
    ]
    lines = [
        {"label": label, "color": color, "x": _text(np.array([rate])), "texts": [label], "tall": True}
        for rate, label, color in zip(
            marks, ("suggested", "lowest mean"), (PALETTE[2], PALETTE[1]), strict=False
        )
    ]
    charts.groups["rates"] = {"axes": [_axis("rate", "learning rate", "log")], "marks": lines}
    charts.add("curve", "rates", series, log=True, clip=True)


def batch_speeds(charts: Charts, speeds: Mapping[int, float]) -> None:
    """Adds the chart `curve`: images per second over the batch size."""
    axis = _axis("batch", "batch size", "log") | {"ticks": list(speeds)}
    charts.groups["batches"] = {"axes": [axis], "marks": []}
    x, y = (np.array(list(values), np.float64) for values in (speeds, speeds.values()))
    charts.add("curve", "batches", [_series("images per second", x, y, dots=True)], zero=True)


def _axis(key: str, label: str = "", kind: str = "number") -> dict[str, Any]:
    """Returns an x axis; `kind` is number, log, duration (seconds) or utc (seconds since 1970)."""
    return {"key": key, "label": label or key, "kind": kind}


def _series(label: str, x: Array, y: Array, points: int = _POINTS, **look: Any) -> dict[str, Any]:
    """Returns a curve; of a long one also the means that a smoothed curve is made from."""
    ids = downsample(y, points)
    series: dict[str, Any] = {"label": label, "color": PALETTE[0]}
    series |= {"x": _text(x[ids], 9), "y": _text(y[ids])}
    if min(len(y), points) > 2 * _MEANS:
        series["mean"] = [_text(_means(values, len(y) // _MEANS)) for values in (x, y)]
    return series | look


def _validation(label: str, run: Run, curve: Curve, **look: Any) -> list[dict[str, Any]]:
    known = [record for record in run.evals if getattr(record, curve.key) is not None]
    if not known:
        return []
    values = np.array([curve.scale * getattr(record, curve.key) for record in known])
    steps = np.array([record.step for record in known], np.float64)
    return [_series(label, steps, values, dots=True, **look)]


def _means(values: Array, width: int) -> Array:
    """Returns the means over parts of `width` values; unknown values do not count."""
    padded = np.full(width * -(-len(values) // width), np.nan)
    padded[: len(values)] = values
    table = padded.reshape(-1, width)
    counts = np.isfinite(table).sum(1)
    return np.where(counts > 0, np.nansum(table, 1) / np.maximum(counts, 1), np.nan)


def _smooth(x: Array, y: Array, parts: int) -> list[str]:
    """Returns the means of a curve over at most so many parts, as x and y, broken as `_curve` does."""
    width = -(-len(x) // parts)
    means = _curve(_means(x, width), _means(y, width), parts)
    return [_text(means[0]), _text(means[1], 5)]


def _curve(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """Returns a downsampled curve, broken at gaps in time that are far longer than usual."""
    ids = downsample(y, points)
    steps = np.diff(x)
    if len(steps) < 3:
        return x[ids], y[ids]
    gaps = np.flatnonzero(steps > max(10.0, 20 * float(np.nanmedian(steps)))) + 1
    places = np.searchsorted(ids, gaps)
    return np.insert(x[ids], places, x[gaps - 1]), np.insert(y[ids], places, np.nan)


def _marks(events: Sequence[Event], place: Callable[[Array], Array], ruler: str) -> list[dict[str, Any]]:
    """Returns the marks of each kind of event; `place` leads from UTC seconds to the x of the ruler."""
    marks = []
    for kind, (label, color) in _EVENTS.items():
        own = [event for event in events if event.kind == kind][-_MOST_MARKS:]
        if not own:
            continue
        if kind == "start" and len(own) > 1:
            label = "start and restarts"
        ends = np.array([event.time_s for event in own])
        mark = {"label": label, "color": color, "ruler": ruler, "x": _text(place(ends))}
        if kind == "stall":
            mark["x0"] = _text(place(ends - [event.seconds or 0.0 for event in own]))
        marks.append(mark | {"texts": [event.text for event in own]})
    return marks


def _origin_s(run: Run, devices: Sequence[Device] = ()) -> float:
    """Returns the time of the first event or log point, or else of the first reading; 0 if none is known."""
    times = [np.array([event.time_s for event in run.events]), run.train["time_s"]]
    for found in (times, [device.time_s for device in devices]):
        known = [float(np.nanmin(each)) for each in found if np.isfinite(each).any()]
        if known:
            return min(known)
    return 0.0


def _table(x: Array, to: Array, points: int = _TABLE) -> tuple[str, str]:
    """Returns points through which charts.js finds places on another axis; it begins at 0."""
    ids = np.unique(np.linspace(0, len(x) - 1, min(len(x), points, _TABLE)).round().astype(int))
    return _text(np.concatenate([[0.0], x[ids]]), 9), _text(np.concatenate([[0.0], to[ids]]), 9)


def _text(values: Array, digits: int = 7) -> str:
    return ",".join([f"{value:.{digits}g}" for value in values.tolist()])
