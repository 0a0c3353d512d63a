"""Reads the labels of image files from a table: a CSV file with a row for each file.

    file,labels            file,split,cat,dog
    a/1.jpg,cat dog        a/1.jpg,train,1,1
    a/2.jpg,               a/2.jpg,val,0,0

`read_table` says what the columns may be.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards.foldertree import SUFFIXES, VAL_NAMES, Files, LeftOut, Listing
from disttrain.shards.label_format import Label, is_name, number_of

_SPLIT = "split"
_SEPARATORS = "|;,"
_LAYOUT = "expected a first line such as file,labels, then a line for each image file"


@dataclass
class _Row:
    """What the table says of one file.

    Attributes:
        line: of the table, the first with this file.
        split: train, val or an empty string.
        labels: names of its classes.
    """

    line: int
    split: str
    labels: set[str] = field(default_factory=set)


def read_table(
    table: Path, folder: Path, val_fraction: float | None, multi_label: bool, follow_links: bool = False
) -> Listing:
    """Lists the images of a table with their labels.

    The first column has the files, relative to the folder; the suffix may be missing. A column `split` has
    train or val. If one other column is left, it has the name of the label. In multi-label data it has any
    number of names, separated by |, ; or comma, or if none of these is in the column by spaces. If several
    columns are left, each is a class, with 1 or 0. The labels of several rows of one file add up.

    Args:
        table: a CSV file.
        folder: folder of the images.
        val_fraction: given if the val split is taken from train.
        multi_label: a file has any number of labels, instead of one.
        follow_links: take links to files outside the folder.

    Raises:
        DataError: the table is damaged, or a file of it is missing or has not one label.
        UnsafeError: a file is outside the folder.
        UsageError: there is a val split, and a fraction too.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the images")
    classes, rows = _rows(table, multi_label)
    splits = _splits(table, rows, val_fraction)
    numbers = {name: number for number, name in enumerate(classes)}
    files: dict[str, Files] = {split: [] for split in dict.fromkeys(splits.values())}
    seen: dict[str, int] = {}
    for name, row in rows.items():
        path = _existing(table, row, folder, name, follow_links)
        if (before := seen.setdefault(path, row.line)) != row.line:
            raise DataError(
                f"{table}, line {row.line}: {name} is the file of line {before}; remove one of them"
            )
        files[splits[name]].append((path, _label(table, name, row, numbers, multi_label)))
    for found in files.values():
        found.sort(key=lambda item: (isinstance(item[1], int) and item[1], item[0]))
    files = {split: files[split] for split in ("train", "val") if split in files}
    return Listing(classes, files, _left_out(folder, seen))


def _rows(table: Path, multi_label: bool) -> tuple[tuple[str, ...], dict[str, _Row]]:
    """Returns the names of the classes, and what the table says of each file."""
    lines = _lines(table)
    (_, header), lines = lines[0], lines[1:]
    names = [name.strip() for name in header]
    split_at = next((at for at, name in enumerate(names) if at and name.lower() == _SPLIT), None)
    label_at = [at for at in range(1, len(names)) if at != split_at]
    if not label_at:
        raise DataError(f"{table}: has no column with labels; {_LAYOUT}")
    if double := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise DataError(f"{table}: two columns are named {double!r}; rename one")
    text = "".join(cells[label_at[0]] for _, cells in lines if len(cells) == len(names))
    separator = next((one for one in _SEPARATORS if one in text), None)
    rows: dict[str, _Row] = {}
    for line, cells in lines:
        where = f"{table}, line {line}"
        if len(cells) != len(names) or not cells[0].strip():
            raise DataError(f"{where}: expected {len(names)} cells, the first a file; found {cells!r:.80}")
        split = "" if split_at is None else _split_name(where, cells[split_at])
        row = rows.setdefault(cells[0].strip(), _Row(line, split))
        if row.split != split:
            raise DataError(f"{where}: {cells[0]} is in another split in line {row.line}; remove one of them")
        if len(label_at) > 1:
            row.labels |= {names[at] for at in label_at if _is_set(where, names[at], cells[at])}
        else:
            # One label may have spaces or a comma in its name.
            cell, one = cells[label_at[0]], not multi_label and separator in (None, ",")
            row.labels |= {
                name.strip() for name in ([cell] if one else cell.split(separator)) if name.strip()
            }
    classes = _in_order(set[str]().union(*(row.labels for row in rows.values())))
    if not classes:
        raise DataError(f"{table}: no file has a label; {_LAYOUT}")
    classes = tuple(names[at] for at in label_at) if len(label_at) > 1 else classes
    if wrong := next((name for name in classes if not is_name(name)), None):
        raise DataError(
            f"{table}: {wrong!r:.80} cannot be the name of a label; shorten it, or remove line breaks"
        )
    return classes, rows


