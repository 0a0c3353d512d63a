"""Writes an index for existing WebDataset tars, without copying them."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from disttrain.errors import DataError, UnsafeError, UsageError, reason
from disttrain.files import write_atomically
from disttrain.parallel import ordered_map, usable_cores
from disttrain.shards.index import Index, data_folder, load_index, parse_index
from disttrain.shards.index_file import (
    SIDE_BINS,
    IndexFile,
    Shard,
    Sizes,
    Split,
    check_index,
    index_bytes,
    one_size,
    sizes_of,
    version_of,
)
from disttrain.shards.label_format import LabelPlace, LabelTexts
from disttrain.shards.labels import (
    check_names,
    check_no_class_lost,
    count_labels,
    count_texts,
    named_classes,
)
from disttrain.shards.pack import Options
from disttrain.shards.photos import read_header
from disttrain.shards.reader import OpenShard
from disttrain.shards.remarks import lines, pillow_warnings
from disttrain.shards.tar import Contents, scan
from disttrain.shards.verify import Findings, double_keys, examine

_MOST_NAMES = 100_000  # of a pattern with braces
_PATTERNS = {
    "train": ("train*.tar", "*train*.tar"),
    "val": ("val*.tar", "*val*.tar", "test*.tar", "*test*.tar"),
}


class Labels(TypedDict, total=False):
    """How the labels of tars are read.

    Attributes:
        classes: names of the classes; None takes those of the index that is replaced, if they fit, or else
            the labels. Labels that are names get numbers in the order of the alphabet.
        label: where the labels are; None means KEY.cls, or else KEY.txt.
        multi_label: a sample has any number of labels.
        skip_unusable: accept bad samples; training then needs data.on_error = skip.
    """

    classes: Sequence[str] | None
    label: LabelPlace | None
    multi_label: bool
    skip_unusable: bool


def index_folder(
    folder: Path, patterns: dict[str, Sequence[str]], options: Options, **labels: Unpack[Labels]
) -> Index:
    """Reads the tars of a folder and writes its index.json; the tars do not change.

    The images may have several sizes. The data set is gray if every image is.

    Args:
        folder: folder of the tars; its name becomes the name of the data set.
        patterns: split -> patterns of the file names; an empty list means the usual ones.
        options: `force`, `say` and `on_progress` are used.
        labels: see `Labels`.

    Raises:
        DataError: a tar is damaged, a sample is bad, or there are no tars.
        UnsafeError: a tar has a member of a forbidden kind.
        UsageError: an argument does not match the folder.
    """
    folder = folder.absolute()
    target = data_folder(folder.name, str(folder.parent)) / "index.json"
    if target.exists() and not options.force:
        raise DataError(f"{target}: already exists; replace it with --force")
    paths, multi_label = _find(folder, patterns), labels.get("multi_label", False)
    shards, place = _with_labels(
        partial(_read_tars, folder, paths, multi_label), labels.get("label"), options.say
    )
    content = _without_statistics(
        folder, shards, place, labels.get("classes"), _old_names(target), multi_label=multi_label
    )
    files: dict[str, str] = {}
    for shard in content.shards:
        if (other := files.setdefault(shard.sha256, shard.file)) != shard.file:
            raise DataError(f"{folder}: {other} and {shard.file} are the same data; remove one of them")
    index = parse_index(index_bytes(content), folder.name, folder)
    for split in index.splits:
        if double := next(double_keys(index, split), None):
            raise DataError(f"{double.place}: sample {double.key}: {double.text}; remove one of them")
    findings = examine(index, tuple(index.splits), on_progress=options.on_progress)
    for line in lines(findings.remarks):
        options.say(line)
    if findings.problems:
        count, first = len(findings.problems), findings.problems[0]
        text = f"{first.place}: sample {first.key}: {first.text}"
        if not labels.get("skip_unusable"):
            raise DataError(f"{text} ({count:,} bad samples); repair it, or skip such samples with --skip")
        options.say(f"{count:,} samples cannot be used, such as {text}; train with data.on_error=skip")
    counts = findings.class_counts
    in_train = sum((tar.texts for tar in shards["train"]), Counter[str]())
    labelled = count_labels(in_train, content.label or LabelPlace(), index.classes)
    check_no_class_lost(folder, labelled, counts["train"].tolist(), index.classes)
    if not findings.usable("train"):
        raise DataError(f"{folder}: no sample of the train split can be used")
    write_atomically(target, index_bytes(_with_statistics(content, findings)))
    return load_index(folder.name, str(folder.parent))


def _with_statistics(content: IndexFile, findings: Findings) -> IndexFile:
    """Returns the index with what is known after all samples were decoded."""
    sizes = {split: findings.all_sizes(split) for split in content.splits}
    known = {
        (height, width) for found in sizes.values() for height, width in np.unique(found, axis=0).tolist()
    }
    height, width = one_size(known)
    splits = {
        split: replace(
            found,
            class_counts=tuple(findings.class_counts[split].tolist()),
            sizes=None if height or not len(sizes[split]) else sizes_of(*sizes[split].T),
        )
        for split, found in content.splits.items()
    }
    if empty := next((split for split, found in splits.items() if not height and found.sizes is None), None):
        raise DataError(f"no sample of the {empty} split can be used")
    mean, std = findings.mean_std()
    version = version_of(height, multi_label=content.multi_label)
    update = {"version": version, "stored_height": height, "stored_width": width, "mean": mean, "std": std}
    return content.model_copy(update=update | {"splits": splits})


class _Tar(NamedTuple):
    """A tar from its headers and labels."""

    shard: Shard
    contents: Contents
    texts: Counter[str]
    """Text of a label -> number of samples."""


_Tars = dict[str, list[_Tar]]
"""Split -> its tars."""


def _with_labels(
    read: Callable[[LabelPlace], _Tars], label: LabelPlace | None, say: Callable[[str], None]
) -> tuple[_Tars, LabelPlace]:
    """Returns the tars with their labels, and where these are; `read` reads them from a place."""
    place = label or LabelPlace()
    shards = read(place)
    if label is None and not _any_label(shards):
        in_text = read(LabelPlace("txt"))
        if _any_label(in_text):
            say("no sample has KEY.cls, so the labels are those in KEY.txt")
            return in_text, LabelPlace("txt")
    return shards, place


def _any_label(shards: _Tars) -> bool:
    return any(tar.texts for tars in shards.values() for tar in tars)


def _old_names(target: Path) -> tuple[str, ...]:
    """Returns the names of the classes in the index that is replaced; none if there is no index to read."""
    try:
        return check_index(target.read_bytes()).classes
    except (OSError, ValueError, UnsafeError):
        return ()


def _without_statistics(
    folder: Path,
    shards: _Tars,
    place: LabelPlace,
    classes: Sequence[str] | None,
    old_names: Sequence[str],
    *,
    multi_label: bool,
) -> IndexFile:
    """Returns the index without statistics, from the headers and labels."""
    texts = sum((tar.texts for tars in shards.values() for tar in tars), Counter[str]())
    if not texts:
        raise _none_usable(folder, shards, "no sample has a label")
    for split, tars in shards.items():  # --skip would leave nothing of it
        if all(len(tar.contents.problems) == len(tar.contents.keys) for tar in tars):
            raise _none_usable(folder, {split: tars}, f"no sample of the {split} split can be used")
    place, names = named_classes(folder, place, texts, classes)
    fits = set(names) <= set(old_names) if place.named else len(names) <= len(old_names)
    if classes is None and fits:
        names = tuple(old_names)
    check_names(folder, count_labels(texts, place, names), names)
    with pillow_warnings():  # they come again when all samples are decoded
        sizes, channels = _formats(folder, shards)
    height, width = one_size(sizes)
    spread = None if height else _spread(sizes)
    return IndexFile(
        version=version_of(height, multi_label=multi_label),
        classes=names,
        channels=channels,
        height=height,
        width=width,
        mean=(0.0,) * channels,
        std=(0.0,) * channels,
        splits={
            split: Split(
                sum(tar.shard.samples for tar in tars),
                tuple(tar.shard for tar in tars),
                (0,) * len(names),
                spread,
            )
            for split, tars in shards.items()
        },
        label=None if place == LabelPlace() else place,
    )


def _none_usable(folder: Path, shards: _Tars, what: str) -> DataError:
    """Returns the error for tars of which no sample can be used, with the reason from their headers."""
    problems = [
        (problem, f"{folder / tar.shard.file}: sample {tar.contents.keys[position]}: {problem}")
        for tars in shards.values()
        for tar in tars
        for position, problem in tar.contents.problems.items()
    ]
    if not problems:
        return DataError(f"{folder}: {what}")
    # Of members in a wrong order, the first sample only seems to have no label.
    twice = next((text for problem, text in problems if "occurs twice" in problem), "")
    return DataError(
        f"{twice or problems[0][1]} ({what}); KEY.cls, which holds the number or the name of the class, must "
        "follow or precede KEY's image directly; make the tars so, or name another member with --label: txt "
        "or json:FIELD"
    )


def _find(folder: Path, patterns: dict[str, Sequence[str]]) -> dict[str, list[Path]]:
    """Returns the tars of every split, sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files: dict[str, list[Path]] = {}
    for split, given in patterns.items():
        for pattern in given or _PATTERNS[split]:
            found = _matching(folder, split, pattern)
            files.setdefault(split, []).extend(path for path in found if path not in files[split])
            if found and not given:
                break
        if not files[split]:
            what = ", ".join(given or _PATTERNS[split])
            raise DataError(f"{folder}: no tars match {what}; give those of {split} with --{split} PATTERN")
    named = {path for paths in files.values() for path in paths}
    if other := next((path for path in sorted(folder.glob("*.tar")) if path not in named), None):
        raise DataError(f"{other}: belongs to no split; move it away, or give --train and --val PATTERN")
    if both := set(files["train"]) & set(files["val"]):
        raise UsageError(f"{min(both)}: belongs to both train and val; give --train and --val PATTERN")
    return files


