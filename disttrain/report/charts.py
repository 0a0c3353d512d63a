"""The charts of a report: Bokeh figures, downsampled so that the page of a long run stays small.

The curve colours suit light and dark pages. assets/report/report.js gives text, axes and grids the colours of
the page.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    DataRange1d,
    HoverTool,
    LinearAxis,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from disttrain.report.columns import Array, downsample
from disttrain.report.devices import MEASURES, Device
from disttrain.report.run import Event, Run
from disttrain.runs.records import EvalRecord

PALETTE = (
    "#2f7fd1", "#d2691e", "#1f9254", "#a35bd6", "#e0443e", "#138a96", "#d4509b", "#86800a",
)  # fmt: skip
"""Distinguishable on white, on black, and with the usual kinds of colour blindness."""

_POINTS = 2400  # of one curve
_ALL_POINTS = 120_000  # of all curves of the devices together
_MOST_LEGEND = 8
_MOST_MARKS = 2000
_TOOLS = "xbox_zoom,xpan,xwheel_zoom,reset,save"
_EVENTS = {
    "start": ("start", "#e0443e", "solid"),
    "evaluation": ("evaluation", "#1f9254", "dotted"),
    "checkpoint": ("checkpoint", "#86800a", "dashed"),
}


@dataclass
class Charts:
    """The charts of a page by name; charts of a group share their x axis.

    Attributes:
        figures: the argument of `bokeh.embed.components`.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    _ranges: dict[str, DataRange1d] = field(default_factory=dict)

    def add(self, name: str, group: str, label: str, **options: Any) -> Any:
        """Makes an empty chart; charts of a group zoom together."""
        shared = self._ranges.setdefault(group, DataRange1d(range_padding=0.02))
        fig = figure(
            height=290,
            min_width=250,
            sizing_mode="stretch_width",
            x_range=shared,
            y_axis_label=label,
            tools=_TOOLS,
            active_drag="xbox_zoom",
            active_scroll=None,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
            output_backend="canvas",
            **options,
        )
        fig.toolbar.logo = None
        self.figures[name] = fig
        return fig


class Curve(NamedTuple):
    """A column of the train records, drawn over the steps.

    Attributes:
        key: name of the column.
        label: label of the y axis.
        scale: factor from the recorded to the drawn value.
        form: Python format of the values in text.
        unit: unit after a value in text.
        tip: Bokeh format of the values in tooltips.
    """

    key: str
    label: str
    scale: float
    form: str
    unit: str
    tip: str


_LOSS = Curve("loss", "loss", 1.0, ".4f", "", "0.0000")
_ACCURACY = Curve("accuracy", "accuracy, %", 100.0, ".2f", " %", "0.00")
LEARNING = (
    _LOSS,
    _ACCURACY,
    Curve("lr", "learning rate", 1.0, ".3g", "", "%.3g"),
    Curve("images_per_s", "images per second", 1.0, ",.0f", " images/s", "0,0"),
    Curve("data_wait_pct", "data wait, % of time", 1.0, ".1f", " %", "0.0"),
)


