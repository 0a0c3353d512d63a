"""Compares several runs: their differences, their results, and the spread over seeds."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from disttrain.config import Role, role, settings
from disttrain.errors import UsageError
from disttrain.report import charts
from disttrain.report.class_differences import ClassDifference, class_differences
from disttrain.report.facts import environment_rows, median, outcome, wall_s
from disttrain.report.parallel_coordinates import Line, draw
from disttrain.report.rendering import render
from disttrain.report.run import Run, read_run, time_to_accuracy
from disttrain.runs.eval_metrics import EVAL_METRICS, Metric
from disttrain.runs.records import EvalRecord
from disttrain.runs.weight_digests import compared, weight_digests
from disttrain.terminal import width_of
from disttrain.units import number, percent


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        values: the settings in which the groups differ: key -> value of this group.
        titles: titles of the runs.
        accuracies: final accuracy of each run, 0..1.
        metric: by which the groups are compared.
        results: the value of the metric in the last evaluation of each run.
        deviation: standard deviation of `results`; None for a single run.
    """

    values: dict[str, str]
    titles: list[str]
    accuracies: list[float]
    metric: Metric
    results: list[float]
    deviation: float | None

    @property
    def setting(self) -> str:
        """The values in one line."""
        return ", ".join(f"{key}={value}" for key, value in self.values.items()) or "all runs"

    @property
    def mean(self) -> float:
        """The mean of `results`."""
        return float(np.mean(self.results))

    @property
    def text(self) -> str:
        """The mean with its deviation."""
        return self.metric.text(self.mean) + (
            "" if self.deviation is None else f" ± {self.metric.text(self.deviation).removesuffix(' %')}"
        )


@dataclass(frozen=True)
class Comparison:
    """The comparison of several runs.

    Attributes:
        runs: by title, which is the shortest end of the paths that distinguishes them.
        target: accuracy, 0..1, for the time-to-accuracy rows; None if no run was evaluated.
        rows: name of a result -> its value in each run, None if unknown.
        differences: (key, value in each run) of the config and environment keys that differ.
        metric: by which groups are compared: that of eval.best, or accuracy if the runs have several.
        groups: groups of runs that differ only in their seed, the one with the best mean first.
        bits: title of a run -> whether it has the same bits as the first run, if both recorded digests.
        classes: accuracies of the classes, those that differ most first.
        warning: why the accuracies cannot be compared; empty if they can.
    """

    runs: dict[str, Run]
    target: float | None
    rows: dict[str, list[float | str | None]]
    differences: list[tuple[str, list[str]]]
    metric: Metric
    groups: list[Group]
    bits: dict[str, str]
    classes: list[ClassDifference]
    warning: str = ""


