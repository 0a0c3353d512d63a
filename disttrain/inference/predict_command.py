"""The output of `disttrain predict`: a line for each image, as a table or as JSON.

torch is imported only after the arguments have been checked, so that a mistake is reported at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from disttrain.errors import DataError
from disttrain.host_memory import keep_freed_memory
from disttrain.inference.prediction_grid import MOST, Cell, check_name, draw, save
from disttrain.inference.run import open_run
from disttrain.shards.foldertree import SUFFIXES, LeftOut, file_kind, shown
from disttrain.shards.images import Pixels
from disttrain.shards.remarks import pillow_warnings
from disttrain.terminal import columns, fitted, printable, width_of
from disttrain.units import percent

if TYPE_CHECKING:
    from disttrain.inference.prediction import Prediction, PredictOptions

_WIDEST = 60  # characters of the column of file names
_NAME = 40  # characters of the column of classes in a file or a pipe; longer names stand out
_LEAST = 24  # characters of a class that should be seen
_SHARE = 10  # characters of a probability
_BETWEEN = "   "  # between the classes of an image


@pillow_warnings()
def predict_files(
    run: Path,
    names: Sequence[str],
    checkpoint: str,
    *,
    grid: Path | None,
    as_json: bool,
    on_progress: Callable[[int, int | None], None],
    **options: Unpack[PredictOptions],
) -> None:
    """Classifies images, prints the predictions and draws the grid; the arguments are those of the command.

    Raises:
        DataError: there are no images, or some are unusable; the others were printed.
        UsageError, CheckpointError: from `open_run` and `check_name`.
    """
    if grid is not None:
        check_name(grid)
    if not run.is_file():
        open_run(run, checkpoint)
    files, left_out = listed(names)
    for note in left_out:
        click.echo(f"disttrain: {note}", err=True)

    from disttrain.inference.classifier import load_model
    from disttrain.inference.prediction import predictions
    from disttrain.training.group import best_device

    keep_freed_memory()
    classifier = load_model(run, checkpoint, device=best_device())
    show: Callable[[Prediction], str] = _json
    if not as_json and classifier.facts.multi_label:
        show = _label_table(files, columns(sys.stdout))
    elif not as_json:
        show = _table(files, classifier.classes, options["top"], columns(sys.stdout))
    cells: list[Cell] = []
    failed = 0
    for number, (prediction, pixels) in enumerate(predictions(classifier, files, **options), 1):
        failed += pixels is None
        if said := prediction.problem or "; ".join(prediction.remarks):
            click.echo(f"disttrain: {shown(prediction.image)}: {said}", err=True)
        if pixels is not None or as_json:
            click.echo(show(prediction))
        if pixels is not None and grid is not None and len(cells) < MOST:
            cells.append(_cell(prediction, pixels, classifier.classes))
        if number % 64 == 0 or number == len(files):
            on_progress(number, len(files))
    if grid is not None and cells:
        save(draw(cells), grid)
        if len(files) - failed > MOST:
            click.echo(f"{grid}: the first {MOST} of {len(files) - failed:,} images", err=True)
    if failed:
        raise DataError(f"{failed:,} of {len(files):,} files could not be used")


def listed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the files that the arguments stand for, and a line for each kind of file left out.

    A folder stands for the image files below it, sorted; - for the file names on standard input.

    Raises:
        DataError: there are none.
    """
    files: list[str] = []
    left_out = LeftOut()
    for name in (name for given in names for name in (_read_names() if given == "-" else [given])):
        if Path(name).is_dir():
            files += _images_below(name, left_out)
        else:
            files.append(name)
    notes = left_out.lines()
    if not files:
        found = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{' '.join(names)}: no image files; give files, or folders with images{found}")
    return files, notes


def _images_below(top: str, left_out: LeftOut) -> Iterator[str]:
    """Yields the image files below a folder, sorted, and counts what is left out."""

    def unreadable(error: OSError) -> None:
        left_out.add("folder that cannot be read", str(error.filename))

    for folder, folders, entries in os.walk(top, onerror=unreadable):
        folders.sort()
        for entry in list(folders):
            path = Path(folder) / entry
            if entry.startswith(".") or path.is_symlink():
                left_out.add("hidden folder" if entry.startswith(".") else "link to a folder", str(path))
                folders.remove(entry)
        for entry in sorted(entries):
            file = str(Path(folder) / entry)
            if entry.startswith("."):
                left_out.add("hidden file", file)
            elif entry.lower().endswith(SUFFIXES):
                yield file
            else:
                left_out.add(file_kind(entry), file)


def _read_names() -> list[str]:
    """Returns the names on standard input, separated by NUL if it contains one, else by newlines."""
    data = sys.stdin.buffer.read()
    separator = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(name) for name in data.split(separator) if name]


def _json(prediction: Prediction) -> str:
    return json.dumps(prediction.as_json())


def _table(
    files: Sequence[str], classes: Sequence[str], top: int, columns: int | None
) -> Callable[[Prediction], str]:
    """Prints the header of a table, and returns a function that formats the rows of an image.

    The classes of an image are in one line if the terminal has room for a good part of their names. A file or
    a pipe has no `columns`, and gets the names whole.
    """
    image, longest = min(_WIDEST, max(map(len, files))), max(5, *map(width_of, classes))
    top = min(top, len(classes))
    name, folded, cut = min(_NAME, longest), False, columns is not None
    if columns is not None:
        room = (columns - image - 2 - len(_BETWEEN) * (top - 1)) // top - _SHARE
        folded = room < min(_LEAST, longest)
        if folded:
            image = min(image, max(2, columns - 2 - _LEAST - _SHARE))
            room = max(5, columns - image - 2 - _SHARE)
        name = min(room, longest)
    click.echo(f"{'image':<{image}}  {'class':<{name}}  probability")
    blank = " " * (image + 2)

    def rows(prediction: Prediction) -> str:
        cells = [f"{fitted(label, name, cut=cut)}  {100 * share:6.2f} %" for label, share in prediction.top]
        file = shown(prediction.image)
        begin = f"{file}\n{blank}" if folded and len(file) > image else f"{file:<{image}}  "
        return begin + (f"\n{blank}" if folded else _BETWEEN).join(cells)

    return rows


def _label_table(files: Sequence[str], columns: int | None) -> Callable[[Prediction], str]:
    """Prints the header of a table of multi-label data, and returns a function that formats its rows."""
    image = min(_WIDEST, max(5, *map(len, files)))
    if columns is not None:
        image = min(image, max(5, columns // 2))
    click.echo(f"{'image':<{image}}  labels")

    def row(prediction: Prediction) -> str:
        labels = prediction.labels or ()
        shares = {label: percent(share) for label, share in prediction.top}
        text = ", ".join(f"{printable(label)} {shares[label]}" for label in labels) or "none"
        file = shown(prediction.image)
        return f"{file}\n{' ' * image}  {text}" if len(file) > image else f"{file:<{image}}  {text}"

    return row


def _cell(prediction: Prediction, pixels: Pixels, classes: Sequence[str]) -> Cell:
    folder = Path(prediction.image).absolute().parent.name
    if prediction.labels is not None:
        return Cell(pixels, ", ".join(prediction.labels) or "none", None, None)
    label, probability = prediction.top[0]
    return Cell(pixels, label, probability, folder if folder in classes else None)
