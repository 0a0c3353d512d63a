"""What evaluations decide: the best weights, and the early end of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import StoppedError, UsageError
from disttrain.preflight import open_index
from disttrain.runs.evaluation import Evaluation
from disttrain.runs.records import EvalRecord
from disttrain.training import train as loops
from disttrain.training.selection import ending, forget_other_rules
from disttrain.training.state import Progress, TrainState
from kit.toy import pack
from kit.training import NAMES, Recorder, make_state, run, with_

pytestmark = pytest.mark.usefixtures("clean_process")

Evaluate = Callable[..., Evaluation | None]
LOSSES = [0.9, 0.5, 0.49, 0.6, 0.47, 0.46, 0.1]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Sets the losses of the evaluations, by epoch; the accuracy is their number, from 0.0."""

    def set_losses(values: Sequence[float]) -> None:
        def evaluation(state: TrainState, tta: str, progress: Progress, *_: object) -> Evaluation:
            loss, tta_or_none = values[progress.epoch - 1], None if tta == "none" else tta
            record = EvalRecord(
                loss=loss, accuracy=progress.epoch / 100, correct=1, total=2, tta=tta_or_none,
                step=progress.step, epoch=progress.epoch,
            )  # fmt: skip
            return Evaluation(record, 0, NAMES, [], [])

        monkeypatch.setattr(loops, "evaluate", evaluation)

    return set_losses


def stopping(epochs: int = 7, best: str = "accuracy", **rule: Any) -> TrainState:
    """Returns a state whose run stops early by the loss."""
    return with_(make_state(epochs=epochs, stop_early={"metric": "loss"} | rule), eval={"best": best})


def test_the_best_is_that_of_the_metric(losses: Any) -> None:
    losses([0.9, math.nan, 0.5, 0.6])
    progress, saves = Progress(), []
    state = with_(make_state(epochs=4), eval={"best": "loss"}, checkpoint={"every_epochs": 9})
    run(state, progress, save=lambda best, evaluation: saves.append((progress.epoch, best, progress.best)))
    assert saves == [(1, True, 0.9), (3, True, 0.5), (4, False, 0.5)]


@pytest.mark.parametrize(
    ("rule", "every", "last"),
    [
        ({"patience_epochs": 1}, 1, 4),
        ({"patience_epochs": 2}, 1, 7),
        ({"patience_epochs": 2, "min_delta": 0.015}, 1, 4),
        ({"patience_epochs": 3, "min_delta": 0.035}, 1, 5),
        ({"patience_epochs": 3}, 2, 7),
        ({"patience_epochs": 1}, 2, 4),
        ({"patience_epochs": 7}, 1, 7),
    ],
)
def test_a_run_ends_when_the_metric_stays_as_it_is(
    losses: Any, rule: dict[str, Any], every: int, last: int
) -> None:
    losses(LOSSES)
    state, progress, saves = with_(stopping(**rule), eval={"every_epochs": every}), Progress(), []
    options = {"checkpoint": {"every_epochs": 9}}
    recorder = run(with_(state, **options), progress, save=lambda **_: saves.append(progress.epoch))
    assert (progress.epoch, progress.stopped_early) == (last, last < 7)
    assert recorder.evaluations[-1].epoch == last
    assert saves[-1] == last, "the end is saved"


def test_the_reason_has_the_value_and_its_epoch(losses: Any) -> None:
    losses(LOSSES)
    state, progress = stopping(patience_epochs=2, min_delta=0.015), Progress()
    run(state, progress)
    said = "stopped early after epoch 4 of 7 (validation loss not 0.0150 better than 0.5000 in epoch 2)"
    assert ending(progress, state.config) == said
    assert ending(Progress(epoch=7), state.config) == "all epochs done"
    losses([math.nan] * 7)
    progress = Progress()
    run(state, progress)
    said = "stopped early after epoch 2 of 7 (no validation loss is known)"
    assert ending(progress, state.config) == said


@pytest.mark.parametrize("stop_after", [2, 5, 6, 10, 12])
def test_a_resumed_run_stops_early_where_the_other_did(losses: Any, stop_after: int) -> None:
    losses(LOSSES)
    rule = {"patience_epochs": 3, "min_delta": 0.035}
    progress = Progress()
    with pytest.raises(StoppedError):
        run(stopping(**rule), progress, stop_after=stop_after)
    saved = Progress(**dataclasses.asdict(progress))
    recorder = run(stopping(**rule), saved)
    assert (saved.epoch, saved.stopped_early, saved.stop_best, saved.improved_epoch) == (5, True, 0.5, 2)
    assert run(stopping(**rule), saved).trains == [], "it has ended"
    assert recorder.evaluations[-1].epoch == 5


def test_the_last_evaluation_has_the_augmentation_of_the_end(losses: Any) -> None:
    losses(LOSSES)
    state = with_(stopping(patience_epochs=1), eval={"tta": "flip", "tta_when": "end"})
    records = run(state).evaluations
    assert [(record.epoch, record.tta) for record in records] == [
        (1, None),
        (2, None),
        (3, None),
        (4, "flip"),
    ]


def test_a_stop_in_the_last_evaluation_is_made_up_for(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(LOSSES)
    state = with_(stopping(patience_epochs=1), eval={"tta": "flip", "tta_when": "end"})
    whole, progress, recorder = loops.evaluate, Progress(), Recorder()
    monkeypatch.setattr(loops, "evaluate", lambda *a: None if a[1] == "flip" else whole(*a))
    with pytest.raises(StoppedError):
        run(state, progress, recorder=recorder)
    assert (progress.epoch, progress.evaluation_due) == (4, True)
    monkeypatch.setattr(loops, "evaluate", whole)
    run(state, progress, recorder=recorder)
    assert [record.epoch for record in recorder.evaluations] == [1, 2, 3, 4]
    assert recorder.evaluations[-1].tta == "flip"


def test_another_rule_forgets_what_the_former_found() -> None:
    old = stopping(patience_epochs=2).config
    saved = old.model_dump(mode="json")

    def after(state: TrainState) -> Progress:
        progress = Progress(epoch=4, best=0.8, stop_best=0.5, improved_epoch=2, stopped_early=True)
        forget_other_rules(progress, saved, state.config)
        return progress

    same = after(stopping(patience_epochs=2))
    assert (same.best, same.stop_best, same.stopped_early) == (0.8, 0.5, True)
    longer = after(stopping(patience_epochs=5))
    assert (longer.best, longer.stop_best, longer.stopped_early) == (0.8, 0.5, False)
    other = after(stopping(patience_epochs=2, metric="accuracy", best="loss"))
    assert (other.best, other.stop_best, other.stopped_early) == (None, None, False)
    assert other.improved_epoch == 4, "the count begins anew"
    assert not after(make_state(epochs=9)).stopped_early
    del saved["eval"]["best"], saved["train"]["stop_early"]  # of an earlier version
    assert after(make_state(epochs=9)).best == 0.8


@pytest.mark.parametrize(
    ("key", "choice"), [("eval.best", {"best": "top5"}), ("train.stop_early.metric", {"metric": "top5"})]
)
def test_top_5_needs_more_classes(tmp_path: Path, key: str, choice: dict[str, Any]) -> None:
    pack(root=str(tmp_path))
    state = with_(stopping(patience_epochs=1, **choice), data={"name": "toy", "root": str(tmp_path)})
    with pytest.raises(UsageError, match=f"^{key} = top5 needs more than 5 classes, but toy has 3; use"):
        open_index(state.config, lambda text: None)
