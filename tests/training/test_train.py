"""The loop over steps and epochs on one rank."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import asdict
from torch import Tensor, nn

from disttrain.data.batches import Batch, Window
from disttrain.data.cached import Cached
from disttrain.data.epoch_plan import Ids, Plan
from disttrain.errors import DataError, StoppedError, TrainingError
from disttrain.heartbeat import Phase
from disttrain.runs import checkpoint
from disttrain.runs.evaluation import Evaluation
from disttrain.runs.jsonl import encoded
from disttrain.runs.records import EvalRecord, StepTimes, TrainRecord
from disttrain.training import evaluation, microbatch, phases
from disttrain.training import state as nouns
from disttrain.training import step as steps
from disttrain.training import train as loops
from disttrain.training.callbacks import Callbacks
from disttrain.training.evaluation import evaluate
from disttrain.training.log_metrics import step_times
from disttrain.training.phases import Phases
from disttrain.training.rank_state import gather_rank_states, restore_rank_state
from disttrain.training.restore import restore
from disttrain.training.state import Progress, TrainState, Validation
from disttrain.training.train import train
from kit.run_results import MEASURED
from kit.training import (
    NAMES,
    QUIET,
    Recorder,
    batch_of,
    make_state,
    network,
    run,
    same,
    split,
    weights_of,
    with_,
)

TRAIN_KEYS = {  # with the readings of the gauges
    "kind", "time", "step", "epoch", "samples", "loss", "accuracy", "lr", "images_per_s", "step_time_s",
    "data_wait_pct", "phases_ms", "ranks_ms", "device_flops_per_s", "mfu_pct", "grad_norm", "skipped",
    "gpus",
}  # fmt: skip

EVAL_KEYS = {"kind", "step", "epoch", "loss", "accuracy", "correct", "total", "skipped"}
EVAL_KEYS |= {"macro_precision", "macro_recall", "macro_f1", "calibration_error"}


pytestmark = pytest.mark.usefixtures("clean_process")


# --- Records --------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Notes what it draws in training; draws in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drawn = network(), []

    def forward(self, images: Tensor) -> Tensor:
        drawn = (random.random(), np.random.random(), torch.rand(()).item())
        if self.training:
            self.drawn.append(drawn)
        return self.inner(images)


def test_what_is_drawn_in_training_does_not_depend_on_evaluations() -> None:
    drawn = []
    for every in (1, 4):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        model = Drawing()
        run(with_(make_state(model=model, epochs=4), eval={"every_epochs": every}))
        drawn.append(model.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0])


def test_the_phases_of_a_step_are_told_for_each_rank() -> None:
    fields = len(StepTimes.__struct_fields__)
    means, ranks = step_times([float(number) for number in range(3 * fields)], 3)
    assert ranks.data == (0.0, 1.0, 2.0)
    assert ranks.checkpoint == (24.0, 25.0, 26.0)
    assert means.augmentation == 7.0
    assert StepTimes.__struct_fields__ == (
        "data", "to_device", "augmentation", "compute", "communication", "optimizer",
        "logging", "evaluation", "checkpoint",
    )  # fmt: skip


def test_records_have_the_documented_keys() -> None:
    recorder = run(with_(make_state(epochs=2), monitor={"log_every_steps": 2}))
    assert all(json.loads(encoded(record)).keys() == TRAIN_KEYS for record in recorder.trains)
    assert all(json.loads(encoded(record)).keys() == EVAL_KEYS for record in recorder.evaluations)
    places = [(record.step, record.epoch, record.samples) for record in recorder.trains]
    assert places == [(2, 1, 32), (3, 1, 40), (4, 2, 56), (6, 2, 80)]  # and the last step of an epoch
    for record in recorder.trains:
        assert 0 <= record.accuracy <= 1
        assert record.images_per_s > 0
        assert 0 <= record.data_wait_pct <= 100
        assert record.gpus[0] == 1.5
        assert np.isnan(record.gpus[1])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_record_is_the_mean_over_the_samples_of_its_steps(accumulate: int) -> None:
    state = make_state(epochs=2, optim={"lr": 1e-30}, accumulate=accumulate)  # the weights stay
    state = with_(state, monitor={"log_every_steps": 2})
    recorder = run(state)
    model = network()
    for record, epoch, places in zip(
        recorder.trains, [0, 0, 1, 1], [range(32), range(32, 40), range(16), range(16, 40)], strict=True
    ):
        images, labels = batch_of(1, state.plan.order(epoch)[list(places)].tolist())
        logits = model(images)
        assert record.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert record.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize("batch_size", [16, 20])
def test_cudnn_tries_kernels_for_whole_batches_alone(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    state = make_state(samples=40, val_samples=24, batch_size=batch_size, epochs=1)
    trying: list[tuple[int, bool]] = []
    state.model.register_forward_pre_hook(
        lambda _, inputs: trying.append((len(inputs[0]), torch.backends.cudnn.benchmark))
    )
    run(state)
    whole = {batch_size, 4 * batch_size}  # in training, in evaluation
    assert trying
    assert all(trial == (size in whole) for size, trial in trying)
    assert torch.backends.cudnn.benchmark


def test_times_leave_out_evaluation_and_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    for module in (nouns, phases):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))

    def taking(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        return slow

    prefetch = loops.prefetch

    def slowly_prefetched(*arguments: Any) -> Iterator[Any]:
        nonlocal now
        with closing(prefetch(*arguments)) as batches:
            for one in batches:
                now += 0.5
                yield one

    monkeypatch.setattr(loops, "prefetch", slowly_prefetched)
    monkeypatch.setattr(microbatch, "augment_micro_batch", taking(microbatch.augment_micro_batch, 0.25))
    monkeypatch.setattr(steps, "loss_and_scores", taking(steps.loss_and_scores, 1.25))
    monkeypatch.setattr(loops, "evaluate", taking(loops.evaluate, 100))
    state = with_(make_state(epochs=2), checkpoint={"every_steps": 1}, monitor={"log_every_steps": 3})
    recorder = run(state, save=taking(lambda **_: None, 1000))
    assert [record.step_time_s for record in recorder.trains] == [2.0] * 6  # each save follows a log point
    assert [record.images_per_s for record in recorder.trains] == [8.0, 8.0, 4.0] * 2
    assert [record.data_wait_pct for record in recorder.trains] == [25.0] * 6  # not of the augmentation


@pytest.mark.parametrize(("samples", "drop"), [(40, False), (40, True), (5, False)])
def test_traces_are_the_plan(samples: int, drop: bool) -> None:
    state = make_state(samples=samples, drop=drop, trace_samples=True, accumulate=2)
    plan = state.plan
    expected = [
        (
            epoch + 1,
            epoch * plan.steps_per_epoch + step + 1,
            plan.order(epoch)[list(plan.batch(step))].tolist(),
        )
        for epoch in range(2)
        for step in range(plan.steps_per_epoch)
    ]
    assert run(state).traces == expected


def test_the_order_of_the_next_epoch_is_computed_beside_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    ready = [threading.Event() for _ in range(3)]
    original = Plan.order

    def order(plan: Plan, epoch: int) -> Ids:
        assert threading.current_thread() is not threading.main_thread()
        computed.append(epoch)
        ready[epoch].set()
        return original(plan, epoch)

    monkeypatch.setattr(Plan, "order", order)
    state = with_(make_state(epochs=3), monitor={"log_every_steps": 1})
    recorder = Recorder()
    recorder.after_log = lambda: ready[min(recorder.trains[-1].epoch, 2)].wait(60) or pytest.fail("waits")
    run(state, recorder=recorder)
    assert computed == [0, 1, 2]


# --- Proof ----------------------------------------------------------------------------------------


class Careless(Cached):
    """Serves other samples than it is asked for in the second batch."""

    def __init__(self, how: str) -> None:
        super().__init__(split(40, 1), torch.device("cpu"), "host")
        self.how = how

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: object = None
    ) -> Generator[Batch, None, None]:
        for number, batch in enumerate(super().batches(order, windows)):
            ids = batch.ids.copy()
            if number == 1 and self.how == "repeats":
                ids[0] = ids[1]
            elif number == 1 and self.how == "swaps":  # the sum of the ids stays the same
                ids[0], ids[1] = ids[0] + 1, ids[1] - 1
            elif number == 1 and self.how == "drops":
                batch = Batch(batch.images[1:], batch.labels[1:], batch.ids)
                ids = ids[1:]
            yield batch._replace(ids=ids)


@pytest.mark.parametrize("how", ["repeats", "swaps", "drops"])
def test_an_epoch_over_other_samples_than_those_of_the_index_is_an_error(how: str) -> None:
    state = make_state()
    state.train_data = Careless(how)
    recorder = Recorder()
    with pytest.raises(DataError, match=r"trained on \d+ samples instead of 40.*internal error") as caught:
        run(state, recorder=recorder)
    assert caught.value.exit_code == 65
    assert recorder.evaluations == []


@pytest.mark.parametrize(("how", "seen"), [("repeats", 40), ("drops", 39)])
def test_an_evaluation_of_other_samples_is_an_error(how: str, seen: int) -> None:
    state = make_state(batch_size=4)
    state.val = Validation(Careless(how), np.arange(40), NAMES)
    with pytest.raises(DataError, match=rf"saw {seen} samples instead of 40, or not the expected ones"):
        evaluate(state, "none", Progress(), QUIET)


# --- Failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(value: float) -> None:
    state = with_(make_state(), checkpoint={"every_steps": 2})
    with torch.no_grad():
        state.bare_model.get_parameter("6.bias").fill_(value)
    saves: list[Any] = []
    recorder = Recorder()
    told = r"the loss is not finite at step 1 \(epoch 1, first on rank 0\); .*errors/bad\.json; lower"
    with pytest.raises(TrainingError, match=told) as caught:
        run(state, save=lambda **options: saves.append(options), recorder=recorder)
    assert caught.value.exit_code == 70
    assert recorder.trains == saves == []


class Breaking(nn.Module):
    """Gives scores that are not finite in one pass of the training and the passes after it."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.inner, self.passes = network(), passes

    def forward(self, images: Tensor) -> Tensor:
        self.passes -= self.training
        scores: Tensor = self.inner(images)
        return scores if self.passes > 0 or not self.training else scores * float("nan")


