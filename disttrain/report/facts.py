"""The figures of the report page: how a run ended, how accurate it is, where its time went."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from disttrain.report.charts import LEARNING
from disttrain.report.columns import Array
from disttrain.report.devices import MEASURES, Device
from disttrain.report.run import Run
from disttrain.runs.runfolder import STOPPED_EARLY
from disttrain.units import accuracy_text, duration, flops_text, number, percent, utc

_EPOCH_ROWS = 60
_OF_LAST = {
    "map": "mAP",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "top5_accuracy": "top-5 accuracy",
    "calibration_error": "calibration error",
}
"""Metrics of the last evaluation; files of earlier versions do not have them."""


def outcome(run: Run) -> tuple[str, str]:
    """Returns the state of a run, and its outcome in one line."""
    status = run.status
    state = str(status.get("state") or "unknown")
    last, best = run.evals[-1] if run.evals else None, run.best
    if last is None:
        result = "no evaluation"
    else:
        result, metric = f"accuracy {accuracy_text(last.accuracy, last.correct, last.total)}", run.metric
        if last.map is not None:
            result = f"mAP {percent(last.map)}, {result}"
        if best is not None and best is not last and metric.of(best) != metric.of(last):
            title = "" if metric.key == "accuracy" else f"{metric.title} "
            result += f", best {title}{metric.text(metric.of(best))} after epoch {best.epoch}"
    where = f"epoch {number(status.get('epoch'), ',d')}, step {number(status.get('step'), ',d')}"
    if state == "finished":
        early = str(status.get("reason"))
        return state, f"finished: {result}" + f"; {early}" * early.startswith(STOPPED_EARLY)
    if state == "running":
        silent_s = time.time() - _time_of(status.get("updated_at"))
        if run.folder.has_died(silent_s):
            return "silent", (
                f"no update for {duration(silent_s)}: the run was most likely killed after {where}; {result}"
            )
        return state, f"running, {where}; {result} so far"
    if state == "unknown":
        return state, f"no status.json; {result}"
    code = f" with exit code {status['exit_code']}" if status.get("exit_code") is not None else ""
    why = str(status.get("reason") or "no reason recorded").strip().splitlines()[0:1]
    return state, f"{state}{code} after {where}: {' '.join(why)}; {result}"


def wall_s(run: Run) -> float | None:
    """Returns the seconds from the first start of a run to its last update."""
    begin, end = _time_of(run.status.get("started_at")), _time_of(run.status.get("updated_at"))
    return end - begin if math.isfinite(end - begin) else None


def subject(run: Run) -> str:
    """Returns the model, the data and the folder of a run."""
    info = run.env.get("run") or {}
    return ", ".join(str(part) for part in (info.get("model"), info.get("data"), run.folder.path) if part)


def when_and_where(run: Run) -> str:
    """Returns when a run started, how long it took, and on which devices and hosts, as far as it is known."""
    info, began_s, whole_s = run.env.get("run") or {}, _time_of(run.status.get("started_at")), wall_s(run)
    hosts = list(dict.fromkeys(str(device.get("host")) for device in run.env.get("devices") or []))
    where = f"{hosts[0]} and {len(hosts) - 1} more hosts" if len(hosts) > 2 else " and ".join(hosts)
    parts = [
        utc(began_s) if math.isfinite(began_s) else None,
        duration(whole_s) if whole_s is not None else None,
        info.get("devices"),
        info.get("precision"),
        where and f"on {where}",
    ]
    return ", ".join(str(part) for part in parts if part)


def _time_of(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return math.nan


def median(values: Array) -> float | None:
    """Returns the median of the known values."""
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Returns what a run's result or speed may depend on, apart from the config."""
    env = run.env
    devices, data, git = env.get("devices") or [], env.get("data") or {}, env.get("git") or {}
    rows = {key: env.get(key) for key in ("disttrain", "python", "platform", "cuda", "cudnn", "world_size")}
    changes = ", with uncommitted changes" if git.get("modified") else ""
    rows |= {
        "device": " / ".join(sorted({str(device.get("name")) for device in devices})) or None,
        "hosts": ", ".join(dict.fromkeys(str(device.get("host")) for device in devices)) or None,
        "data digest": data.get("digest"),
        "git commit": f"{git['commit']}{changes}" if git else None,
    }
    rows |= env.get("packages") or {}
    rows |= {f"choice of {key}": why for key, why in (env.get("choices") or {}).items()}
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def first_facts(run: Run, gpus: Sequence[Device]) -> list[tuple[str, str]]:
    """Returns the figures of a run that its headline does not say, as (name, value)."""
    info, status, spent = run.env.get("run") or {}, run.status, run.training_s
    losses = [record.loss for record in run.evals if record.loss is not None]
    per_s, peak_pct = median(run.train["device_flops_per_s"]), median(run.train["mfu_pct"])
    share = "" if peak_pct is None else f", MFU {peak_pct:.1f} %"
    peak = [np.nanmax(v) for gpu in gpus if np.isfinite(v := gpu.values["memory_gib"]).any()]
    facts = [
        ("lowest validation loss", number(min(losses, default=None), ".4f")),
        *(
            (title, percent(getattr(run.evals[-1], key)))
            for key, title in _OF_LAST.items()
            if run.evals and getattr(run.evals[-1], key) is not None
        ),
        ("steps", number(status.get("step"), ",d")),
        ("training images seen", number(status.get("samples_seen"), ",d")),
        ("training time", duration(float(spent[-1]) if len(spent) else None)),
        ("median throughput", number(median(run.train["images_per_s"]), ",.0f", " images/s")),
        ("model FLOP/s", "n/a" if per_s is None else f"{flops_text(per_s)} per device{share}"),
        ("parameters", number(info.get("parameters"), ",d")),
    ]
    if status.get("restarts"):
        facts.append(("restarts", number(status["restarts"], ",d")))
    return [*facts, ("peak GPU memory", f"{max(peak):,.1f} GiB")] if peak else facts


