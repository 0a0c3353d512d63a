"""What evaluations decide: which weights are the best so far, and whether the run stops early.

Both depend only on the reduced records and on the progress, which is in every checkpoint. So all ranks decide
the same, also after a stop, a kill and a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.config import Config
from disttrain.runs.eval_metrics import EVAL_METRICS
from disttrain.runs.records import EvalRecord
from disttrain.runs.runfolder import ALL_EPOCHS, STOPPED_EARLY
from disttrain.training.state import Progress


def is_best(progress: Progress, record: EvalRecord, config: Config) -> bool:
    """Returns whether an evaluation is the best so far by `eval.best`, and notes it in the progress."""
    metric = EVAL_METRICS[config.eval.best]
    value = metric.of(record)
    if not metric.improves(value, progress.best):
        return False
    progress.best = value
    return True


def stops_early(progress: Progress, record: EvalRecord, config: Config) -> bool:
    """Returns whether `train.stop_early` ends the run after an evaluation, and notes it in the progress."""
    rule = config.train.stop_early
    if rule is None:
        return False
    metric = EVAL_METRICS[rule.metric]
    value = metric.of(record)
    if metric.improves(value, progress.stop_best, rule.min_delta):
        progress.stop_best, progress.improved_epoch = value, progress.epoch
    waited = progress.epoch - progress.improved_epoch
    progress.stopped_early = waited >= rule.patience_epochs and progress.epoch < config.train.epochs
    return progress.stopped_early


def ending(progress: Progress, config: Config) -> str:
    """Returns why a run has finished."""
    rule = config.train.stop_early
    if rule is None or not progress.stopped_early:
        return ALL_EPOCHS
    metric = EVAL_METRICS[rule.metric]
    why = f"no {metric.title} is known"
    if progress.stop_best is not None:
        better = f"not {metric.text(rule.min_delta)} better" if rule.min_delta else "no better"
        value = metric.text(progress.stop_best)
        why = f"{metric.title} {better} than {value} in epoch {progress.improved_epoch:,}"
    return f"{STOPPED_EARLY} after epoch {progress.epoch:,} of {config.train.epochs:,} ({why})"


def forget_other_rules(progress: Progress, saved: Mapping[str, Any], config: Config) -> None:
    """Drops from the progress what another config decided; `saved` is the config of the checkpoint.

    A value of one metric is never compared with that of another.
    """
    if saved["eval"].get("best", "accuracy") != config.eval.best:
        progress.best = None
    before, rule = saved["train"].get("stop_early") or {}, config.train.stop_early
    if rule is None or before.get("metric") != rule.metric:
        progress.stop_best, progress.improved_epoch = None, progress.epoch
    if before != (rule.model_dump() if rule else {}):
        progress.stopped_early = False
