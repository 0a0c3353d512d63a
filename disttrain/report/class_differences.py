"""The classes that several runs recognize differently, from the evaluations of their best checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from disttrain.errors import CheckpointError
from disttrain.report.run import Run
from disttrain.runs.evaluation import Evaluation, class_rows, evaluation_of
from disttrain.units import number, percent

_ON_TERMINAL = 10
_MOST_RUNS = 4  # with a column of their own on a terminal


class ClassDifference(NamedTuple):
    """The accuracies of one class; in multi-label data, its average precisions.

    Attributes:
        name: of the class.
        samples: the fewest of this class in any of the evaluations.
        accuracies: of each run, 0..1; None if it is unknown.
    """

    name: str
    samples: int
    accuracies: list[float | None]

    @property
    def spread(self) -> float:
        """The highest accuracy minus the lowest."""
        known = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return max(known) - min(known)

    @property
    def text(self) -> str:
        """The spread in percentage points; for two runs, the second minus the first."""
        first, *_, last = self.accuracies
        if len(self.accuracies) == 2 and first is not None and last is not None:
            return number(last - first, "+.2f", scale=100)
        return number(self.spread, ".2f", scale=100)


def class_differences(runs: Mapping[str, Run]) -> list[ClassDifference]:
    """Returns the classes that at least two runs have evaluated, those that differ most first.

    A difference counts more if the class has many samples: those of small classes are mostly chance.
    """
    found = [_evaluation(run) for run in runs.values()]
    names = next((one.classes for one in found if one), ())
    columns = [_accuracies(one) if one and set(one.classes) == set(names) else {} for one in found]
    rows = []
    for name in names:
        known = [column[name][1] for column in columns if name in column]
        if len(known) >= 2:
            accuracies = [column[name][0] if name in column else None for column in columns]
            rows.append(ClassDifference(name, min(known), accuracies))
    return sorted(rows, key=lambda row: -row.spread * math.sqrt(row.samples))


def class_table(runs: Mapping[str, Run], rows: list[ClassDifference]) -> Table:
    """Returns the classes that differ most as a table that fits a terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class", overflow="fold")
    titles = list(runs) if len(runs) <= _MOST_RUNS else ["lowest", "highest"]
    for title in ("images", *titles, "difference"):
        table.add_column(Text(title), justify="right", overflow="fold", min_width=8)
    for row in rows[:_ON_TERMINAL]:
        known = [accuracy for accuracy in row.accuracies if accuracy is not None]
        shown = row.accuracies if len(runs) <= _MOST_RUNS else [min(known), max(known)]
        table.add_row(Text(row.name), f"{row.samples:,}", *map(percent, shown), row.text)
    return table


def _evaluation(run: Run) -> Evaluation | None:
    try:
        return evaluation_of(run.folder.checkpoints / "best")
    except CheckpointError:
        return None


def _accuracies(evaluation: Evaluation) -> dict[str, tuple[float, int]]:
    """Returns the accuracy of each class that has samples, and their number."""
    rows = class_rows(evaluation)
    return {row.name: (row.score, row.samples) for row in rows if row.score is not None and row.samples}