@pytest.mark.parametrize(("accumulate", "step"), [(1, 5), (2, 5), (1, 1), (1, 3)])
def test_the_step_that_was_not_finite_is_named_with_its_batch(accumulate: int, step: int) -> None:
    state = make_state(Breaking(accumulate * (step - 1) + 1), accumulate=accumulate)
    recorder = Recorder()
    epoch = (step - 1) // 3
    with pytest.raises(TrainingError, match=rf"at step {step} \(epoch {epoch + 1}, "):
        run(state, recorder=recorder)
    places = state.plan.batch((step - 1) % 3)
    assert recorder.bad == (epoch + 1, step, state.plan.order(epoch)[list(places)].tolist())


def test_a_gradient_scaler_that_lets_no_step_through_ends_the_run() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.inner(images)
            scores.register_hook(lambda gradient: gradient * float("inf"))
            return scores

    state = with_(make_state(Overflowing(), epochs=20), monitor={"log_every_steps": 2})
    state.accelerator.scaler = torch.amp.GradScaler("cpu")
    state.meter.scale = 2.0**16
    before, saves = weights_of(state.bare_model), []
    with pytest.raises(TrainingError, match=r"not finite in the last \d+ steps, at any loss scale") as caught:
        run(
            with_(state, checkpoint={"every_epochs": 99}, eval={"every_epochs": 99}),
            save=lambda **o: saves.append(o),
        )
    assert caught.value.exit_code == 70
    assert saves == []
    assert same(weights_of(state.bare_model), before)