def compare(paths: Sequence[Path], target: float | None = None) -> Comparison:
    """Reads the runs and compares them.

    Args:
        paths: run folders.
        target: accuracy, 0..1, for the time-to-accuracy rows; None means the best that all runs reached.

    Raises:
        UsageError: a path is not a run folder, or occurs twice.
    """
    folders = [path.resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise UsageError(f"{', '.join(map(str, paths))}: the same run twice; give different run folders")
    runs = dict(zip(_titles(folders), map(read_run, paths), strict=True))
    if target is None:
        reached = [max(record.accuracy for record in run.evals) for run in runs.values() if run.evals]
        target = min(reached, default=None)
    results = [_results(run, target) for run in runs.values()]
    rows = {name: [result[name] for result in results] for name in results[0]}
    if not any(rows["last_map"]):  # only multi-label data have one
        del rows["last_map"]
    metrics = {run.metric for run in runs.values()}
    metric = metrics.pop() if len(metrics) == 1 else EVAL_METRICS["accuracy"]
    return Comparison(
        runs=runs,
        target=target,
        rows=rows,
        differences=_differences(list(runs.values())),
        metric=metric,
        groups=_groups(runs, metric),
        bits=_bits(runs),
        classes=class_differences(runs),
        warning=_different_data(runs),
    )


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Writes the page of a comparison.

    Raises:
        StorageError: the file cannot be written.
    """
    drawn = charts.Charts()
    charts.overlay(drawn, comparison.runs)
    settings = [Line(group.values, group.mean, group.setting) for group in comparison.groups]
    lines = draw(settings, comparison.metric)
    shown = {"comparison": comparison, "cell": cell, "heading": heading, "shortened": shortened}
    return render("comparison.html", output, drawn, lines=lines, **shown)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON values; accuracies are 0..1, times in seconds."""
    return {
        "target_accuracy": comparison.target,
        "runs": [
            {"run": title, "folder": str(run.folder.path)}
            | {name: values[number] for name, values in comparison.rows.items()}
            for number, (title, run) in enumerate(comparison.runs.items())
        ],
        "differences": {
            what: dict(zip(comparison.runs, values, strict=True)) for what, values in comparison.differences
        },
        "bits": comparison.bits,
        "classes": [
            {"class": row.name, "samples": row.samples}
            | {"accuracy": dict(zip(comparison.runs, row.accuracies, strict=True))}
            for row in comparison.classes
        ],
        "metric": comparison.metric.key,
        "groups": [
            vars(group) | {"setting": group.setting, "mean": group.mean, "metric": group.metric.key}
            for group in comparison.groups
        ],
    }


def table(comparison: Comparison, width: int) -> Table:
    """Returns the results as a table.

    Args:
        comparison: of the runs.
        width: of the terminal, in characters. The table has at least two columns beside the runs, and as many
            more as fit.
    """
    shown = {name: comparison.rows[name] for name in _ON_TERMINAL if name in comparison.rows}
    columns = {heading(name): [cell(name, value) for value in values] for name, values in shown.items()}
    room = width - max(map(width_of, comparison.runs))
    if room < sum(2 + max(map(len, (title, *texts))) for title, texts in columns.items()):
        folded: dict[str, list[str]] = {}
        for title, texts in columns.items():
            least = max(map(len, (*title.split(), *texts)))
            room -= 2 + least
            if room < 0 and len(folded) >= 2:
                break
            folded[textwrap.fill(title, least)] = texts
        columns = folded
    runs = Table(box=None, pad_edge=False)
    runs.add_column("run", overflow="fold")
    for title in columns:
        runs.add_column(title, justify="right", no_wrap=True)
    for row in zip(comparison.runs, *columns.values(), strict=True):
        runs.add_row(*map(Text, row))
    return runs


_ON_TERMINAL = (
    "last_map",
    "last_accuracy",
    "best_accuracy",
    "training_s",
    "images_per_s",
    "epochs_to_target",
    "images_to_target",
    "training_to_target_s",
)


def heading(name: str) -> str:
    """Returns the title of a row of `Comparison.rows`, with its unit."""
    if name == "images_per_s":
        return "images/s"
    words = name.removesuffix("_s").replace("_map", "_mAP").replace("_f1", "_F1")
    return words.replace("_", " ") + ", s" * name.endswith("_s")


def cell(name: str, value: float | str | None) -> str:
    """Returns a value of a row of `Comparison.rows`, formatted for display."""
    if isinstance(value, str):
        return value
    if "accuracy" in name or name in ("last_map", "last_macro_f1", "last_calibration_error"):
        return percent(value)
    precise = name.endswith("_s") and name != "images_per_s"
    return number(value, ".4f" if "loss" in name else ",.1f" if precise else ",.0f")


def shortened(text: str) -> str:
    """Returns a text with its digests cut to eight characters."""
    return _DIGEST.sub(lambda found: found[0][:8], text)


_DIGEST = re.compile(r"\b[0-9a-f]{16,}\b")


def _different_data(runs: Mapping[str, Run]) -> str:
    """Returns a warning if runs were evaluated on different images, as far as it is known; otherwise ""."""
    found: dict[str, list[str]] = {}
    for title, run in runs.items():
        data = run.env.get("data") or {}
        if run.evals and "digest" in data:
            images = number(run.evals[-1].total, ",d", " images")
            text = f"{images} of {data.get('name')} (digest {shortened(str(data['digest']))})"
            found.setdefault(text, []).append(title)
    if len(found) < 2:
        return ""
    each = "; ".join(f"{', '.join(titles)}: {data}" for data, titles in found.items())
    return f"The runs were evaluated on different data; do not compare their accuracies. {each}"


def _titles(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that are all different."""
    depth = 1
    while True:
        titles = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(titles)) == len(titles):
            return titles
        depth += 1


def _bits(runs: Mapping[str, Run]) -> dict[str, str]:
    (_, first), *others = runs.items()
    digests = weight_digests(first.folder.metrics)
    found = {title: compared(digests, weight_digests(run.folder.metrics)) for title, run in others}
    return {title: result.text for title, result in found.items() if result is not None}


def _results(run: Run, target: float | None) -> dict[str, float | str | None]:
    """Returns the results of a run: a column of `Comparison.rows`."""
    last, spent = run.evals[-1] if run.evals else None, run.training_s
    results: dict[str, float | str | None] = {
        "state": outcome(run)[0],
        "last_accuracy": last.accuracy if last else None,
        "best_accuracy": max((record.accuracy for record in run.evals), default=None),
        "last_map": last.map if last else None,
        "last_macro_f1": last.macro_f1 if last else None,
        "last_calibration_error": last.calibration_error if last else None,
        "last_loss": last.loss if last else None,
        "samples_seen": run.status.get("samples_seen"),
        "training_s": float(spent[-1]) if len(spent) else None,
        "start_to_end_s": wall_s(run),
        "images_per_s": median(run.train["images_per_s"]),
    }
    if target is not None:
        hit = time_to_accuracy(run, target)
        before = int(np.searchsorted(run.train["step"], hit[0].step, side="right")) if hit else 0
        results["epochs_to_target"] = hit[0].epoch if hit else None
        results["images_to_target"] = float(run.train["samples"][before - 1]) if before else None
        results["training_to_target_s"] = hit[1] if hit else None
    unknown = {key for key, value in results.items() if isinstance(value, float) and not math.isfinite(value)}
    return results | dict.fromkeys(unknown)


def _settings(run: Run) -> dict[str, str]:
    return {key: str(value) for key, value in settings(run.config).items()} if run.config else {}


def _environment(run: Run) -> dict[str, str]:
    """Returns the environment, with automatic choices but without their reasons."""
    rows = environment_rows(run)
    return {key: value.partition(":")[0] if key.startswith("choice") else value for key, value in rows}


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    found = []
    for of_run in (_settings, _environment):
        tables = [of_run(run) for run in runs]
        for key in dict.fromkeys(key for table in tables for key in table):
            values = [table.get(key, "n/a") for table in tables]
            if len(set(values)) > 1:
                found.append((key, values))
    return found


def _makes_an_experiment(key: str) -> bool:
    """Returns whether runs with different values of a key belong to different groups."""
    return key not in {"seed", "name"} and (role(key) is Role.EXPERIMENT or key == "train.epochs")


def _groups(runs: Mapping[str, Run], metric: Metric) -> list[Group]:
    """Returns the finished runs, grouped by their settings without the seed; the best by a metric first.

    Runs without a value of the metric are left out.
    """
    members: dict[tuple[tuple[str, str], ...], list[tuple[str, EvalRecord]]] = {}
    for title, run in runs.items():
        if run.config is None or run.status.get("state") != "finished" or not run.evals:
            continue
        if metric.of(run.evals[-1]) is None:
            continue
        kept = {k: v for k, v in _settings(run).items() if _makes_an_experiment(k)}
        kept["data digest"] = _environment(run).get("data digest", "n/a")
        members.setdefault(tuple(sorted(kept.items())), []).append((title, run.evals[-1]))
    keys = [dict(key) for key in members]
    telling = [
        k for k in dict.fromkeys(k for key in keys for k in key) if len({key.get(k) for key in keys}) > 1
    ]
    groups = []
    for key, own in zip(keys, members.values(), strict=True):
        results = [metric.of(record) or 0.0 for _, record in own]
        deviation = float(np.std(results, ddof=1)) if len(own) > 1 else None
        values, titles = {k: key.get(k, "n/a") for k in telling}, [title for title, _ in own]
        accuracies = [record.accuracy for _, record in own]
        groups.append(Group(values, titles, accuracies, metric, results, deviation))
    return sorted(groups, key=lambda group: group.mean, reverse=not metric.lower)