def _lines(table: Path) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of each line that is not empty, with the first one."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as CSV: {error}; {_LAYOUT}") from None
    if len(lines) < 2:
        raise DataError(f"{table}: names no files; {_LAYOUT}")
    return lines


def _split_name(where: str, text: str) -> str:
    name = text.strip().lower()
    if name in ("train", "training"):
        return "train"
    if name in VAL_NAMES:
        return "val"
    raise DataError(f"{where}: the split is {text!r}; expected train or val")


def _is_set(where: str, name: str, text: str) -> bool:
    number = text.strip()
    if re.fullmatch(r"[01](\.0*)?", number):
        return number[0] == "1"
    raise DataError(f"{where}: {text!r} in the column {name}; expected 1 if the image has this label, or 0")


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names in the order of the alphabet, or of their numbers if all are numbers."""
    found = sorted(names)
    if all(number_of(name) is not None for name in found):
        found.sort(key=lambda name: number_of(name) or 0)
    return tuple(found)


def _splits(table: Path, rows: dict[str, _Row], val_fraction: float | None) -> dict[str, str]:
    """Returns the split of each file: from the column, else from its first folder, else train."""
    splits = {name: row.split for name, row in rows.items()}
    if not all(splits.values()):
        tops = {name: name.partition("/")[0].lower() for name in rows}
        if set(tops.values()) <= {"train", *VAL_NAMES} and "train" in tops.values():
            splits = {name: "train" if top == "train" else "val" for name, top in tops.items()}
        else:
            splits = dict.fromkeys(rows, "train")
    if "train" not in splits.values():
        raise DataError(f"{table}: no file is in the train split; name it train in the column {_SPLIT}")
    if "val" not in splits.values() and val_fraction is None:
        raise DataError(
            f"{table}: no file is in the val split; add a column {_SPLIT} with train and val, or use "
            "--val-fraction"
        )
    if "val" in splits.values() and val_fraction is not None:
        raise UsageError(f"{table}: has a val split already; leave out --val-fraction")
    return splits


def _existing(table: Path, row: _Row, folder: Path, name: str, follow_links: bool) -> str:
    """Returns the path of a file of the table.

    Raises:
        DataError: there is no such file.
        UnsafeError: it is outside the folder.
    """
    where = f"{table}, line {row.line}"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnsafeError(f"{where}: {name} leaves {folder}; give names relative to it")
    names = [name, *(f"{name}{suffix}" for suffix in SUFFIXES)]
    path = next((path for path in map(folder.joinpath, names) if path.is_file()), None)
    if path is None:
        raise DataError(f"{where}: there is no file {folder / name}; add it, or remove it from the table")
    if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafeError(
            f"{where}: the link {path} leaves {folder}; take what it leads to with --follow-links"
        )
    return str(path)


def _label(table: Path, name: str, row: _Row, numbers: dict[str, int], multi_label: bool) -> Label:
    labels = tuple(sorted(numbers[label] for label in row.labels))
    if multi_label:
        return labels
    if len(labels) != 1:
        several = "; use --multi-label, or give it one" if labels else "; give it one, or use --multi-label"
        found = f"has {len(labels)} labels" if labels else "has no label"
        raise DataError(f"{table}, line {row.line}: {name} {found}{several}")
    return labels[0]


def _left_out(folder: Path, taken: Container[str]) -> list[str]:
    """Returns a line on the image files that the table does not name, if there are some."""
    left_out = LeftOut()
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = f"{place}/{name}"
            if name.lower().endswith(SUFFIXES) and path not in taken:
                left_out.add("image that the table does not name", path)
    return left_out.lines()