def test_a_gradient_scaler_that_finds_its_scale_goes_on() -> None:
    state = with_(make_state(epochs=2), monitor={"log_every_steps": 1})
    state.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # too large at first
    recorder = run(state)
    assert len(recorder.trains) == 6


# --- Saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),  # four epochs of three steps
    [
        ({}, [3, 6, 9, 12]),
        ({"every_epochs": 2}, [6, 12]),
        ({"every_epochs": 3}, [9, 12]),
        ({"every_epochs": 9}, [12]),
        ({"every_epochs": 2, "every_steps": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_epochs": 9, "every_steps": 3}, [3, 6, 9, 12]),
        ({"every_epochs": 9, "every_steps": 5}, [5, 10, 12]),
    ],
)
def test_saves_come_when_due_once_and_at_the_end(options: dict[str, int], expected: list[int]) -> None:
    state = with_(make_state(epochs=4), checkpoint=options, eval={"every_epochs": 9})
    progress, steps = Progress(), []
    run(state, progress, save=lambda **_: steps.append(progress.step))
    assert steps == expected


def test_the_best_is_saved_whenever_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.4, 0.5, 0.6, 0.6])

    def evaluation(*_: object, **__: object) -> Evaluation:
        record = EvalRecord(loss=1.0, accuracy=next(accuracies), correct=1, total=2, step=0, epoch=0)
        return Evaluation(record, 0, NAMES, [], [])

    monkeypatch.setattr(loops, "evaluate", evaluation)
    state = with_(make_state(epochs=5), checkpoint={"every_epochs": 9})
    progress, saves = Progress(), []

    def save(*, best: bool, evaluation: Evaluation) -> None:
        saves.append((progress.epoch, best, progress.best, evaluation.record.accuracy))

    run(state, progress, save=save)
    assert saves == [(1, True, 0.5, 0.5), (4, True, 0.6, 0.6), (5, False, 0.6, 0.6)]


