"""The `disttrain` command. Bodies are thin and import what they need, so that --help is quick."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from disttrain import __version__
from disttrain.errors import DisttrainError

if TYPE_CHECKING:
    from disttrain.shards.index import Index


class _Group(click.Group):
    """Shows a user's mistake as one line with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DisttrainError as error:
            for line in str(error).splitlines():
                click.echo(f"disttrain: {line}", err=True)
            sys.exit(error.exit_code)


_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 110,
}
_PATH = click.Path(path_type=Path)


@click.group(cls=_Group, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="disttrain")
def main() -> None:
    """Train image classifiers on one GPU, many GPUs or many nodes from one YAML file."""


@main.command()
@click.argument("config_path", metavar="CONFIG", type=_PATH)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--gpus", type=click.IntRange(1), help="GPUs on this node (default: all visible).")
@click.option("--procs", type=click.IntRange(1), help="Processes without GPUs (CPU, gloo).")
@click.option("--nodes", type=click.IntRange(1), help="Number of nodes (default: from Slurm, else 1).")
@click.option("--node-rank", type=click.IntRange(0), help="This node, 0 to nodes - 1.")
@click.option("--master-addr", metavar="HOST", help="Address of node 0.")
@click.option("--master-port", type=click.IntRange(1, 65535), help="A free port on node 0.")
@click.option("--run-dir", type=_PATH, help="Run folder (default: runs/<name>/<UTC time>).")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: go on with an unfinished run in --run-dir; PATH: from a run folder or checkpoint.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Go on although config or data set differ from the checkpoint's; the run folder keeps a record.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Restarts from the last checkpoint after a crash.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and start nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Show the outcome only.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def run(
    config_path: Path,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    run_dir: Path | None,
    resume: str,
    force: bool,
    max_restarts: int,
    dry_run: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Train the experiment in CONFIG.

    KEY=VALUE changes a setting, for example optim.lr=0.1. The number of GPUs never changes the experiment:
    train.batch_size is the global batch.
    """
    from disttrain.config import load_config
    from disttrain.errors import UsageError
    from disttrain.launcher import LaunchPlan, launch, plan_nodes, plan_processes
    from disttrain.models import check_model_name
    from disttrain.nvml import visible_gpus
    from disttrain.parallel import usable_cores
    from disttrain.peers import facts
    from disttrain.preflight import (
        check_device,
        check_room,
        check_shared_memory,
        check_trackers,
        identity,
        open_index,
        resume_point,
        split_batch,
    )
    from disttrain.runfolder import RunFolder, new_run_path

    config = load_config(config_path, overrides)
    check_model_name(config.model.name)
    device, processes, chosen, threads = plan_processes(
        gpus=gpus,
        procs=procs,
        visible=[] if procs else visible_gpus(),
        cores=usable_cores(),
        environ=os.environ,
    )
    node = plan_nodes(
        nodes=nodes, node_rank=node_rank, master_addr=master_addr, master_port=master_port, environ=os.environ
    )
    if node is not None and run_dir is None:
        if "SLURM_JOB_ID" not in os.environ:
            raise UsageError(f"--nodes {node.nodes} needs a --run-dir that all nodes share")
        run_dir = Path("runs") / config.name / f"slurm-{os.environ['SLURM_JOB_ID']}"
    plan = LaunchPlan(
        config_path=config_path,
        overrides=overrides,
        run_dir=run_dir or Path("runs") / config.name / "<UTC time>",
        resume=resume,
        device=device,
        processes=processes,
        gpus=chosen,
        threads=threads,
        **(node._asdict() if node else {}),
        verbosity=int(verbose) - int(quiet),
        force=force,
        stall_timeout_s=config.monitor.stall_timeout_s,
    )
    check_device(config, device)
    check_shared_memory(device, plan.processes)
    split_batch(config, plan.world_size)
    index = open_index(config, click.echo)
    folder = RunFolder(plan.run_dir)
    if plan.node_rank == 0:
        check_trackers(config)
        if folder.is_run() and not dry_run:
            folder.create()  # its lock: what a run that goes on there does meanwhile is no damage
        unknown = config.data.on_error == "skip"  # what is skipped is found by the workers
        start = resume_point(folder, resume, identity(config, index, None if unknown else ()), force=force)
        if start.finished:
            click.echo(f"{run_dir}: this run has finished already; nothing to do")
            return
        check_room(folder.path, start.checkpoint)
    if dry_run:
        from disttrain.dryrun import describe

        for label, text in describe(plan, config, index):
            click.echo(f"{label:<11} {text}")
        if plan.node_rank == 0:
            begin = [] if start.checkpoint is None else [f"going on from {start.checkpoint}"]
            for text in (*start.notes, *start.changes, *begin):
                click.echo(f"{'resume':<11} {text}")
        return
    if run_dir is None:
        folder = RunFolder(new_run_path(config.name))
    if plan.node_rank == 0:
        folder.create()
    else:
        folder.check_writable("logs", "errors")
    outcome = launch(
        replace(plan, run_dir=folder.path),
        folder,
        max_restarts=max_restarts,
        say=click.echo,
        facts=facts(config, index),
    )
    if outcome.detail:
        click.echo(outcome.detail.rstrip(), err=True)
    if outcome.message:
        click.echo(f"disttrain: {outcome.message}", err=True)
    sys.exit(outcome.exit_code)


@main.group()
def data() -> None:
    """Make and look at data sets."""


_ROOT = click.option("--root", help="Folder of the data sets (default: $DISTTRAIN_DATA or the user's cache).")
_FORCE = click.option("--force", is_flag=True, help="Replace an existing data set.")


@data.command()
@click.argument("name", metavar="digits|mnist|cifar10")
@click.option("--source", type=_PATH, help="Folder of the original files, instead of a download.")
@_ROOT
@_FORCE
def prepare(name: str, source: Path | None, root: str | None, force: bool) -> None:
    """Make a known data set, downloading it if no source is given."""
    from disttrain import datasets

    with _progress() as on_progress:
        index = datasets.prepare(
            name, source=source, root=root, force=force, say=click.echo, on_progress=on_progress
        )
    _show_index(index)


@data.command()
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option("--name", required=True, help="Name of the new data set.")
@click.option("--size", type=click.IntRange(1), help="Resize and crop every image to SIZE x SIZE pixels.")
@click.option(
    "--val-fraction", type=float, help="Share of each class to validate on, if DIR has no val folder."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order and of the split.")
@click.option(
    "--shard-mib",
    type=click.FloatRange(0, min_open=True),
    default=64,
    show_default=True,
    help="Size of a shard.",
)
@click.option("--procs", type=click.IntRange(1), help="Processes that pack (default: one per core).")
@_ROOT
@_FORCE
def pack(
    folder: Path,
    name: str,
    size: int | None,
    val_fraction: float | None,
    seed: int,
    shard_mib: float,
    procs: int | None,
    root: str | None,
    force: bool,
) -> None:
    """Make a data set of your own images.

    DIR holds train/<class>/<images> and val/<class>/<images> (or test/), or <class>/<images> with
    --val-fraction. If packing is interrupted, the same command goes on with the shards that are finished.
    """
    from disttrain.imagefolder import pack_folder

    with _progress() as on_progress:
        index = pack_folder(
            folder,
            name=name,
            root=root,
            size=size,
            val_fraction=val_fraction,
            seed=seed,
            shard_mib=shard_mib,
            processes=procs,
            force=force,
            say=click.echo,
            on_progress=on_progress,
        )
    _show_index(index)


@data.command()
@click.argument("name")
@_ROOT
def inspect(name: str, root: str | None) -> None:
    """Show what a data set holds."""
    from disttrain.shards.index import load_index

    _show_index(load_index(name, root), classes=True)


@data.command()
@click.argument("name")
@_ROOT
def verify(name: str, root: str | None) -> None:
    """Read and decode every sample of a data set and compare it with its index.

    Lists the shards and samples that are bad, and ends with 65 if there are any.
    """
    from disttrain.errors import DataError
    from disttrain.shards.index import again, load_index
    from disttrain.shards.verify import verify

    index = load_index(name, root, strict=False)
    with _progress() as on_progress:
        problems = verify(index, on_progress=on_progress)
    for problem in problems:
        sample = f"sample {problem.key}: " if problem.key else ""
        click.echo(f"{problem.place}: {sample}{problem.text}")
    if problems:
        count = f"{len(problems):,} problem{'s' * (len(problems) > 1)}"
        raise DataError(f"{name}: {count}; {again(index)}, or train without them with data.on_error=skip")
    samples = sum(split.samples for split in index.splits.values())
    shards = sum(len(split.shards) for split in index.splits.values())
    click.echo(f"{name}: {samples:,} samples in {shards} shard{'s' * (shards > 1)} are what the index says")


@data.command("index")
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option(
    "--train", multiple=True, metavar="PATTERN", help="Tars of the train split (default: train*.tar)."
)
@click.option(
    "--val", multiple=True, metavar="PATTERN", help="Tars of the val split (default: val*.tar or test*.tar)."
)
@click.option(
    "--classes", type=_PATH, help="File with the name of a class on each line, in the order of the labels."
)
@click.option("--skip", is_flag=True, help="Accept samples that cannot be used.")
@_FORCE
def index_(
    folder: Path,
    train: tuple[str, ...],
    val: tuple[str, ...],
    classes: Path | None,
    skip: bool,
    force: bool,
) -> None:
    """Use WebDataset tars that were made elsewhere, where they lie.

    Writes DIR/index.json; the tars stay as they are. Each sample needs an image (png, jpg, webp) and a
    label (KEY.cls).
    """
    from disttrain.errors import UsageError
    from disttrain.shards.foreign import index_folder

    names = None
    if classes is not None:
        try:
            names = classes.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {classes}: cannot be read: {error}") from None
        names = [name.strip() for name in names if name.strip()]
    with _progress() as on_progress:
        index = index_folder(
            folder,
            patterns={"train": train, "val": val},
            classes=names,
            skip_unusable=skip,
            force=force,
            say=click.echo,
            on_progress=on_progress,
        )
    _show_index(index)
    click.echo(f"use it with data.name={index.name} data.root={index.folder.parent}")


@data.command("bench")
@click.argument("name")
@_ROOT
@click.option(
    "--samples", type=click.IntRange(1), default=20000, show_default=True, help="Samples for each stage."
)
@click.option("--batch-size", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--threads", type=click.IntRange(1), help="Decoding and arithmetic threads (default: all cores)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench_(
    name: str, root: str | None, samples: int, batch_size: int, threads: int | None, as_json: bool
) -> None:
    """Measure how fast this machine reads, decodes, caches, batches and augments a data set.

    The last line is the stock webdataset pipeline on the same shards.
    """
    import json

    from disttrain.data.bench import bench
    from disttrain.shards.index import load_index

    stages = []
    if not as_json:
        click.echo(f"{'stage':<17} {'samples/s':>12} {'us/sample':>10}  what")
    for stage in bench(load_index(name, root), samples=samples, batch_size=batch_size, threads=threads):
        stages.append(stage._asdict() | {"samples_per_s": stage.samples_per_s})
        if not as_json:
            us = 1e6 / stage.samples_per_s
            click.echo(f"{stage.name:<17} {stage.samples_per_s:>12,.0f} {us:>10,.2f}  {stage.what}")
    if as_json:
        click.echo(json.dumps(stages, indent=1))


@main.command()
@click.argument("config_path", metavar="[CONFIG]", type=_PATH, required=False)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--gpus", type=click.IntRange(1), help="GPUs to measure on (default: all visible).")
@click.option("--procs", type=click.IntRange(1), help="Processes without GPUs (default: 1).")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2,
    show_default=True,
    help="Length of each measurement.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    config_path: Path | None,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Show where the time of a training step goes on this machine.

    Measures the phases of a step of CONFIG (default: a small network on the embedded digits), real samples
    against a replayed batch, precision x channels_last x compile (without compile if train.compile is false),
    and the speed on other numbers of processes.
    """
    import json

    from rich.console import Console

    from disttrain.bench import DEFAULT, summary, tables
    from disttrain.bench import bench as measure
    from disttrain.config import Config, load_config
    from disttrain.launcher import LaunchPlan, plan_processes
    from disttrain.models import check_model_name
    from disttrain.nvml import visible_gpus
    from disttrain.parallel import usable_cores
    from disttrain.preflight import check_device, open_index, split_batch

    config = Config.model_validate(DEFAULT) if config_path is None else load_config(config_path, overrides)
    check_model_name(config.model.name)
    cores = usable_cores()
    visible = [] if procs else visible_gpus()
    device, processes, chosen, threads = plan_processes(
        gpus=gpus, procs=procs, visible=visible, cores=cores, environ=os.environ
    )
    plan = LaunchPlan(
        config_path=Path(),
        overrides=(),
        run_dir=Path(),
        resume="never",
        device=device,
        processes=processes,
        gpus=chosen,
        threads=threads,
    )
    check_device(config, device)
    split_batch(config, plan.world_size)
    open_index(config, lambda text: click.echo(text, err=True))
    results = measure(config, plan, seconds=seconds, cores=cores, say=lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    console = Console(highlight=False)
    for table in tables(results):
        console.print(table)
        console.print()
    for line in summary(results):
        click.echo(line)


@main.command()
@click.argument("run_dir", metavar="[RUN]", type=_PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, once.")
def top(run_dir: Path | None, as_json: bool) -> None:
    """Show every GPU of a run, live, or the GPUs of this node.

    RUN is a run folder; it is only read, and may be that of a run that has ended. Ends with Ctrl-C. Where
    there is no terminal all is shown once.
    """
    from disttrain.top import show

    show(run_dir, as_json=as_json)


@main.command()
@click.argument("checks", metavar="[CHECK]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(checks: tuple[str, ...], as_json: bool) -> None:
    """Show what works on this machine and what does not, each with its remedy.

    CHECK chooses some of: packages, driver, gpus, machine, disk, clock, network, slurm, data, allreduce,
    step. Ends with 1 if there is a failure; a warning is none.
    """
    import json

    from disttrain.doctor import examine, report

    found = []
    for name, finding in examine(checks):
        found.append({"check": name, **finding._asdict()})
        if not as_json:
            click.echo(report(finding))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    sys.exit(any(finding["status"] == "failure" for finding in found))


_RUN = click.argument("run_path", metavar="RUN", type=_PATH)
_CHECKPOINT = click.option(
    "--checkpoint", default="best", show_default=True, metavar="best|latest|PATH", help="Which weights."
)


@main.command("eval")
@_RUN
@_CHECKPOINT
@click.option("--data", metavar="NAME", help="Another data set with the same classes.")
@_ROOT
@click.option("--gpus", type=click.IntRange(1), help="GPUs to use (default: all visible).")
@click.option("--procs", type=click.IntRange(1), help="Processes without GPUs (default: 1).")
@click.option(
    "--tta",
    type=click.Choice(["none", "flip", "multi_view"]),
    default="none",
    show_default=True,
    help="Test-time augmentation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval_(
    run_path: Path,
    checkpoint: str,
    data: str | None,
    root: str | None,
    gpus: int | None,
    procs: int | None,
    tta: Literal["none", "flip", "multi_view"],
    as_json: bool,
) -> None:
    """Evaluate the network of a run on a validation split.

    Shows accuracy, loss, the accuracy of each class and the confusion matrix. Every sample counts exactly
    once, on any number of processes.
    """
    import json

    from disttrain.eval import evaluate, report

    result = evaluate(run_path, checkpoint, data=data, root=root, tta=tta, gpus=gpus, procs=procs)
    for line in [json.dumps(result)] if as_json else report(result):
        click.echo(line)


@main.command()
@_RUN
@click.argument("images", metavar="IMAGE|FOLDER|-...", nargs=-1, required=True)
@_CHECKPOINT
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes for each image.")
@click.option("--grid", type=_PATH, metavar="FILE.png", help="Also draw the images with their predictions.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document on each line.")
def predict(
    run_path: Path, images: tuple[str, ...], checkpoint: str, top: int, grid: Path | None, as_json: bool
) -> None:
    """Show what the network of a run takes images for.

    RUN may also be a file of `disttrain export --format safetensors`. A FOLDER stands for all image files
    below it; `-` reads names from standard input, one on each line, or separated by NUL as `find -print0`
    prints them. A file that cannot be used is named on standard error; the others go on, and the end is 65.
    """
    from disttrain.predict_command import predict as show

    with _progress(disable=sys.stdout.isatty()) as on_progress:
        show(
            run_path,
            images,
            checkpoint,
            top=top,
            grid=grid,
            as_json=as_json,
            on_progress=on_progress,
        )


@main.command()
@_RUN
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "torch-export", "onnx"]),
    required=True,
    help="Of the file.",
)
@click.option("--output", type=_PATH, metavar="FILE", help="Default: RUN/export/FORMAT/model.*")
@_CHECKPOINT
@_ROOT
def export(
    run_path: Path,
    file_format: Literal["safetensors", "torch-export", "onnx"],
    output: Path | None,
    checkpoint: str,
    root: str | None,
) -> None:
    """Write the network of a run as a file for other programs.

    The file is checked against the network on images of the validation split; a model card, README.md, is
    written beside it.
    """
    from disttrain.exporting import export

    done = export(run_path, file_format, output, checkpoint=checkpoint, root=root)
    click.echo(f"{done.path}: largest difference of a score {done.difference:.3g} on {done.images} images")


