"""Widgets of the terminal views: bars, curves, rows and the names of devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from disttrain.runs.records import GpuMeans, GpuReading, Process
from disttrain.terminal import printable
from disttrain.units import number

LABEL = 9
"""Cells of the column of labels."""


class Frame:
    """A view as rich asks for it: drawn for the place in which it is shown."""

    def __init__(self, draw: Callable[[int, int], list[Text]]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - 1)  # a full last column makes some terminals wrap
        height = max(1, options.size.height - 1)  # a line is left for the outcome
        lines = self._draw(width, height)
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        yield from console.render(Group(*lines), options.update_width(width))


def plain(text: str, style: str = "") -> Text:
    """Returns text without markup and control characters."""
    return Text(printable(text), style)


def row(label: str, value: Text | str, label_width: int = LABEL) -> Text:
    """Returns a label and its value in one line."""
    line = plain(label, "bold")
    line.truncate(label_width, pad=True)
    return plain("").append_text(line).append_text(plain(value) if isinstance(value, str) else value)


def bar(share: float, width: int) -> tuple[str, str]:
    """Returns the filled and the empty part of a bar, together `width` cells, distinct without colour."""
    halves = int(min(1.0, max(0.0, share)) * width * 2)
    done = "━" * (halves // 2) + "╾" * (halves % 2)
    return done, "─" * (width - len(done))


def gauge(share: float | None, width: int, style: str) -> Text:
    """Returns a bar in a colour."""
    done, rest = bar(share or 0.0, max(0, width))
    return Text.assemble((done, style), (rest, "bright_black"))


def sparkline(values: Sequence[float | None]) -> str:
    """Returns one character per value, scaled between the lowest and the highest.

    An unknown or non-finite value is a blank.
    """
    levels = "▁▂▃▄▅▆▇█"
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return "".join(
        " " if value is None or not math.isfinite(value)
        else levels[int((value - low) / span * (len(levels) - 1) + 0.5) if span > 0 else 0]
        for value in values
    )  # fmt: skip


class Devices(NamedTuple):
    """The GPUs of a run, or its processes if it has no GPUs.

    Attributes:
        rows: from a record, in order of host and index.
        labels: of the rows.
        use: the field of the rows with the utilisation in percent.
    """

    rows: list[Any]
    labels: list[str]
    use: str

    def folded(self, shown: int) -> str:
        """Returns a summary of the rows after the first `shown`."""
        uses = [getattr(row, self.use) for row in self.rows[shown:]]
        known = [use for use in uses if use is not None]
        spread = f"{min(known):.0f} to {max(known):.0f} %" if known else "n/a"
        return f"+{len(self.rows) - shown} more, use {spread}"


def devices(gpus: Sequence[GpuMeans | GpuReading], processes: Sequence[Process]) -> Devices:
    """Returns the GPUs, or the processes if there are none, with their labels."""
    if not gpus:
        by_rank = sorted(processes, key=lambda process: (process.host, process.rank))
        labels = [_label(processes, process.host, f"rank {process.rank}") for process in by_rank]
        return Devices(by_rank, labels, "cpu_pct")
    by_index = sorted(gpus, key=lambda gpu: (gpu.host, gpu.index is None, gpu.index or 0, gpu.uuid))
    labels = []
    for gpu in by_index:
        instance = f"/{gpu.uuid[4:8]}" if gpu.uuid.startswith("MIG-") else ""
        labels.append(_label(gpus, gpu.host, f"GPU {number(gpu.index, 'd')}{instance}"))
    return Devices(by_index, labels, "utilization_pct")


def _label(devices: Sequence[GpuMeans | GpuReading | Process], host: str, name: str) -> str:
    """Returns the name of a device, with its host if there are several hosts."""
    if len({device.host for device in devices}) == 1:
        return name
    host = host.partition(".")[0]
    return f"{host if len(host) <= 14 else '…' + host[-13:]} {name}"  # names of nodes differ at the end