# --- Stopping and going on ------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "augment": {"crop_padding": 1, "flip": True, "cutout": 2, "mixup": 0.3, "cutmix": 1.0},
    "epochs": 3,
    "ema": 0.8,
    "accumulate": 2,
    "grad_clip": 1.0,
    "label_smoothing": 0.1,
    "trace_samples": True,
}


def state_of_everything(optimizer: str) -> TrainState:
    state = make_state(network(dropout=0.3, norm=True), optim={"name": optimizer}, **EVERYTHING)
    return with_(state, schedule={"name": "one_cycle"})


def saved_states(state: TrainState) -> dict[str, Any]:
    assert state.ema is not None
    return {
        "model": state.bare_model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": state.ema.state_dict(),
    }


@pytest.mark.integration
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path, optimizer: str, stop_after: int) -> None:
    whole = state_of_everything(optimizer)
    end = Progress()
    uninterrupted = run(whole, end)

    stopped = state_of_everything(optimizer)
    progress, steps = Progress(), []
    recorder = Recorder()

    def save(*, best: bool, stopping: bool = False, **_: object) -> None:
        steps.append(progress.step)
        states = saved_states(stopped) | {"ranks": gather_rank_states(stopped, with_buffers=False)}
        taken = checkpoint.snapshot(progress.step, states, dataclasses.asdict(progress))
        checkpoint.write(tmp_path, taken, keep=1, best=best)

    with pytest.raises(StoppedError, match=r"stopped .*saved, resumable") as caught:
        run(stopped, progress, save=save, stop_after=stop_after, recorder=recorder)
    assert caught.value.exit_code == 75
    assert steps == ([3] if stop_after > 3 else []) + [stop_after]

    going_on = state_of_everything(optimizer)
    loaded = checkpoint.load(tmp_path / "latest")
    restore(loaded, going_on.bare_model, going_on.optimizer, going_on.ema)
    progress = Progress(**loaded.state)
    restore_rank_state(going_on, loaded.parts["ranks"])
    run(going_on, progress, recorder=recorder)
    assert progress == end
    assert same(weights_of(going_on.bare_model), weights_of(whole.bare_model))
    assert going_on.ema is not None
    assert whole.ema is not None
    assert same(weights_of(going_on.ema), weights_of(whole.ema))
    assert recorder.traces == uninterrupted.traces
    assert recorder.evaluations == uninterrupted.evaluations
    assert computed(recorder.trains) == computed(uninterrupted.trains)


def computed(records: list[TrainRecord]) -> list[dict[str, Any]]:
    """Returns train records without what is measured."""
    return [{k: v for k, v in asdict(record).items() if k not in MEASURED} for record in records]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_wish_to_stop_is_heard_in_an_evaluation(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = with_(make_state(val_samples=200), checkpoint={"every_epochs": 9})
    progress, recorder, asked = Progress(), Recorder(), False
    saves: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluation, "_LARGEST_BATCH", 16)
    predictions = 0

    def hear(phase: Phase, step: int, part: int) -> None:
        nonlocal predictions, asked
        if phase == Phase.EVALUATE and progress.epoch == epoch:
            predictions, asked = part, part == 3

    callbacks = Callbacks(
        recorder,
        recorder,
        SimpleNamespace(save=lambda **options: saves.append(options), check=lambda: None, wait=lambda: None),
        lambda: asked,
        Phases(hear),
    )
    with pytest.raises(StoppedError, match=rf"in the evaluation after epoch {epoch}; saved, resumable"):
        train(state, progress, callbacks)
    assert predictions == 3, "of thirteen batches"
    assert [record.epoch for record in recorder.evaluations] == list(range(1, epoch))
    assert saves[-1] == {"best": False, "stopping": True}
    assert progress.evaluation_due
    whole = run(make_state(val_samples=200))
    asked = False
    callbacks = dataclasses.replace(callbacks, phases=Phases())
    train(state, progress, callbacks)
    assert recorder.evaluations == whole.evaluations


def test_the_network_learns() -> None:
    state = make_state(samples=100, epochs=40, optim={"lr": 0.02})
    recorder = run(state)
    assert recorder.trains[-1].accuracy > 0.8  # of random labels: learnt by heart
    assert recorder.trains[-1].loss < 0.5 * recorder.trains[0].loss
