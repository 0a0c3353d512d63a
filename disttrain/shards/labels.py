"""Whether the labels of tars fit the names of the classes; a whole class is never left out as bad samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from disttrain.errors import DataError
from disttrain.shards.tar import Contents


def count_labels(shards: Iterable[Contents]) -> Counter[int]:
    """Returns label -> number of samples."""
    return Counter(int(label) for contents in shards for label in contents.labels if label >= 0)


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
