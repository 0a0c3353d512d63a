"""The commands on trained runs: eval, predict, export, report, serve, replay."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from disttrain.cli.shared import COUNT, JSON, PATH, PROCESSES, ROOT, aside, progress
from disttrain.terminal import columns

_NOT_CUT = 10_000  # characters of a line in a file or a pipe
_RUN = click.argument("run_path", metavar="RUN", type=PATH)
_CHECKPOINT = click.option("--checkpoint", default="best", metavar="best|latest|PATH", help="Weights to use.")


@click.command("eval")
@_RUN
@_CHECKPOINT
@click.option("--data", metavar="NAME", help="Evaluate on another data set with the same classes.")
@ROOT
@PROCESSES
@click.option(
    "--tta", type=click.Choice(["none", "flip", "multi_view"]), default="none", help="Test-time augmentation."
)
@JSON
def eval_(run_path: Path, checkpoint: str, as_json: bool, **where: Any) -> None:
    """Evaluate a trained model on a validation split.

    Shows loss, accuracy, accuracy per class and the confusion matrix; of many classes, the worst, the best
    and the most confused ones. With multi-label data, it shows the average precision of each class instead.
    Counts every sample exactly once, with any number of processes.
    """
    from disttrain.inference.eval import evaluate, report

    result = evaluate(run_path, checkpoint, **where)
    for line in [json.dumps(result)] if as_json else report(result, columns(sys.stdout)):
        click.echo(line)


@click.command()
@_RUN
@click.argument("images", metavar="IMAGE|FOLDER|-...", nargs=-1, required=True)
@_CHECKPOINT
@click.option("--top", type=COUNT, default=3, help="Number of classes shown per image.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="With multi-label data: the least probability of a label that is shown.",
)
@click.option("--grid", type=PATH, metavar="FILE.png", help="Also draw the images with their predictions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document per image.")
@click.option("--max-pixels", type=COUNT, default=8192 * 8192, help="Images with more are not decoded.")
def predict(run_path: Path, images: tuple[str, ...], checkpoint: str, **how: Any) -> None:
    """Classify images with a trained model.

    RUN is a run folder, or a file made by `disttrain export --format safetensors`. FOLDER means all images
    below it. With multi-label data, each image gets all its labels. `-` reads file names from standard input,
    separated by newlines, or by NUL as from `find -print0`. A bad file is reported on standard error, with
    --json also as a line with a `problem`. The other files are still classified, and the exit code is 65.
    """
    from disttrain.inference.predict_command import predict_files as show

    with progress(disable=sys.stdout.isatty()) as on_progress:
        show(run_path, images, checkpoint, **how, on_progress=on_progress)


@click.command()
@_RUN
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "torch-export", "onnx"]),
    required=True,
    help="File format.",
)
@click.option("--output", type=PATH, metavar="FILE", help="Default: RUN/export/FORMAT/model.*.")
@_CHECKPOINT
@ROOT
@click.option("--opset", type=COUNT, help="ONNX operator set (default: chosen by torch).")
def export(
    run_path: Path,
    file_format: Literal["safetensors", "torch-export", "onnx"],
    output: Path | None,
    checkpoint: str,
    root: str | None,
    opset: int | None,
) -> None:
    """Export a trained model for other programs.

    Checks the file against the model on images of the validation split, and writes a model card, README.md,
    beside it.
    """
    from disttrain.inference.exporting import export

    done = export(run_path, file_format, output, checkpoint=checkpoint, root=root, opset=opset)
    click.echo(f"{done.path}: logits differ by at most {done.difference:.3g} on {done.images} images")


@click.command()
@click.argument("runs", metavar="RUN|SWEEP...", nargs=-1, required=True, type=PATH)
@click.option(
    "--output",
    type=PATH,
    help="The page to write (default: report.html in RUN or SWEEP, or ./comparison.html for several).",
)
@click.option(
    "--target",
    type=click.FloatRange(0, 100),
    metavar="PCT",
    help="Compare the time to this accuracy (default: the highest that all runs reached).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=60,
    help="Time limit in seconds for evaluating the best checkpoint, if it has not been evaluated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def report(
    runs: tuple[Path, ...], output: Path | None, target: float | None, seconds: float, as_json: bool
) -> None:
    """Write a report on a run, or compare several runs or those of a sweep.

    The result is one HTML file that works offline, and for a single run a CSV file of its classes. The run
    may still be training, or have failed. The report shows example images if the best checkpoint and the data
    set are available.
    """
    from disttrain.sweep.folder import SweepFolder, run_folders

    sweep = SweepFolder(runs[0])
    if len(runs) > 1:
        _compare([run for path in runs for run in run_folders(path)], output, target, as_json)
        return
    if sweep.is_sweep():
        rows = {run.name: sweep.row(run.name) for run in sweep.read().runs}
        sweep.write_table(rows)
        for line in sweep.unfinished(rows):
            aside(line)
        _compare(run_folders(sweep.path), output or sweep.report, target, as_json)
        return
    from disttrain.report.page import write_report

    click.echo(write_report(runs[0], output, budget_s=seconds))


def _compare(runs: Sequence[Path], output: Path | None, target: float | None, as_json: bool) -> None:
    from rich.console import Console

    from disttrain.report import compare
    from disttrain.report.class_differences import class_table

    comparison = compare.compare(runs, None if target is None else target / 100)
    page = compare.write_comparison(comparison, output or Path("comparison.html"))
    if as_json:
        click.echo(json.dumps(compare.to_json(comparison), indent=1))
        return
    width = columns(sys.stdout) or _NOT_CUT
    console = Console(highlight=False, width=width)
    console.print(compare.table(comparison, width))
    if comparison.warning:
        click.echo(comparison.warning)
    if comparison.classes:
        click.echo(f"\nof {len(comparison.classes):,} classes, those that differ most (--json has all)")
        console.print(class_table(comparison.runs, comparison.classes))
        click.echo()
    for title, text in comparison.bits.items():
        click.echo(f"{title} and {next(iter(comparison.runs))}: {text}")
    for group in comparison.groups:
        if group.deviation is not None:
            title = "" if group.metric.key == "accuracy" else f"{group.metric.title} "
            click.echo(f"{group.setting}: {title}{group.text} (n = {len(group.results)})")
    click.echo(page)


@click.command()
@click.argument("folder", metavar="[FOLDER]", type=PATH, default=Path("runs"))
@click.option("--host", default="127.0.0.1", help="Listen on this name or address; others need a token.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 is a free one (default: 8765 or the next).")
@click.option("--token", is_flag=True, help="Ask for a token on 127.0.0.1 too, which other users can reach.")
@click.option("--open", "browser", is_flag=True, help="Open the page in a browser.")
def serve(folder: Path, host: str, port: int | None, token: bool, browser: bool) -> None:
    """Show the runs below a folder in a browser.

    The list can be sorted and filtered. A click on a run opens its report, and ticked runs are compared. The
    pages follow runs that are training. FOLDER is runs by default, and nothing is written there. Press Ctrl-C
    to quit.
    """
    from disttrain.report.server import serve

    serve(folder, host=host, port=port, token=token, browser=browser, say=click.echo)


@click.command()
@_RUN
@click.option(
    "--from", "begin", type=click.IntRange(0), help="Step of a checkpoint, or 0 (default: the newest)."
)
@click.option("--to", "end", type=COUNT, help="Last step to compare (default: the last log point).")
@PROCESSES
@click.option("--run-dir", type=PATH, help="Keep the run folder of the replay here.")
def replay(
    run_path: Path,
    begin: int | None,
    end: int | None,
    gpus: int | None,
    procs: int | None,
    run_dir: Path | None,
) -> None:
    """Train a part of a run again, and compare the weights bit by bit.

    RUN was trained with train.reproducible. The replay may use another number of processes. It prints where
    the weights part, and then exits with 70.
    """
    from disttrain.errors import TrainingError
    from disttrain.launch.replay import replay as replayed

    place = [f"--gpus={gpus}"] if gpus else [f"--procs={procs}"] if procs else []
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        where = run_dir or Path(folder) / "run"
        begin, found = replayed(run_path, where, begin=begin, end=end, place=place)
    if not found.same:
        raise TrainingError(f"{run_path}, replayed from step {begin:,}: {found.text}")
    click.echo(f"{run_path}, replayed from step {begin:,}: {found.text}")


COMMANDS = (eval_, predict, export, report, serve, replay)
