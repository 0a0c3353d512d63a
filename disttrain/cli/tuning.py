"""`disttrain tune`: find a learning rate or a batch size for an experiment."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disttrain.cli.shared import JSON, PATH, POSITIVE, PROCESSES, SECONDS, aside, options, ready_to_measure

if TYPE_CHECKING:
    from disttrain.config import Config
    from disttrain.shards.index import Index


@click.group()
def tune() -> None:
    """Find a learning rate or a batch size by short trials."""


_COMMON = options(
    click.argument("config_path", metavar="CONFIG", type=PATH),
    click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1),
    PROCESSES,
    click.option(
        "--output", type=PATH, help="The page with the plot (default: ./tune_lr.html or ./tune_batch.html)."
    ),
    JSON,
)


@tune.command()
@click.option("--from", "low", type=POSITIVE, default=1e-6, help="Lowest learning rate to try.")
@click.option("--to", "high", type=POSITIVE, default=10, help="Highest learning rate to try.")
@click.option("--steps", type=click.IntRange(20), default=100, help="Optimizer steps.")
@_COMMON
def lr(
    config_path: Path,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    output: Path | None,
    as_json: bool,
    **span: Any,
) -> None:
    """Suggest optim.lr by a learning-rate range test (Smith 2015).

    Trains for some steps with a rising learning rate, and suggests the rate at which the loss falls fastest.
    Use it as a starting point: with warm-up, up to a third of the rate with the lowest loss is usual.
    """
    from disttrain.bench.tune import find_rate
    from disttrain.bench.tune_page import write_rates
    from disttrain.config import load_config
    from disttrain.errors import UsageError

    if span["low"] >= span["high"]:
        raise UsageError(f"--from {span['low']:g} is not below --to {span['high']:g}; choose a lower --from")
    config = load_config(config_path, overrides)
    plan, index = ready_to_measure(config, gpus, procs)
    found = find_rate(config, plan, **span)
    if found.suggested is None or found.most is None:
        outcome = "the loss did not fall at any learning rate; try a wider range (--from, --to)"
    else:
        outcome = f"optim.lr={_short(found.suggested)}; above {_short(found.most)} training gets worse"
    page = write_rates(found, outcome, _subject(config, index), output or Path("tune_lr.html"))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found) | {"page": str(page)}))
        return
    click.echo(outcome)
    click.echo(page)


@tune.command()
@SECONDS
@_COMMON
def batch(
    config_path: Path,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    seconds: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Suggest train.batch_size: the smallest batch size that is nearly as fast as the fastest.

    Tries larger and larger batches until one does not fit into memory or is not faster.
    """
    from disttrain.bench.tune import judge_batches, try_batches
    from disttrain.bench.tune_page import batch_cells, write_batches
    from disttrain.config import load_config
    from disttrain.errors import TrainingError

    config = load_config(config_path, overrides)
    plan, index = ready_to_measure(config, gpus, procs)
    rows = []
    if not as_json:
        click.echo(f"{'batch size':>10} {'ms per step':>12} {'images/s':>12} {'GPU memory, GiB':>16}")
    for row in try_batches(config, plan, index, seconds=seconds, say=aside):
        rows.append(row)
        if not as_json:
            size, step, speed, memory = batch_cells(row)
            click.echo(f"{size:>10} {step:>12} {speed:>12} {memory:>16}")
    best = judge_batches(rows)
    if best is None:
        raise TrainingError("not even the smallest batch fits into memory; use smaller images")
    outcome = f"train.batch_size={best}"
    page = write_batches(rows, outcome, _subject(config, index), output or Path("tune_batch.html"))
    if as_json:
        tried = [dataclasses.asdict(row) | {"images_per_s": row.images_per_s} for row in rows]
        click.echo(json.dumps({"tried": tried, "suggested": best, "page": str(page)}))
        return
    click.echo(f"{outcome}; find its learning rate with: disttrain tune lr {config_path} {outcome}")
    click.echo(page)


def _subject(config: Config, index: Index) -> str:
    return f"{config.name}: {config.model.name} on {index.name}, {config.optim.name}"


def _short(rate: float) -> str:
    """Returns a learning rate with two digits, as one writes it in a config."""
    return f"{float(f'{rate:.2g}'):g}"
