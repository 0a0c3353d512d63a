"""`disttrain data`: make, check and measure data sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disttrain.cli.shared import COUNT, JSON, PATH, POSITIVE, ROOT, progress
from disttrain.terminal import columns, fitted, width_of
from disttrain.units import mib

if TYPE_CHECKING:
    from disttrain.shards.index import Index
    from disttrain.shards.pack import Options


@click.group()
def data() -> None:
    """Make, check and measure data sets."""


def _check_local(folder: Path, command: str) -> None:
    """Raises UsageError if the argument of a command is a URL, whose slashes a path does not keep."""
    from disttrain.errors import UsageError
    from disttrain.shards.stores import how_to_copy
    from disttrain.urls import is_http, is_url, without_secrets

    scheme, colon, rest = str(folder).partition(":/")
    url = without_secrets(f"{scheme}://{rest.lstrip('/')}")
    if not colon or not is_url(url):
        return
    download, upload, root = "download it", "Put what it makes on the server", "https://host/folder"
    if not is_http(url):
        get, put, root = how_to_copy(url)
        download, upload = f"download it (`{get}`)", f"Upload what it makes (`{put}`)"
    raise UsageError(
        f"{url}: is on a server, but `data {command}` needs a folder on this machine; "
        f"{download} and run the command there. {upload}, and train with data.root={root}"
    )


_CLASSES = 40  # most classes that `inspect` lists on a terminal
_FORCE = click.option("--force", is_flag=True, help="Replace an existing data set.")


@data.command()
@click.argument("name", metavar="digits|mnist|cifar10")
@click.option("--source", type=PATH, help="Folder of the original files, instead of a download.")
@ROOT
@_FORCE
def prepare(name: str, source: Path | None, root: str | None, force: bool) -> None:
    """Make a well-known data set. Downloads the original files unless --source is given."""
    from disttrain.shards import datasets

    _make(lambda options: datasets.prepare(name, source, root, options), force=force)


@data.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--name", required=True, help="Name of the new data set.")
@click.option("--size", type=COUNT, help="Resize and crop every image to SIZE x SIZE pixels.")
@click.option(
    "--val-fraction",
    type=float,
    help="Fraction of each class for the val split, if DIR has no val folder.",
)
@click.option("--labels", type=PATH, metavar="FILE.csv", help="Table of the images and their labels.")
@click.option("--multi-label", is_flag=True, help="An image of --labels may have any number of labels.")
@click.option("--skip", is_flag=True, help="Leave out broken images, instead of making no data set.")
@click.option("--follow-links", is_flag=True, help="Take links to files and folders outside DIR.")
@click.option("--seed", type=int, default=0, help="Seed of the sample order and of the split.")
@click.option("--shard-mib", type=POSITIVE, default=64, help="Size of a shard in MiB.")
@click.option("--procs", "processes", type=COUNT, help="Packing processes (default: one per core).")
@ROOT
@_FORCE
def pack(
    folder: Path,
    name: str,
    root: str | None,
    force: bool,
    shard_mib: float,
    processes: int | None,
    skip: bool,
    **images: Any,
) -> None:
    """Make a data set of your own images.

    DIR holds train/<class>/<images> and val/<class>/<images> (or valid, validation, dev or test). With
    --val-fraction it may also hold <class>/<images>. --labels takes the labels from a table instead: a column
    of files, then a column of labels, or one column with 0 or 1 for each class (docs/data.md). After an
    interruption, run the same command again: finished shards are kept.
    """
    from disttrain.shards.imagefolder import pack_folder

    _check_local(folder, "pack")
    how = {"force": force, "shard_mib": shard_mib, "processes": processes, "skip": skip}
    _make(lambda options: pack_folder(folder, name, root, options, **images), **how)


def _make(function: Callable[[Options], Index], **how: Any) -> Index:
    """Makes a data set while showing progress, then prints its index."""
    from disttrain.shards.pack import Options

    with progress() as on_progress:
        index = function(Options(**how, say=click.echo, on_progress=on_progress))
    _show_index(index)
    return index


@data.command()
@click.argument("name")
@ROOT
def inspect(name: str, root: str | None) -> None:
    """Show the classes, splits and shards of a data set."""
    from disttrain.shards.index import load_index

    _show_index(load_index(name, root), classes=True)


@data.command()
@click.argument("name")
@ROOT
def verify(name: str, root: str | None) -> None:
    """Check every sample of a data set.

    Reads and decodes all samples and compares them with the index. If any shard or sample is bad, lists them
    and exits with 65.
    """
    from disttrain.errors import DataError
    from disttrain.shards.index import load_index, remedy
    from disttrain.shards.verify import verify

    index = load_index(name, root, strict=False)
    with progress() as on_progress:
        problems = verify(index, on_progress=on_progress)
    for problem in problems:
        sample = f"sample {problem.key}: " if problem.key else ""
        click.echo(f"{problem.place}: {sample}{problem.text}")
    if problems:
        count = f"{len(problems):,} problem{'s' * (len(problems) > 1)}"
        raise DataError(f"{name}: {count}; {remedy(index)}, or train without them with data.on_error=skip")
    samples = sum(split.samples for split in index.splits.values())
    shards = sum(len(split.shards) for split in index.splits.values())
    click.echo(f"{name}: {samples:,} samples in {shards} shard{'s' * (shards > 1)} match the index")


@data.command("index")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--train",
    multiple=True,
    metavar="PATTERN",
    help="Tars of the train split, such as 'a-{000..146}.tar' (default: train*.tar).",
)
@click.option(
    "--val", multiple=True, metavar="PATTERN", help="Tars of the val split (default: val*.tar or test*.tar)."
)
@click.option("--classes", type=PATH, help="File with one class name per line, in label order.")
@click.option(
    "--label",
    metavar="cls|txt|json:FIELD",
    help="Where the label is: in KEY.cls, KEY.txt, or a field of KEY.json (default: cls, else txt).",
)
@click.option("--multi-label", is_flag=True, help="A sample may have any number of labels.")
@click.option("--skip", is_flag=True, help="Accept tars with unusable samples.")
@click.option("--name", help="Name of a data set that gets the index, beside links to the tars.")
@ROOT
@_FORCE
def index_(
    folder: Path,
    classes: Path | None,
    label: str | None,
    multi_label: bool,
    skip: bool,
    name: str | None,
    root: str | None,
    force: bool,
    **patterns: Sequence[str],
) -> None:
    """Index WebDataset tars that you already have.

    Writes DIR/index.json and changes nothing else. If DIR cannot be written, --name and --root put the index
    elsewhere, beside links to the tars. Each sample needs an image (png, jpg or webp) and a label:
    the number or the name of its class, or with --multi-label a list of them.
    """
    from disttrain.errors import UsageError
    from disttrain.shards.elsewhere import index_tars
    from disttrain.shards.existing_tars import Labels
    from disttrain.shards.label_format import parse_place

    _check_local(folder, "index")
    names = None
    if classes is not None:
        try:
            names = classes.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {classes}: cannot be read: {error}") from None
        names = [name.strip() for name in names if name.strip()]
    place = parse_place(label) if label else None
    labels = Labels(classes=names, label=place, multi_label=multi_label, skip_unusable=skip)
    index = _make(lambda options: index_tars(folder, name, root, patterns, options, **labels), force=force)
    click.echo(f"train on it with data.name={index.name} data.root={index.folder.parent}")


@data.command("bench")
@click.argument("name")
@ROOT
@click.option("--samples", type=COUNT, default=20000, help="Samples for each stage.")
@click.option("--batch-size", type=COUNT, default=512, help="Samples per batch.")
@click.option("--threads", type=COUNT, help="Threads for decoding and augmentation (default: all cores).")
@click.option("--image-size", type=COUNT, help="Crop images of any size, like data.image_size.")
@JSON
def bench_(
    name: str,
    root: str | None,
    samples: int,
    batch_size: int,
    threads: int | None,
    image_size: int | None,
    as_json: bool,
) -> None:
    """Measure how fast this machine serves a data set.

    Times reading, decoding, caching, batching and augmentation. The last line shows the plain webdataset
    pipeline on the same shards, for comparison.
    """
    from disttrain.bench.data_bench import bench
    from disttrain.errors import UsageError
    from disttrain.shards.index import load_index

    stages = []
    if not as_json:
        click.echo(f"{'stage':<17} {'samples/s':>12} {'us/sample':>10}  work")
    index = load_index(name, root)
    if index.stored_height is None and image_size is None:
        raise UsageError(f"{name}: its images have several sizes, {index.sizes_text()}; give --image-size")
    index = index.cropped(image_size, index.crop_pct)
    for stage in bench(index, samples=samples, batch_size=batch_size, threads=threads):
        stages.append(stage._asdict() | {"samples_per_s": stage.samples_per_s})
        if not as_json:
            us = 1e6 / stage.samples_per_s
            click.echo(f"{stage.name:<17} {stage.samples_per_s:>12,.0f} {us:>10,.2f}  {stage.what}")
    if as_json:
        click.echo(json.dumps(stages, indent=1))


def _histogram(sides: Sequence[int]) -> Iterator[str]:
    """Yields a line for each bin of the shorter sides that is not empty."""
    from disttrain.shards.index_file import SIDE_BINS

    most = max(sides)
    for count, below, above in zip(sides, (0, *SIDE_BINS), (*SIDE_BINS, None), strict=True):
        if count:
            where = f"{below + 1:,} to {above:,}" if above else f"over {below:,}"
            bar = "#" * max(1, round(30 * count / most))
            yield f"shorter side {where:>14}: {count:>9,} {bar}"


def _show_index(index: Index, *, classes: bool = False) -> None:
    click.echo(f"{index.name}: {index.base or index.folder}")
    if index.stored_height is not None:
        size = f"{index.channels} x {index.stored_height} x {index.stored_width}"
    else:
        size = f"{'RGB' if index.channels == 3 else 'gray'}, {index.sizes_text()} pixels"
    click.echo(f"images   {size}, {len(index.classes)} {'labels' if index.multi_label else 'classes'}")
    for label, values in (("mean", index.mean), ("std", index.std)):
        click.echo(f"{label:<8} {' '.join(f'{value:.4f}' for value in values)}")
    for name, split in index.splits.items():
        size = mib(sum(shard.bytes for shard in split.shards), 1)
        shards = f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}"
        click.echo(f"{name:<8} {split.samples:,} samples in {shards}, {size}")
    if index.multi_label:
        means = (f"{sum(s.class_counts) / s.samples:.2f} in {name}" for name, s in index.splits.items())
        click.echo(f"labels   {', '.join(means)} for each image on average")
    for name, split in index.splits.items():
        if split.sizes is not None:
            for line in _histogram(split.sizes.sides):
                click.echo(f"{name:<8} {line}")
    if index.stored_height is None:
        click.echo("train on it with data.image_size, for example data.image_size=224")
    if classes:
        for line in _class_lines(index, columns(sys.stdout)):
            click.echo(line)


def _class_lines(index: Index, width: int | None) -> Iterator[str]:
    """Yields the samples of each class; on a terminal of this width only some if there are many classes."""
    labels = list(range(len(index.classes)))
    if width is not None and len(labels) > _CLASSES:
        counts, shown = index.splits["train"].class_counts, _CLASSES // 4
        labels.sort(key=lambda label: counts[label])
        yield f"the {shown} smallest and largest of {len(labels):,} classes in train (a pipe gets all)"
        labels = labels[:shown] + labels[-shown:]
    longest = max(5, *(width_of(index.classes[label]) for label in labels))
    room = longest if width is None else max(12, width - 11 * len(index.splits))
    yield f"{'class':<{min(longest, room)}} " + " ".join(f"{name:>10}" for name in index.splits)
    for label in labels:
        found = (split.class_counts[label] for split in index.splits.values())
        name = fitted(index.classes[label], min(longest, room))
        yield f"{name} " + " ".join(f"{count:>10,}" for count in found)