def learning(charts: Charts, run: Run) -> None:
    """Adds loss, accuracy, learning rate, throughput and data wait over the steps, with an epoch axis."""
    steps_per_epoch = (run.env.get("run") or {}).get("steps_per_epoch")
    for curve in LEARNING:
        printf = "%" in curve.tip
        fig = charts.add(curve.key, "steps", curve.label, x_axis_label="step")
        fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
        fig.yaxis.formatter = (
            PrintfTickFormatter(format=curve.tip) if printf else NumeralTickFormatter(format="0,0.[00]")
        )
        if isinstance(steps_per_epoch, int) and steps_per_epoch > 0:
            _epoch_axis(fig, steps_per_epoch)
        values = curve.scale * run.train[curve.key]
        if curve in (_LOSS, _ACCURACY):
            raw = _line(fig, run, values, legend_label="training")
            if (window := len(values) // 40) > 1:
                raw.glyph.line_alpha = 0.4
                label = f"mean of {window} log points"
                _line(fig, run, _rolling_mean(values, window), line_width=2.2, legend_label=label)
            _validation(fig, run.evals, curve)
            _legend(fig)
        else:
            raw = _line(fig, run, values)
            fig.y_range.start = 0
        tips = [("step", "@x{0,0}"), ("epoch", "@epoch{0,0}"), (curve.label, f"@y{{{curve.tip}}}")]
        _hover(fig, raw, tips, formatters={"@y": "printf" if printf else "numeral"})


def timeline(charts: Charts, run: Run, devices: Sequence[Device], events: Sequence[Event]) -> list[str]:
    """Adds throughput and every device measure over the time of day, with the events marked.

    Returns:
        The names of the charts.
    """
    measures = [key for key in MEASURES if any(key in device.values for device in devices)]
    points = max(100, min(_POINTS, _ALL_POINTS // max(1, len(devices) * len(measures))))
    throughput = Device("all ranks", "", run.train["time_s"], {"images_per_s": run.train["images_per_s"]})
    rows = [("throughput", "images/s", [throughput], "images_per_s")]
    rows += [(key, MEASURES[key][1], list(devices), key) for key in measures]
    names = []
    for name, unit, shown, key in rows:
        shown = [device for device in shown if key in device.values and _drawable(device, key)]
        if not shown:
            continue
        fig = charts.add(f"time_{name}", "time", unit, x_axis_type="datetime", x_axis_label="time, UTC")
        fig.y_range.start = 0
        fig.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
        _device_lines(fig, shown, key, unit, points)
        _marks(fig, events)
        _legend(fig)
        names.append(f"time_{name}")
    return names


def _drawable(device: Device, key: str) -> bool:
    return bool((np.isfinite(device.time_s) & np.isfinite(device.values[key])).any())


def overlay(charts: Charts, runs: Mapping[str, Run]) -> None:
    """Adds loss and accuracy of several runs in shared charts, over epochs and over training time."""
    points = max(50, min(_POINTS // 2, _ALL_POINTS // (4 * len(runs))))
    x_axes = (("epochs", "epoch"), ("seconds", "training time, s, excluding evaluations and pauses"))
    for (axis, x_label), curve in itertools.product(x_axes, (_ACCURACY, _LOSS)):
        fig = charts.add(f"{axis}_{curve.key}", axis, curve.label, x_axis_label=x_label)
        for number, (title, run) in enumerate(runs.items()):
            color = PALETTE[number % len(PALETTE)]
            dash = ("solid", "dashed", "dotdash", "dotted")[number // len(PALETTE) % 4]
            x = run.training_s if axis == "seconds" else _epochs(run)
            ids = downsample(run.train[curve.key], points)
            trained = {"x": x[ids], "y": curve.scale * run.train[curve.key][ids], "run": [title] * len(ids)}
            fig.line("x", "y", source=ColumnDataSource(trained), color=color, line_alpha=0.4, line_width=1)
            known = [record for record in run.evals if getattr(record, curve.key) is not None]
            at = np.searchsorted(run.train["step"], [record.step for record in known], side="right") - 1
            known = [record for record, place in zip(known, at, strict=True) if place >= 0]
            values = [curve.scale * getattr(record, curve.key) for record in known]
            evaluated = {"x": x[at[at >= 0]], "y": values, "run": [title] * len(known)}
            source = ColumnDataSource(evaluated)
            marks = fig.scatter("x", "y", source=source, color=color, size=6, legend_label=title)
            fig.line("x", "y", source=source, color=color, line_width=2, line_dash=dash, legend_label=title)
            tips = [("run", "@run"), (x_label.partition(",")[0], "@x{0.[00]}"),
                    (f"validation {curve.label}", f"@y{{{curve.tip}}}")]  # fmt: skip
            _hover(fig, marks, tips, mode="mouse")
        _legend(fig)


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
    fig = charts.add("curve", "rates", "loss", x_axis_label="learning rate", x_axis_type="log")
    known = np.isfinite(np.array(smooth))
    data = {"x": np.array(rates)[known], "loss": np.array(losses)[known], "y": np.array(smooth)[known]}
    source = ColumnDataSource(data)
    fig.line("x", "loss", source=source, color=PALETTE[0], line_alpha=0.4, legend_label="each step")
    line = fig.line("x", "y", source=source, color=PALETTE[0], line_width=2.2, legend_label="mean")
    for rate, color in zip(marks, (PALETTE[2], PALETTE[1]), strict=False):
        fig.vspan(x=[rate], line_color=color, line_dash="dashed", line_width=2)
    _legend(fig)
    tips = [("learning rate", "@x{%.3g}"), ("loss", "@y{%.4f}")]
    _hover(fig, line, tips, formatters={"@x": "printf", "@y": "printf"})


def batch_speeds(charts: Charts, speeds: Mapping[int, float]) -> None:
    """Adds the chart `curve`: images per second over the batch size."""
    fig = charts.add("curve", "batches", "images per second", x_axis_label="batch size", x_axis_type="log")
    source = ColumnDataSource({"x": list(speeds), "y": list(speeds.values())})
    fig.line("x", "y", source=source, color=PALETTE[0], line_width=2.2)
    points = fig.scatter("x", "y", source=source, color=PALETTE[0], size=7)
    fig.y_range.start = 0
    fig.xaxis.ticker = list(speeds)
    fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
    fig.yaxis.formatter = NumeralTickFormatter(format="0,0")
    _hover(fig, points, [("batch size", "@x{0,0}"), ("images per second", "@y{0,0}")])


def _line(fig: Any, run: Run, values: Array, **options: Any) -> Any:
    ids = downsample(values, _POINTS)
    data = {"x": run.train["step"][ids], "y": values[ids], "epoch": run.train["epoch"][ids]}
    return fig.line("x", "y", source=ColumnDataSource(data), color=PALETTE[0], **options)


def _validation(fig: Any, evals: Sequence[EvalRecord], curve: Curve) -> None:
    known = [record for record in evals if getattr(record, curve.key) is not None]
    if not known:
        return
    values = np.array([curve.scale * getattr(record, curve.key) for record in known])
    ids = downsample(values, _POINTS)
    source = ColumnDataSource(
        {"x": [known[i].step for i in ids], "y": values[ids], "epoch": [known[i].epoch for i in ids]}
    )
    fig.line("x", "y", source=source, color=PALETTE[1], line_width=2, legend_label="validation")
    points = fig.scatter("x", "y", source=source, color=PALETTE[1], size=6, legend_label="validation")
    _hover(fig, points, [("epoch", "@epoch{0,0}"), (f"validation {curve.key}", f"@y{{{curve.tip}}}")])


def _device_lines(fig: Any, devices: Sequence[Device], key: str, unit: str, points: int) -> None:
    tips = [("", f"$snap_y{{0,0.[00]}} {unit}"), ("", "$snap_x{%F %T}")]
    times = {"$snap_x": "datetime"}
    curves = [_curve(device.time_s, device.values[key], points) for device in devices]
    xs, ys = [1e3 * x for x, _ in curves], [y.astype(np.float32) for _, y in curves]
    colors = [PALETTE[number % len(PALETTE)] for number in range(len(devices))]
    labels = [device.label for device in devices]
    if len(devices) > _MOST_LEGEND:  # one glyph for all: 64 glyphs per chart make the page slow
        source = ColumnDataSource({"xs": xs, "ys": ys, "color": colors, "label": labels})
        lines = fig.multi_line("xs", "ys", source=source, color="color", line_width=0.8, line_alpha=0.5)
        _hover(fig, lines, [("device", "@label"), *tips], "mouse", times)
        return
    for x, y, color, label in zip(xs, ys, colors, labels, strict=True):
        look = {"color": color, "line_width": 1.3, "name": label, "legend_label": label}
        line = fig.line("x", "y", source=ColumnDataSource({"x": x, "y": y}), **look)
        _hover(fig, line, [("", "$name"), *tips], formatters=times)


def _curve(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """Returns a downsampled curve, broken at gaps in time that are far longer than usual."""
    ids = downsample(y, points)
    steps = np.diff(x)
    if len(steps) < 3:
        return x[ids], y[ids]
    gaps = np.flatnonzero(steps > max(10.0, 20 * float(np.nanmedian(steps)))) + 1
    places = np.searchsorted(ids, gaps)
    return np.insert(x[ids], places, x[gaps - 1]), np.insert(y[ids], places, np.nan)


def _marks(fig: Any, events: Sequence[Event]) -> None:
    for kind, (label, color, dash) in _EVENTS.items():
        own = [event for event in events if event.kind == kind][-_MOST_MARKS:]
        if kind == "start" and len(own) > 1:
            label = "start and restarts"
        if own:
            data = {"x": [1e3 * event.time_s for event in own], "text": [event.text for event in own]}
            look = {"line_color": color, "line_dash": dash, "line_width": 1.4, "line_alpha": 0.8}
            spans = fig.vspan(x="x", source=ColumnDataSource(data), legend_label=label, **look)
            _hover(fig, spans, [("", "@text")], mode="mouse")
    stalls = [event for event in events if event.kind == "stall"]
    if stalls:
        data = {
            "x0": [1e3 * (event.time_s - (event.seconds or 0.0)) for event in stalls],
            "x1": [1e3 * event.time_s for event in stalls],
            "text": [event.text for event in stalls],
        }
        look = {"fill_color": "#e0443e", "fill_alpha": 0.25, "line_color": None, "legend_label": "stall"}
        strips = fig.vstrip(x0="x0", x1="x1", source=ColumnDataSource(data), **look)
        _hover(fig, strips, [("stall", "@text")], mode="mouse")


def _hover(
    fig: Any,
    shown: Any,
    tips: list[tuple[str, str]],
    mode: Literal["mouse", "vline"] = "vline",
    formatters: Mapping[str, Any] | None = None,
) -> None:
    # Bokeh's own tooltip table is too pale on white. In this HTML, Bokeh escapes the values.
    rows = "".join(f"<div><b>{escape(name)}</b> {value}</div>" for name, value in tips)
    tool = HoverTool(tooltips=rows, mode=mode, line_policy="nearest", visible=False, renderers=[shown])
    tool.formatters = dict(formatters or {})
    fig.add_tools(tool)


def _legend(fig: Any) -> None:
    legend = fig.legend[0] if fig.legend else None
    if legend is None:
        return
    fig.add_layout(legend, "above")
    legend.update(
        orientation="horizontal",
        ncols=min(3, len(legend.items)),  # rows that fit on a phone
        click_policy="hide",
        border_line_color=None,
        background_fill_color=None,
        label_text_font_size="0.85em",
        padding=0,
        spacing=10,
    )


def _epoch_axis(fig: Any, steps_per_epoch: int) -> None:
    """Adds an epoch axis on top of a chart over the steps; it follows the zoom."""
    epochs = Range1d(start=0, end=1)
    fig.extra_x_ranges = {"epochs": epochs}
    axis = LinearAxis(x_range_name="epochs", axis_label="epoch", axis_label_standoff=0)
    fig.add_layout(axis, "above")
    code = f"epochs.setv({{start: cb_obj.start / {steps_per_epoch}, end: cb_obj.end / {steps_per_epoch}}})"
    follow = CustomJS(args={"epochs": epochs}, code=code)
    fig.x_range.js_on_change("start", follow)
    fig.x_range.js_on_change("end", follow)


def _rolling_mean(values: Array, window: int) -> Array:
    """Returns the trailing mean over `window` values; unknown values do not count."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(0, end - window)
    count = counts[end] - counts[begin]
    return np.where(count > 0, (sums[end] - sums[begin]) / np.maximum(count, 1), np.nan)
