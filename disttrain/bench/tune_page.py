"""The page of `disttrain tune`: one HTML file with a chart, like those of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttrain.bench.tune import BatchRow, RateFinding
from disttrain.report import charts
from disttrain.report.rendering import render


def write_rates(found: RateFinding, outcome: str, subject: str, output: Path) -> Path:
    """Writes the page of a learning-rate range test, and returns its path."""
    drawn = charts.Charts()
    marks = [rate for rate in (found.suggested, found.most) if rate is not None]
    charts.rising_rate(drawn, found.rates, found.losses, found.smooth, marks)
    columns = zip(found.rates, found.losses, found.smooth, strict=True)
    rows = [(f"{rate:.3g}", f"{loss:.4f}", f"{mean:.4f}") for rate, loss, mean in columns]
    return render(
        "tuning.html",
        output,
        drawn,
        title="Learning rate",
        outcome=outcome,
        subject=subject,
        heading="Loss while the learning rate rises",
        curve="Loss",
        explanation="Each step uses a larger learning rate than the previous one. The first dashed line is "
        "the suggestion: there the mean loss falls fastest. Above the second line, it rises again.",
        columns=("learning rate", "loss", "mean"),
        rows=rows,
    )


def write_batches(found: Sequence[BatchRow], outcome: str, subject: str, output: Path) -> Path:
    """Writes the page on throughput by batch size, and returns its path."""
    drawn = charts.Charts()
    speeds = {row.batch_size: row.images_per_s for row in found if row.images_per_s is not None}
    charts.batch_speeds(drawn, speeds)
    return render(
        "tuning.html",
        output,
        drawn,
        title="Batch size",
        outcome=outcome,
        subject=subject,
        heading="Throughput over the batch size",
        curve="Images per second",
        explanation="The suggestion is the smallest batch size that is nearly as fast as the fastest. A new "
        "batch size needs a new learning rate: find it with disttrain tune lr.",
        columns=("batch size", "ms per step", "images/s", "GPU memory, GiB"),
        rows=[batch_cells(row) for row in found],
    )


def batch_cells(row: BatchRow) -> tuple[str, str, str, str]:
    """Returns the cells of a row of the table of batch sizes."""
    if row.step_s is None:
        return f"{row.batch_size:,}", "does not fit", "", ""
    memory = "n/a" if row.memory_gib is None else f"{row.memory_gib:,.2f}"
    return f"{row.batch_size:,}", f"{1000 * row.step_s:,.3g}", f"{row.images_per_s:,.0f}", memory