def epoch_rows(run: Run) -> list[dict[str, Any]]:
    """Returns a row of figures per epoch, thinned to about 60 rows."""
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
                "images_per_s": _mean(train["images_per_s"][own], np.ones(int(own.sum()))),
                "val_loss": record.loss if record else None,
                "val_accuracy": record.accuracy if record else None,
                "best": record is not None and record is run.best,
            }
        )
    return rows


def _last(values: Array) -> float | None:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def _mean(values: Array, weights: Array) -> float | None:
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else None


def summaries(run: Run) -> dict[str, str]:
    """Returns a description of each curve for readers who cannot see it."""
    texts = {}
    for curve in LEARNING:
        known = np.isfinite(run.train[curve.key])
        if not known.any():
            texts[curve.key] = "no values"
            continue
        values, steps = curve.scale * run.train[curve.key][known], run.train["step"][known]
        first, last, least, most = (
            f"{values[place]:{curve.form}}{curve.unit} at step {steps[place]:,.0f}"
            for place in (0, -1, values.argmin(), values.argmax())
        )
        texts[curve.key] = f"from {first} to {last}; lowest {least}, highest {most}"
    return texts


def time_use(run: Run) -> list[tuple[str, float, float, str]]:
    """Returns how the time of a run was spent, as (what, seconds, share 0..1, colour); [] if unknown."""
    whole = wall_s(run)
    if not whole or not len(run.train["step"]):
        return []
    steps = np.diff(run.train["step"], prepend=0.0)

    def spent_s(phase: str) -> float:
        return float(np.nansum(steps * run.train[f"phases_ms.{phase}"])) / 1000

    uses = [
        ("forward and backward passes", spent_s("compute"), "#2f7fd1"),
        ("waiting for the gradients of other ranks", spent_s("communication"), "#a35bd6"),
        ("optimizer", spent_s("optimizer"), "#138a96"),
        ("augmentation", spent_s("augmentation"), "#c9a227"),
        ("copying to the device", spent_s("to_device"), "#e0916a"),
        ("waiting for data", spent_s("data"), "#d2691e"),
        ("evaluation", sum(e.seconds or 0.0 for e in run.events if e.kind == "evaluation"), "#1f9254"),
    ]
    rest = whole - sum(seconds for _, seconds, _ in uses)
    if rest < -0.05 * whole:  # the files are not of the same run
        return []
    uses.append(("startup, log points, checkpoints, pauses", max(0.0, rest), "#8a919c"))
    shares = [(what, seconds, seconds / whole, color) for what, seconds, color in uses]
    return [use for use in shares if use[2] >= 0.0005]  # smaller shares would show as 0.0 %


def device_rows(devices: Sequence[Device]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Returns the label and name of each device, and (title, mean with extremes) of each measure."""
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


def costly_operators(run: Run) -> list[tuple[str, tuple[int, int], list[dict[str, Any]]]]:
    """Returns what `--profile` found on the CPU and the device: (where, first and last step, operators)."""
    try:
        found = json.loads((run.folder.profile / "operators.json").read_bytes())
        first, last = found["steps"]
        return [(place, (first, last), found[key]) for place, key in (("CPU", "cpu"), ("device", "device"))]
    except (OSError, ValueError, KeyError, TypeError):  # no profile, or no file of ours
        return []