_RUNS = click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_PATH)
_TARGET = click.option(
    "--target",
    type=click.FloatRange(0, 100),
    metavar="PCT",
    help="Accuracy to which a comparison gives times (default: the best that all runs reached).",
)
_PAGE = click.option(
    "--output",
    type=_PATH,
    help="The page to write (default: RUN/report.html; of a comparison ./comparison.html).",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")


@main.command()
@_RUNS
@_PAGE
@_TARGET
@_JSON
def report(runs: tuple[Path, ...], output: Path | None, target: float | None, as_json: bool) -> None:
    """Write a run's report as one HTML file that needs no network; of several runs, their comparison.

    Works while a run goes on and after it has failed. The best checkpoint and the data set are looked into
    if they are there.
    """
    if len(runs) > 1:
        _compare(runs, output, target, as_json)
        return
    from disttrain.report.page import write_report

    click.echo(write_report(runs[0], output))


@main.command()
@_RUNS
@_PAGE
@_TARGET
@_JSON
def compare(runs: tuple[Path, ...], output: Path | None, target: float | None, as_json: bool) -> None:
    """Compare runs: a table here, curves over one another and all that differs in an HTML file."""
    _compare(runs, output, target, as_json)


def _compare(runs: tuple[Path, ...], output: Path | None, target: float | None, as_json: bool) -> None:
    import json

    from rich.console import Console

    from disttrain.report import compare

    comparison = compare.compare(runs, None if target is None else target / 100)
    page = compare.write_comparison(comparison, output or Path("comparison.html"))
    if as_json:
        click.echo(json.dumps(compare.to_json(comparison), indent=1))
        return
    Console(highlight=False).print(compare.table(comparison))
    for contrast in comparison.contrasts:
        click.echo(f"{contrast.second} against {contrast.first}: {contrast.verdict}")
    click.echo(page)


@main.group()
def config() -> None:
    """About the config file."""


@config.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    import json

    from disttrain.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
def models() -> None:
    """List the models: name, parameters with their usual input, source."""
    from disttrain.models import CATALOG, build_model, parameter_count

    for name, entry in CATALOG.items():
        channels, height, width = entry.input_shape
        model = build_model(name, num_classes=10, in_channels=channels, image_size=(height, width), args={})
        size = f"{channels}x{height}x{width}"
        click.echo(f"{name:<18} {parameter_count(model):>12,}  {size:<9}  {entry.source}")
    click.echo("torchvision:NAME and package.module:Class work too")


def _show_index(index: Index, *, classes: bool = False) -> None:
    click.echo(f"{index.name}: {index.base or index.folder}")
    click.echo(f"images   {index.channels} x {index.height} x {index.width}, {len(index.classes)} classes")
    for label, values in (("mean", index.mean), ("std", index.std)):
        click.echo(f"{label:<8} {' '.join(f'{value:.4f}' for value in values)}")
    for name, split in index.splits.items():
        mib = sum(shard.bytes for shard in split.shards) / 2**20
        shards = f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}"
        click.echo(f"{name:<8} {split.samples:,} samples in {shards}, {mib:,.1f} MiB")
    if classes:
        width = max(5, *(len(name) for name in index.classes))
        click.echo(f"{'class':<{width}} " + " ".join(f"{name:>10}" for name in index.splits))
        for number, name in enumerate(index.classes):
            counts = (split.class_counts[number] for split in index.splits.values())
            click.echo(f"{name:<{width}} " + " ".join(f"{count:>10,}" for count in counts))


@contextlib.contextmanager
def _progress(*, disable: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a bar, a count of images and the time left on a terminal, nothing elsewhere or if disabled."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed:,} images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe is not for the console
        disable=disable or not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