def _matching(folder: Path, split: str, pattern: str) -> list[Path]:
    """Returns the files that match a pattern such as `train-*.tar` or `train-{000..146}.tar`, sorted."""
    from braceexpand import braceexpand

    ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MOST_NAMES:
        raise UsageError(f"--{split} {pattern}: names more than {_MOST_NAMES:,} tars; use * instead")
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UsageError(f"--{split} {pattern}: {str(error).lower()}; close them") from None
    found = set[Path]()
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UnsafeError(f"--{split} {pattern}: leaves the folder; move the tars into it")
        paths = set(folder.glob(name))
        if not paths and len(names) > 1:
            raise DataError(f"{folder}: {name} is missing, which --{split} {pattern} names; get it")
        found |= paths
    return sorted(found)


def _read_tars(folder: Path, paths: dict[str, list[Path]], multi_label: bool, place: LabelPlace) -> _Tars:
    read = partial(_read_tar, folder, place, multi_label)
    return {split: list(ordered_map(read, found, usable_cores())) for split, found in paths.items()}


def _read_tar(folder: Path, place: LabelPlace, multi_label: bool, path: Path) -> _Tar:
    labels = LabelTexts(place, multi_label=multi_label)
    try:
        if not path.is_file():
            raise ValueError("is not a file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            contents = scan(file, labels)
            size = os.fstat(file.fileno()).st_size
    except UnsafeError as error:
        raise UnsafeError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason(error)}; get or make it again") from None
    shard = Shard(path.relative_to(folder).as_posix(), len(contents.keys), size, digest)
    return _Tar(shard, contents, count_texts(contents, labels.texts))


