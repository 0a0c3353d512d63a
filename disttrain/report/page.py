"""The report of a run: one page from its run folder, its data set and its best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from disttrain.config import dump_config, shown
from disttrain.errors import DisttrainError, reason
from disttrain.report import charts
from disttrain.report.activations import CheckpointView, sample_grid, view_checkpoint
from disttrain.report.confusion import axis_start, drawing, worst_first, write_classes
from disttrain.report.devices import MEASURES, read_gpus
from disttrain.report.facts import (
    costly_operators,
    device_rows,
    environment_rows,
    epoch_rows,
    first_facts,
    outcome,
    subject,
    summaries,
    time_use,
    when_and_where,
)
from disttrain.report.rendering import render
from disttrain.report.run import Run, read_ranks, read_run
from disttrain.runs.evaluation import class_rows, most_confused
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index, load_index

_EVENT_ROWS = 200

_T = TypeVar("_T")


class Section(NamedTuple, Generic[_T]):
    """The content of one section, or the reason why it is missing."""

    content: _T | None
    problem: str = ""


def write_report(run_dir: Path, output: Path | None = None, *, budget_s: float = 60) -> Path:
    """Writes the report of a run, which may still be running or have failed, and a CSV file of its classes.

    Args:
        run_dir: the run folder.
        output: the file; None is report.html in the run folder.
        budget_s: time limit in seconds for evaluating the best checkpoint on validation images; 0 omits
            every section that needs the network.

    Returns:
        The file.

    Raises:
        UsageError: `run_dir` is not a run folder.
        StorageError: the file cannot be written.
    """
    with ThreadPoolExecutor(1) as pool:  # other processes read gpu.jsonl while this one reads the rest
        reading = pool.submit(read_gpus, RunFolder(run_dir).gpu)
        run = read_run(run_dir)
        gpus, unread = reading.result()
    devices = gpus or run.processes
    drawn = charts.Charts()
    if len(run.train["step"]):
        charts.learning(drawn, run)
    times = charts.timeline(drawn, run, devices, run.events)
    index = _index(run)
    view = _evaluated(run, index.content, budget_s)
    seen, data = view.content, index.content
    path = output or run_dir / "report.html"
    return render(
        "report.html",
        path,
        drawn,
        run=run,
        outcome=outcome(run),
        subject=subject(run),
        when_and_where=when_and_where(run),
        epochs_planned=(run.env.get("run") or {}).get("epochs"),
        facts=first_facts(run, gpus),
        epochs=epoch_rows(run),
        summaries=summaries(run),
        times=times,
        time_use=time_use(run),
        verdict=(run.status.get("verdict") or {}).get("text"),
        ranks=read_ranks(run.folder.metrics),
        profile=costly_operators(run),
        devices=device_rows(devices),
        measures=MEASURES,
        events=run.events[-_EVENT_ROWS:],
        event_count=len(run.events),
        index=index,
        samples=_attempt(lambda: sample_grid(data)) if data else Section(None),
        skipped=[("validation", run.evals[-1].skipped if run.evals else None), ("training", run.skipped)],
        view=view,
        **(_classes(seen, data, path) if seen and data else {"matrix": None}),
        command=f"cd {run.env.get('directory')}\n{run.env['command']}" if "command" in run.env else "",
        config_text=_config_text(run),
        environment=environment_rows(run),
        unread=run.unread + unread,
    )


def _classes(seen: CheckpointView, index: Index, page: Path) -> dict[str, Any]:
    """Returns what the page says of the classes, and writes it into a file beside the page."""
    evaluation = seen.evaluation
    rows, multi_label = class_rows(evaluation), evaluation.labels is not None
    matrix = None if multi_label else drawing(evaluation.confusion, index.classes)
    table = page.with_name(f"{page.stem}_classes.csv")
    write_classes(rows, table, multi_label=multi_label)
    return {
        "class_rows": worst_first(rows),
        "axis_start": axis_start(rows),
        "class_file": table.name,
        "confused": [] if multi_label else most_confused(evaluation.confusion, 20 if matrix else 10),
        "matrix": matrix,
    }


def _attempt(make: Callable[[], _T]) -> Section[_T]:
    try:
        return Section(make())
    except (DisttrainError, OSError, RuntimeError) as error:  # RuntimeError: the network, or out of memory
        return Section(None, reason(error))


def _index(run: Run) -> Section[Index]:
    if (config := run.config) is None:
        return Section(None, f"The data set is unknown: {run.config_problem}")
    found = _attempt(
        lambda: load_index(config.data.name, config.data.root).cropped(
            config.data.image_size, config.eval.crop_pct
        )
    )
    digest = (run.env.get("data") or {}).get("digest")
    if found.content is None or digest in (None, found.content.digest):
        return found
    return Section(found.content, f"{found.content.folder} has changed since the run")


def _evaluated(run: Run, index: Index | None, budget_s: float) -> Section[CheckpointView]:
    if budget_s <= 0:
        return Section(None, "not asked for; `disttrain report RUN` computes it from the best checkpoint")
    if (config := run.config) is None or index is None:
        return Section(None, "needs the config and the data set of the run")
    return _attempt(lambda: view_checkpoint(run.folder.path, config, index, budget_s=budget_s))


def _config_text(run: Run) -> str:
    if run.config is not None:
        return dump_config(shown(run.config))
    try:
        return run.folder.config.read_text(errors="replace")
    except OSError as error:
        return f"config.yaml cannot be read: {reason(error)}"
