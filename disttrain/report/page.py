"""The report of a run as one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from disttrain import __version__
from disttrain.config import dump_config
from disttrain.errors import DisttrainError, reason
from disttrain.files import write_atomically
from disttrain.report.columns import Array
from disttrain.report.devices import MEASURES, Device, read_gpus
from disttrain.report.run import Run, read_ranks, read_run
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index, load_index
from disttrain.units import accuracy_text, duration, flops_text, number, percent, utc

if TYPE_CHECKING:
    from disttrain.report.charts import Charts
    from disttrain.report.inside import Inside

_SILENT_S = 600.0  # a running run that writes nothing for so long has most likely died
_EPOCH_ROWS = 60
_EVENT_ROWS = 200
_MATRIX_CLASSES = 30  # a larger confusion matrix is drawn instead of written
_CLASS_ROWS = 200


class Section(NamedTuple):
    """What is known of one subject, or why nothing is."""

    content: Any
    problem: str = ""


class ClassRow(NamedTuple):
    """How a class was recognised; `accuracy` is 0..1, None without samples."""

    name: str
    samples: int
    correct: int
    accuracy: float | None
    mistaken_for: str


def write_report(run_dir: Path, output: Path | None = None, *, inside_s: float = 60) -> Path:
    """Writes the report of a run, whatever there is of it: it may be going on or have failed.

    Args:
        run_dir: the run folder.
        output: the file; None is report.html in the run folder.
        inside_s: seconds at most in which validation images are put through the best checkpoint; 0 leaves
            out all that needs the network.

    Returns:
        The file.

    Raises:
        UsageError: it is no run folder.
        StorageError: the file cannot be written.
    """
    from disttrain.report import charts

    with ThreadPoolExecutor(1) as pool:  # processes read the GPUs, while this one reads the rest
        reading = pool.submit(read_gpus, RunFolder(run_dir).gpu)
        run = read_run(run_dir)
        gpus, unread = reading.result()
    devices = gpus or run.processes
    drawn = charts.Charts()
    if len(run.train["step"]):
        charts.learning(drawn, run, _steps_per_epoch(run))
    times = charts.timeline(drawn, run, devices, run.events)
    index, info = _index(run), run.env.get("run") or {}
    inside = _inside(run, index.content, inside_s)
    return render(
        "report.html",
        output or run_dir / "report.html",
        drawn,
        run=run,
        outcome=outcome(run),
        subject=", ".join(
            str(part) for part in (info.get("model"), info.get("data"), run.folder.path) if part
        ),
        facts=_facts(run, gpus),
        epochs=_epoch_rows(run),
        summaries=_summaries(run),
        times=times,
        time_use=_time_use(run),
        verdict=_verdict(run),
        ranks=read_ranks(run.folder.metrics),
        devices=_device_rows(devices),
        measures=MEASURES,
        events=run.events[-_EVENT_ROWS:],
        event_count=len(run.events),
        index=index,
        samples=_samples(index.content),
        skipped=_skipped(run),
        inside=inside,
        class_rows=_class_rows(inside.content, index.content),
        confused=_confused(inside.content),
        matrix=_matrix(inside.content),
        command=f"cd {run.env.get('directory')}\n{run.env['command']}" if "command" in run.env else "",
        config_text=_config_text(run),
        environment=environment_rows(run),
        unread=run.unread + unread,
    )


def render(template: str, output: Path, drawn: Charts, **content: Any) -> Path:
    """Fills a template of assets/report with charts and content and writes the page.

    Raises:
        StorageError: the file cannot be written.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources

    library = Resources(mode="inline", components=["bokeh"], log_level="warn")
    script, places = components(drawn.figures, wrap_script=False) if drawn.figures else ("", {})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("disttrain", "assets/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "utc": utc}
    text = environment.get_template(template).render(
        library="\n".join(library.js_raw) if drawn.figures else "",
        script=script,
        charts=places,
        version=__version__,
        written=utc(),
        **content,
    )
    write_atomically(output, text)
    return output


def outcome(run: Run) -> tuple[str, str]:
    """Returns the state of a run and what came out of it, in one line."""
    status = run.status
    state = str(status.get("state") or "unknown")
    last, best = run.evals[-1] if run.evals else None, run.best
    if last is None:
        result = "no evaluation"
    else:
        result = f"accuracy {accuracy_text(last.accuracy, last.correct, last.total)}"
        if best is not None and best is not last and best.accuracy != last.accuracy:
            result += f", best {percent(best.accuracy)} after epoch {best.epoch}"
    where = f"epoch {number(status.get('epoch'), ',d')}, step {number(status.get('step'), ',d')}"
    if state == "finished":
        return state, f"finished: {result}"
    if state == "running":
        silent_s = time.time() - _time_of(status.get("updated_at"))
        if silent_s > _SILENT_S:
            return "silent", (
                f"says that it is running, but has written nothing for {duration(silent_s)}: most likely it "
                f"was killed after {where}; {result}"
            )
        return state, f"running, {where}; {result} so far"
    if state == "unknown":
        return state, f"no status.json; {result}"
    code = f" with exit code {status['exit_code']}" if status.get("exit_code") is not None else ""
    why = str(status.get("reason") or "no reason given").strip().splitlines()[0:1]
    return state, f"{state}{code} after {where}: {' '.join(why)}; {result}"


def wall_s(run: Run) -> float | None:
    """Returns the seconds from the first start of a run to its last sign of life."""
    begin, end = _time_of(run.status.get("started_at")), _time_of(run.status.get("updated_at"))
    return end - begin if math.isfinite(end - begin) else None


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Returns what the result of a run or its speed may depend on besides the config."""
    env = run.env
    devices, data, git = env.get("devices") or [], env.get("data") or {}, env.get("git") or {}
    rows = {key: env.get(key) for key in ("disttrain", "python", "platform", "cuda", "cudnn", "world_size")}
    rows |= {"device": " / ".join(sorted({str(device.get("name")) for device in devices})) or None}
    rows |= {"hosts": ", ".join(dict.fromkeys(str(device.get("host")) for device in devices)) or None}
    changes = ", with changes" if git.get("modified") else ""
    rows |= {"data digest": data.get("digest"), "git commit": f"{git['commit']}{changes}" if git else None}
    rows |= env.get("packages") or {}
    rows |= {f"choice of {key}": why for key, why in (env.get("choices") or {}).items()}
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def _time_of(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return math.nan


def _steps_per_epoch(run: Run) -> int | None:
    steps = (run.env.get("run") or {}).get("steps_per_epoch")
    return steps if isinstance(steps, int) and steps > 0 else None


def _facts(run: Run, gpus: Sequence[Device]) -> list[tuple[str, str]]:
    """Returns the numbers of a run that people look for first."""
    info = run.env.get("run") or {}
    best, train = run.best, run.train
    speed = train["images_per_s"]
    spent = run.training_s
    peak = [np.nanmax(v) for gpu in gpus if np.isfinite(v := gpu.values["memory_gib"]).any()]
    facts = [
        ("best accuracy", percent(best.accuracy) if best else "n/a"),
        ("lowest validation loss", _least([record.loss for record in run.evals])),
        ("epochs", f"{number(run.status.get('epoch'), ',d')} of {number(info.get('epochs'), ',d')}"),
        ("steps", number(run.status.get("step"), ",d")),
        ("images trained on", number(run.status.get("samples_seen"), ",d")),
        ("training", duration(float(spent[-1])) if len(spent) else "n/a"),
        ("start to end", duration(wall_s(run))),
        ("median speed", f"{np.nanmedian(speed):,.0f} images/s" if np.isfinite(speed).any() else "n/a"),
        ("model arithmetic", _arithmetic(run)),
        ("ran on", str(info.get("devices") or "n/a")),
        ("precision", str(info.get("precision") or "n/a")),
        ("parameters", number(info.get("parameters"), ",d")),
        ("restarts", number(run.status.get("restarts"), ",d")),
    ]
    if peak:
        facts.append(("most GPU memory", f"{max(peak):,.1f} GiB"))
    return facts


def _arithmetic(run: Run) -> str:
    """Returns the model's operations per second on one device, and their share of its peak (MFU); medians."""
    per_s, peak_pct = run.train["device_flops_per_s"], run.train["mfu_pct"]
    if not np.isfinite(per_s).any():
        return "n/a"
    share = f", MFU {np.nanmedian(peak_pct):.1f} %" if np.isfinite(peak_pct).any() else ""
    return f"{flops_text(float(np.nanmedian(per_s)))} a device{share}"


def _least(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.4f}" if known else "n/a"


def _epoch_rows(run: Run) -> list[dict[str, Any]]:
    """Returns what the curves say, epoch by epoch; of very many, some."""
    train = run.train
    evals = {record.epoch: record for record in run.evals}
    of_train = {int(epoch) for epoch in train["epoch"] if math.isfinite(epoch)}
    epochs = sorted(of_train | set(evals))
    if len(epochs) > _EPOCH_ROWS:
        places = np.linspace(0, len(epochs) - 1, _EPOCH_ROWS).round().astype(int)
        best = {run.best.epoch} if run.best else set()
        epochs = sorted({epochs[place] for place in places} | best)
    samples = np.diff(train["samples"], prepend=0.0)
    rows = []
    for epoch in epochs:
        own = train["epoch"] == epoch
        record = evals.get(epoch)
        rows.append(
            {
                "epoch": epoch,
                "step": record.step if record else _last(train["step"][own]),
                "loss": _mean(train["loss"][own], samples[own]),
                "accuracy": _mean(train["accuracy"][own], samples[own]),
                "lr": _last(train["lr"][own]),
                "images_per_s": _mean(train["images_per_s"][own], None),
                "val_loss": record.loss if record else None,
                "val_accuracy": record.accuracy if record else None,
                "best": record is not None and record is run.best,
            }
        )
    return rows


def _last(values: Array) -> float | None:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def _mean(values: Array, weights: Array | None) -> float | None:
    known = np.isfinite(values)
    if weights is not None:
        known &= weights > 0
    if not known.any():
        return None
    return float(np.average(values[known], weights=None if weights is None else weights[known]))


def _summaries(run: Run) -> dict[str, str]:
    """Returns each curve over the steps in words, for those who do not see it."""
    forms = {"loss": ("", 1.0, ".4f"), "accuracy": (" %", 100.0, ".2f"), "lr": ("", 1.0, ".3g"),
             "images_per_s": (" images/s", 1.0, ",.0f"), "data_wait_pct": (" %", 1.0, ".1f")}  # fmt: skip
    texts = {}
    for name, (unit, scale, form) in forms.items():
        known = np.isfinite(run.train[name])
        if not known.any():
            texts[name] = "no values"
            continue
        values, steps = scale * run.train[name][known], run.train["step"][known]
        low, high = int(values.argmin()), int(values.argmax())
        texts[name] = (
            f"from {values[0]:{form}}{unit} at step {steps[0]:,.0f} to {values[-1]:{form}}{unit} at step "
            f"{steps[-1]:,.0f}; least {values[low]:{form}}{unit} at step {steps[low]:,.0f}, most "
            f"{values[high]:{form}}{unit} at step {steps[high]:,.0f}"
        )
    return texts


def _time_use(run: Run) -> list[tuple[str, float, float, str]]:
    """Returns what the time from start to end went into: what, seconds, share 0..1, colour; or []."""
    whole = wall_s(run)
    if not whole or not len(run.train["step"]):
        return []
    steps = np.diff(run.train["step"], prepend=0.0)
    phases = {
        name: float(np.nansum(steps * run.train[f"phases_ms.{name}"])) / 1000
        for name in ("compute", "communication", "optimizer", "augmentation", "to_device", "data")
    }
    evaluating = sum(event.seconds or 0.0 for event in run.events if event.kind == "evaluation")
    rest = whole - sum(phases.values()) - evaluating
    if rest < -0.05 * whole:  # the files do not belong together
        return []
    uses = [
        ("forward and backward pass", phases["compute"], "#2f7fd1"),
        ("waiting for the gradients of other ranks", phases["communication"], "#a35bd6"),
        ("optimizer", phases["optimizer"], "#138a96"),
        ("augmentation", phases["augmentation"], "#c9a227"),
        ("copying to the device", phases["to_device"], "#e0916a"),
        ("waiting for data", phases["data"], "#d2691e"),
        ("evaluation", evaluating, "#1f9254"),
        ("start, log points, checkpoints, pauses", max(0.0, rest), "#8a919c"),
    ]
    shares = [(what, seconds, seconds / whole, color) for what, seconds, color in uses]
    return [use for use in shares if use[2] >= 0.0005]  # less is shown as 0.0 %


def _verdict(run: Run) -> str:
    """Returns what the run says of itself: what holds it back, and the setting that helps."""
    verdict = run.status.get("verdict")
    return str(verdict.get("text") or "") if isinstance(verdict, dict) else ""


def _device_rows(devices: Sequence[Device]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Returns of each device label, name and, per measure, title and mean with extremes."""
    rows = []
    for device in devices:
        cells = []
        for key, values in device.values.items():
            title, unit = MEASURES[key]
            known, form = values[np.isfinite(values)], ",.2f" if unit == "GiB" else ",.0f"
            text = "n/a"
            if len(known):
                text = f"{known.mean():{form}} ({known.min():{form}} to {known.max():{form}}) {unit}"
            cells.append((title, text))
        rows.append((device.label, device.name, cells))
    return rows


def _index(run: Run) -> Section:
    if run.config is None:
        return Section(None, f"The data set is not known: {run.config_problem}")
    try:
        index = load_index(run.config.data.name, run.config.data.root)
    except (DisttrainError, OSError) as error:
        return Section(None, reason(error))
    digest = (run.env.get("data") or {}).get("digest")
    changed = digest is not None and digest != index.digest
    return Section(index, f"{index.folder} has changed since the run" if changed else "")


def _samples(index: Index | None) -> Section:
    from disttrain.report.inside import sample_grid

    if index is None:
        return Section(None)
    try:
        return Section(sample_grid(index))
    except (DisttrainError, OSError) as error:
        return Section(None, reason(error))


def _inside(run: Run, index: Index | None, budget_s: float) -> Section:
    if budget_s <= 0:
        return Section(None, "not asked for; `disttrain report RUN` computes it from the best checkpoint")
    if run.config is None or index is None:
        return Section(None, "needs the config and the data set of the run")
    from disttrain.report.inside import look_inside

    try:
        return Section(look_inside(run.folder.path, run.config, index, budget_s=budget_s))
    except (DisttrainError, OSError, RuntimeError) as error:  # RuntimeError: the network, or a full GPU
        return Section(None, reason(error))


def _skipped(run: Run) -> list[tuple[str, int | None]]:
    """Returns how many samples of each split were left out."""
    return [("validation", run.evals[-1].skipped if run.evals else None), ("training", run.skipped)]


def _class_rows(inside: Inside | None, index: Index | None) -> list[ClassRow]:
    """Returns the classes, the worst recognised first."""
    if inside is None or index is None:
        return []
    rows = []
    for label, counts in enumerate(inside.confusion):
        samples, correct = int(counts.sum()), int(counts[label])
        wrong = counts.copy()
        wrong[label] = 0
        most = f"{index.classes[int(wrong.argmax())]} ({wrong.max():,})" if wrong.any() else ""
        share = correct / samples if samples else None
        rows.append(ClassRow(index.classes[label], samples, correct, share, most))
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy))[:_CLASS_ROWS]


def _confused(inside: Inside | None) -> list[tuple[int, int, int]]:
    from disttrain.report.inside import most_confused

    return [] if inside is None else most_confused(inside.confusion)


def _matrix(inside: Inside | None) -> Any:
    """Returns a confusion matrix that is too large for a table as a picture, else None."""
    from disttrain.report.inside import mosaic

    if inside is None or len(inside.confusion) <= _MATRIX_CLASSES:
        return None
    shares = inside.confusion / np.maximum(inside.confusion.sum(1, keepdims=True), 1)
    return mosaic(np.sqrt(shares)[None].astype(np.float64), 1)


def _config_text(run: Run) -> str:
    if run.config is not None:
        return dump_config(run.config)
    try:
        return run.folder.config.read_text(errors="replace")
    except OSError as error:
        return f"config.yaml cannot be read: {reason(error)}"
