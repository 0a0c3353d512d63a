"""The table of the GPUs of a run or a node, or of the processes of a run on CPUs.

If it has no room for all, those with a problem come first, and a row sums up all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from disttrain.monitor.widgets import bar, plain, side_by_side
from disttrain.runs.records import GpuMeans, GpuReading, Process
from disttrain.terminal import printable
from disttrain.units import ago, number

_CELL_MIN = 36  # cells of a device where several are side by side
_GAP = 2
_ALWAYS = 4  # columns that are shown although nothing is known
_BAR_MIN, _BAR = 6, 30
_IDLE = 0.5  # times the median of all devices
_USUAL = ("power", "clock_setting")  # they lower the clocks of a healthy GPU

Cell = Callable[[Any], str]


class _Column(NamedTuple):
    title: str
    width: int
    cell: Cell
    field: str


def _of(key: str, form: str = ".0f", unit: str = "", scale: float = 1) -> Cell:
    return lambda row: number(getattr(row, key, None), form, unit, scale)


def _pair(first: Cell, second: Cell) -> Cell:
    return lambda row: f"{first(row)}/{second(row)}"


def _reasons(row: GpuReading) -> str:
    return "n/a" if row.throttle is None else ", ".join(row.throttle) or "-"


_MEMORY = _pair(_of("memory_used_mib", ".1f", scale=1 / 1024),
                _of("memory_total_mib", ".1f", " GiB", 1 / 1024))  # fmt: skip
_GPU_COLUMNS = (  # the first that fit are shown
    _Column("use", 5, _of("utilization_pct", unit=" %"), "utilization_pct"),
    _Column("memory", 14, _MEMORY, "memory_used_mib"),
    _Column("power", 9, _pair(_of("power_w"), _of("power_limit_w", unit=" W")), "power_w"),
    _Column("temp", 6, _of("temperature_c", unit=" °C"), "temperature_c"),
    _Column("age", 6, lambda row: ago(row.age_s), "age_s"),
    _Column("SM clock", 8, _of("sm_clock_mhz", unit=" MHz"), "sm_clock_mhz"),
    _Column("SMs", 5, _of("sm_activity_pct", unit=" %"), "sm_activity_pct"),
    _Column("tensor", 6, _of("tensor_activity_pct", unit=" %"), "tensor_activity_pct"),
    _Column("mem use", 7, _of("memory_utilization_pct", unit=" %"), "memory_utilization_pct"),
    _Column("ours", 8, _of("memory_used_by_us_mib", ".1f", " GiB", 1 / 1024), "memory_used_by_us_mib"),
    _Column("PCIe in/out MiB/s", 17,
            _pair(_of("pcie_rx_mib_per_s", ",.0f"), _of("pcie_tx_mib_per_s", ",.0f")), "pcie_rx_mib_per_s"),
    _Column("NVLink in/out MiB/s", 19,
            _pair(_of("nvlink_rx_mib_per_s", ",.0f"), _of("nvlink_tx_mib_per_s", ",.0f")),
            "nvlink_rx_mib_per_s"),
    _Column("ECC", 7, _pair(_of("ecc_corrected"), _of("ecc_uncorrected")), "ecc_corrected"),
    _Column("slowed by", 16, _reasons, "throttle"),
)  # fmt: skip
_PROCESS_COLUMNS = (
    _Column("of one core", 11, _of("cpu_pct", unit=" %"), "cpu_pct"),
    _Column("memory", 9, _of("memory_used_mib", ".1f", " GiB", 1 / 1024), "memory_used_mib"),
)
_SHARED = _Column("memory", 21, lambda row: _MEMORY(row) + " shared" * bool(row.memory_shared), "")


@dataclass(frozen=True)
class Devices:
    """The GPUs of a run, or its processes if it has no GPUs.

    Attributes:
        rows: from a record, in order of host and index.
        labels: of the rows.
        keys: of the rows: the UUID or the rank.
        use: the field of the rows with the utilisation in percent.
        names: of the GPUs, each once.
    """

    rows: list[Any]
    labels: list[str]
    keys: list[str]
    use: str
    names: list[str]

    def uses(self) -> list[float | None]:
        """Returns the utilisation of each row in percent."""
        return [getattr(row, self.use) for row in self.rows]

    def problems(self) -> list[str]:
        """Returns a word on each row: lost, error, hot, throttled, idle or nothing."""
        known = [use for use in self.uses() if use is not None]
        least = _IDLE * statistics.median(known) if known else 0.0
        return [
            _problem(row) or ("idle" if use is not None and use < least else "")
            for row, use in zip(self.rows, self.uses(), strict=True)
        ]


def _problem(row: Any) -> str:
    """Returns what is wrong with a GPU in one word, or nothing."""
    if getattr(row, "lost", None):
        return "lost"
    if getattr(row, "xids_seen", None) or getattr(row, "ecc_uncorrected", None):
        return "error"
    if getattr(row, "critical_events", None):
        return "lost" if row.utilization_pct is None else "error"
    reasons = slowed_by(row)
    if any("thermal" in reason for reason in reasons) or getattr(row, "throttled_thermal_pct", None):
        return "hot"
    return "throttled" if reasons else ""


def slowed_by(row: Any) -> list[str]:
    """Returns what lowers the clocks of a GPU, but for what is usual."""
    return [reason for reason in getattr(row, "throttle", None) or () if reason not in _USUAL]


_WORST_FIRST = ("lost", "error", "hot", "throttled", "idle", "")
_STYLES = dict(zip(_WORST_FIRST, ("bold red", "bold red", "red", "red", "yellow", "green"), strict=True))


def devices(gpus: Sequence[GpuMeans | GpuReading], processes: Sequence[Process]) -> Devices:
    """Returns the GPUs, or the processes if there are none, with their labels."""
    if not gpus:
        ranks = sorted(processes, key=lambda process: (process.host, process.rank))
        labels = [_label(processes, process.host, f"rank {process.rank}") for process in ranks]
        return Devices(ranks, labels, [f"rank {process.rank}" for process in ranks], "cpu_pct", [])
    by_index = sorted(gpus, key=lambda gpu: (gpu.host, gpu.index is None, gpu.index or 0, gpu.uuid))
    labels = []
    for gpu in by_index:
        instance = f"/{gpu.uuid[4:8]}" if gpu.uuid.startswith("MIG-") else ""
        labels.append(_label(gpus, gpu.host, f"GPU {number(gpu.index, 'd')}{instance}"))
    names = sorted({gpu.name for gpu in gpus if gpu.name})
    return Devices(by_index, labels, [gpu.uuid for gpu in by_index], "utilization_pct", names)


def _label(devices: Sequence[GpuMeans | GpuReading | Process], host: str, name: str) -> str:
    """Returns the name of a device, with its host if there are several hosts."""
    if len({device.host for device in devices}) == 1:
        return name
    host = host.partition(".")[0]
    return f"{host if len(host) <= 14 else '…' + host[-13:]} {name}"  # names of nodes differ at the end


def table(
    found: Devices, width: int, room: int | None, trace: Callable[[str, int], str] | None = None
) -> list[Text]:
    """Returns the table: a header, a line or a part of one for each device, and a summary if some are hidden.

    Args:
        found: what is shown.
        width: of a line.
        room: lines at most; None for one line for each device.
        trace: returns the past utilisation of a device, by its key, in so many characters; None draws a bar
            of the present one.
    """
    count = len(found.rows)
    problems = found.problems()
    lines, across = 1 + count, 1
    if room is not None:
        most = max(1, (width + _GAP) // (_CELL_MIN + _GAP))
        across = min(most, -(-count // max(1, room - 1)))
        lines = min(room, 1 + -(-count // across))
    hidden = count > across * (lines - 1)
    shown = list(range(count))
    if hidden:
        shown = sorted(shown, key=lambda place: _WORST_FIRST.index(problems[place]))
        shown = shown[: max(1, across * (lines - 2))]
    cell_width = (width + _GAP) // across - _GAP
    head, draw = _layout(found, problems, cell_width, trace)
    down = -(-len(shown) // across)  # filled down the first column, then down the next
    body = [
        side_by_side([draw(place) for place in shown[line::down]], cell_width, _GAP) for line in range(down)
    ]
    heads = (" " * _GAP).join([head.ljust(cell_width)] * min(across, len(shown)))
    summary = [_summary(found, count - len(shown))] if hidden else []
    return [plain(heads.rstrip(), "bright_black"), *body, *summary][:room]


def _layout(
    found: Devices, problems: Sequence[str], width: int, trace: Callable[[str, int], str] | None
) -> tuple[str, Callable[[int], Text]]:
    """Returns the header of the table, and what draws a device."""
    label_width = max(cell_len(label) for label in found.labels) + 1
    word_width = max(len(word) + bool(word) for word in problems)
    known = _columns(found, everything=trace is None)
    room = width - label_width - word_width
    least = max(_BAR_MIN, width // 6 - word_width)  # of the bar or history
    sizes = [0]
    for column in known:
        sizes.append(sizes[-1] + column.width + 1)
    fitting = max(count for count, size in enumerate(sizes) if count == 0 or size <= room - least)
    columns = known[:fitting]
    bar_width = max(0, min(room - sizes[fitting], width if trace is not None else _BAR))

    def draw(place: int) -> Text:
        row, word = found.rows[place], problems[place]
        use = getattr(row, found.use)
        line = Text.assemble((printable(found.labels[place].ljust(label_width)), "bold"))
        line.append(word.ljust(word_width), _STYLES[word])
        if trace is not None:
            line.append(trace(found.keys[place], bar_width).ljust(bar_width), _STYLES[word])
        else:
            done, empty = bar((use or 0.0) / 100, bar_width)
            line.append(done, _STYLES[word]).append(empty, "bright_black")
        for column in columns:
            line.append(printable(f" {column.cell(row):>{column.width}}"))
        return line

    titles = "".join(f" {column.title:>{column.width}}" for column in columns)
    history = "use over the run" if trace is not None and bar_width >= 16 else ""
    return " " * (label_width + word_width) + history.ljust(bar_width) + titles, draw


def _columns(found: Devices, *, everything: bool) -> Sequence[_Column]:
    """Returns the columns that say something on these devices; `everything` keeps those that are unknown."""
    if found.use != "utilization_pct":
        return _PROCESS_COLUMNS
    columns = []
    for place, column in enumerate(_GPU_COLUMNS):
        if place == _ALWAYS and len(found.names) > 1:
            columns.append(
                _Column("name", max(map(cell_len, found.names)), lambda gpu: gpu.name or "n/a", "")
            )
        known = any(getattr(gpu, column.field, None) is not None for gpu in found.rows)
        if known or everything or place < _ALWAYS:
            columns.append(column)
    if any(gpu.memory_shared for gpu in found.rows):
        columns = [_SHARED if column.cell is _MEMORY else column for column in columns]
    return columns


def _summary(found: Devices, hidden: int) -> Text:
    uses = [use for use in found.uses() if use is not None]
    spread = "n/a"
    if uses:
        spread = f"mean {statistics.fmean(uses):.0f} %, least {min(uses):.0f} %, most {max(uses):.0f} %"
    return plain(f"+{hidden} more   use of all {len(found.rows)}: {spread}")