def _spread(sizes: set[tuple[int, int]]) -> Sizes:
    """Returns the range of the sizes, without the number of images of each."""
    heights, widths = zip(*sizes, strict=True)
    none = (0,) * (len(SIDE_BINS) + 1)
    return Sizes((min(heights), max(heights)), (min(widths), max(widths)), none)


def _formats(folder: Path, shards: _Tars) -> tuple[set[tuple[int, int]], Literal[1, 3]]:
    """Returns height and width of every size of image, and 1 channel if all images are gray, else 3."""
    tars = [tar for of_split in shards.values() for tar in of_split]
    found = list(ordered_map(partial(_formats_of, folder), tars, usable_cores()))
    sizes = set[tuple[int, int]]().union(*(sizes for sizes, _ in found))
    if not sizes:
        raise _none_usable(folder, shards, "no tar has an image that can be decoded")
    return sizes, 1 if all(gray for _, gray in found) else 3


def _formats_of(folder: Path, tar: _Tar) -> tuple[set[tuple[int, int]], bool]:
    """Returns height and width of every size of image in a tar, and whether all its images are gray."""
    descriptor = os.open(folder / tar.shard.file, os.O_RDONLY | os.O_CLOEXEC)
    shard = OpenShard(tar.shard.file, descriptor, tar.contents)
    sizes: set[tuple[int, int]] = set()
    gray = True
    for position in range(len(tar.contents.keys)):
        try:
            header = read_header(shard.read(position))
        except ValueError:
            continue  # reported when all samples are decoded
        sizes.add((header.height, header.width))
        gray = gray and header.gray
    return sizes, gray
