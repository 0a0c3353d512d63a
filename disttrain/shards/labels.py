"""Whether the labels of tars fit the names of the classes; a whole class is never left out as bad samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import DataError


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
    label, count = max((item for item in labels.items()), default=(0, 0))
    if label >= len(names) and count > 1:
        raise DataError(
            f"{folder}: {count:,} samples have the label {label}, but {known}; add the missing names to the "
            "file of --classes"
        )
