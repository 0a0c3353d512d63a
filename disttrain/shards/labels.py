"""Finds the labels of tars of other tools: where they are, and whether they fit the names of the classes.

A whole class is never left out as bad samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from disttrain.errors import DataError
from disttrain.shards.label_format import LabelPlace, number_of
from disttrain.shards.tar import Contents

_MANY_NAMES = 1000


def count_texts(contents: Contents, texts: Iterable[str]) -> Counter[str]:
    """Returns text -> number of samples, of a tar whose labels `LabelTexts` has read."""
    known = contents.labels[contents.labels >= 0]
    counts = zip(texts, np.bincount(known).tolist(), strict=False)
    return Counter({text: count for text, count in counts if count})


def named_classes(
    folder: Path, place: LabelPlace, texts: Counter[str], classes: Sequence[str] | None
) -> tuple[LabelPlace, tuple[str, ...]]:
    """Decides whether labels are numbers or names, and returns their place and the names of the classes.

    They are names if none is a number, or if one that is no number is in `classes`: a label that is no number
    among numbers is a mistake.

    Args:
        folder: folder of the tars, for the message.
        place: where the labels are.
        texts: text of a label -> number of samples.
        classes: names of the classes, if they are known.

    Raises:
        DataError: a name is not in `classes`, or nearly every sample has a label of its own.
    """
    numbers = [number for text in texts if (number := number_of(text)) is not None]
    others = [text for text in texts if number_of(text) is None]
    if numbers and not (classes and set(others) & set(classes)):
        return place, tuple(classes or (str(label) for label in range(max(numbers) + 1)))
    if classes is None and len(texts) > _MANY_NAMES and 2 * len(texts) >= sum(texts.values()):
        raise DataError(
            f"{folder}: {len(texts):,} different labels in {place} for {sum(texts.values()):,} samples, such "
            f"as {min(texts)!r:.60}, so these are no classes; name another member with --label"
        )
    unknown = {text: count for text, count in texts.items() if classes and text not in classes}
    if unknown and (max(unknown.values()) > 1 or len(unknown) == len(texts)):
        text, count = max(unknown.items(), key=lambda item: item[1])
        raise DataError(
            f"{folder}: {count:,} samples have the label {text!r}, which is not one of the "
            f"{len(classes or ())} names; add the missing names to the file of --classes"
        )
    return replace(place, named=True), tuple(classes or sorted(texts))


def count_labels(texts: Counter[str], place: LabelPlace, names: Sequence[str]) -> Counter[int]:
    """Returns label -> number of samples; texts that are no label are left out."""
    labels = Counter[int]()
    numbers = {name: label for label, name in enumerate(names)}
    for text, count in texts.items():
        label = numbers.get(text) if place.named else number_of(text)
        if label is not None:
            labels[label] += count
    return labels


def check_names(folder: Path, labels: Counter[int], names: Sequence[str]) -> None:
    """Raises DataError if a class has no name.

    A single sample with a label beyond the names is a bad sample, which `examine` finds.

    Args:
        folder: folder of the tars, for the message.
        labels: label -> number of samples.
        names: names of the classes.
    """
    known = f"there are {len(names)} names, for the labels 0 to {len(names) - 1}"
    if min(labels) == 1 and max(labels) == len(names):
        raise DataError(
            f"{folder}: the labels begin at 1 and end at {len(names)}, but {known}; add a first line for the "
            "label 0 to the file of --classes, such as unused"
        )
    label, count = max(labels.items())
    if label >= len(names) and count > 1:
        raise DataError(
            f"{folder}: {count:,} samples have the label {label}, but {known}; add the missing names to the "
            "file of --classes"
        )


def check_no_class_lost(
    folder: Path, labels: Counter[int], usable: Sequence[int], names: Sequence[str]
) -> None:
    """Raises DataError if all samples of a class are bad.

    The only sample of a class may be bad: its label may be the mistake.

    Args:
        folder: folder of the tars, for the message.
        labels: label -> number of samples in train.
        usable: number of usable samples of each class in train.
        names: names of the classes.
    """
    for label, name in enumerate(names):
        if labels[label] > 1 and not usable[label]:
            raise DataError(
                f"{folder}: all {labels[label]:,} samples of the class {name} in train are bad, and a whole "
                "class is never left out; repair them, or remove them from the tars"
            )
