"""The loops on one rank, against loops written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from msgspec.structs import asdict
from torch import Tensor, nn

from disttrain.config import Config
from disttrain.data.batches import Batch, Window
from disttrain.data.cached import Cached, DecodedSplit
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
from disttrain.training.augment import Augment, Mix
from disttrain.training.autotune import Settings
from disttrain.training.callbacks import Callbacks
from disttrain.training.ema import MovingAverage
from disttrain.training.evaluation import evaluate
from disttrain.training.log_metrics import step_times
from disttrain.training.microbatch import prepare
from disttrain.training.normalize import Normalize
from disttrain.training.optim import Rate, build_optimizer
from disttrain.training.phases import Phases
from disttrain.training.rank_state import gather_rank_states, restore_rank_state
from disttrain.training.restore import restore
from disttrain.training.state import Progress, TrainState, Validation
from disttrain.training.step import loss_sum
from disttrain.training.train import train
from kit.run_results import MEASURED

CLASSES = 4
MEAN, STD = 0.4, 0.3
NAMES = tuple(map(str, range(CLASSES)))
TRAIN_KEYS = {  # with the readings of the gauges
    "kind", "time", "step", "epoch", "samples", "loss", "accuracy", "lr", "images_per_s", "step_time_s",
    "data_wait_pct", "phases_ms", "ranks_ms", "device_flops_per_s", "mfu_pct", "grad_norm", "skipped",
    "gpus",
}  # fmt: skip
EVAL_KEYS = {"kind", "step", "epoch", "loss", "accuracy", "correct", "total", "skipped"}


@pytest.fixture(autouse=True)
def _one_thread_and_no_state_of_accelerate() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Recorder:
    """Observer and gauges that remember what they were told."""

    def __init__(self) -> None:
        self.trains: list[TrainRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.traces: list[tuple[int, int, list[int]]] = []
        self.after_log: Callable[[], None] = lambda: None

    def train(self, record: TrainRecord) -> None:
        self.trains.append(record)
        self.after_log()

    def evaluate(self, record: EvalRecord) -> None:
        self.evaluations.append(record)

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        self.traces.append((epoch, step, list(ids)))

    def bad_batch(self, epoch: int, step: int, ids: Sequence[int]) -> str:
        self.bad = (epoch, step, list(ids))
        return "errors/bad.json"

    def read(self) -> list[float]:
        return [1.5, float("nan")]

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        return {"gpus": list(totals)}


def network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * 36, CLASSES),
    )


def split(samples: int, seed: int) -> DecodedSplit:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (samples, 6, 6, 1), dtype=np.uint8)
    return DecodedSplit(images, generator.integers(0, CLASSES, samples))


def make_state(
    model: nn.Module | None = None,
    samples: int = 40,
    val_samples: int = 23,
    drop: bool = False,
    augment: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    **train_options: Any,
) -> TrainState:
    """Builds what the worker builds, around a tiny network and random images; other sections by `with_`."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "seed": 5,
            "data": {"name": "random", "remainder": "drop" if drop else "keep"},
            "model": {"name": "tiny"},
            "augment": augment or {},
            "train": {"epochs": 2, "batch_size": 16} | train_options,
            "optim": {"name": "sgd", "lr": 0.1} | (optim or {}),
        }
    )
    accelerator = Accelerator(cpu=True)
    model = network() if model is None else model
    channels_last = config.train.channels_last is not False
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    decay = config.train.ema
    average = None if decay is None else MovingAverage(model, decay)
    optimizer, rates = build_optimizer(config.optim, config.schedule, model)
    model = accelerator.prepare(model)
    device = accelerator.device
    return TrainState(
        config=config,
        accelerator=accelerator,
        model=model,
        ema=average,
        optimizer=optimizer,
        rates=rates,
        plan=Plan(config.seed, (samples,), config.train.batch_size, drop),
        augment=Augment(
            config.augment,
            seed=config.seed,
            normalize=Normalize((MEAN,), (STD,), 6, channels_last=channels_last),
        ),
        train_data=Cached(split(samples, 1), device, "host"),
        val=Validation(Cached(split(val_samples, 2), device, "host"), np.arange(val_samples), NAMES),
        image_size=(6, 6),
        settings=Settings("fp32", channels_last, compiled=False, threads=1),
    )


def with_(state: TrainState, **sections: dict[str, Any]) -> TrainState:
    """Changes keys of other sections of the config, such as `schedule` or `checkpoint`."""
    tree = state.config.model_dump()
    for name, keys in sections.items():
        tree[name] |= keys
    state.config = Config.model_validate(tree)
    state.rates = [Rate(state.config.optim.lr, state.config.schedule) for _ in state.rates]
    return state


def run(
    state: TrainState,
    progress: Progress | None = None,
    *,
    save: Callable[..., None] = lambda **_: None,
    check: Callable[[], None] = lambda: None,
    stop_after: int | None = None,
    recorder: Recorder | None = None,
) -> Recorder:
    """Trains; is asked to stop when `stop_after` steps were taken."""
    progress = Progress() if progress is None else progress
    recorder = Recorder() if recorder is None else recorder
    saver = SimpleNamespace(save=save, check=check, wait=lambda: None)
    train(
        state,
        progress,
        Callbacks(recorder, recorder, saver, lambda: stop_after is not None and progress.step >= stop_after),
    )
    return recorder


QUIET = Callbacks(Recorder(), Recorder(), SimpleNamespace(), lambda: False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(found[key], expected[key], atol=tolerance) for key in expected)


def batch_of(seed: int, ids: Sequence[int], samples: int = 40) -> tuple[Tensor, Tensor]:
    """Returns normalized images [B, 1, 6, 6] and labels."""
    data = split(samples, seed)
    images = (torch.tensor(data.images[list(ids)]).float() / 255 - MEAN) / STD
    return images.permute(0, 3, 1, 2), torch.tensor(data.labels[list(ids)])


def smoothed(label_smoothing: float, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).double()
    return (1 - label_smoothing) * targets + label_smoothing / CLASSES


# --- Steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels_last": False},
        {"label_smoothing": 0.1},
        {"grad_clip": 0.05},
        {"batch_size": 40},
        {"batch_size": 64},
        {"batch_size": 39},
        {"accumulate": 3, "grad_clip": 0.05, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_training_is_the_loop_written_by_hand(options: dict[str, Any]) -> None:
    state = with_(make_state(**options), schedule={"name": "linear", "warmup_epochs": 0.5})
    recorder = run(state)
    batch_size, clip = options.get("batch_size", 16), options.get("grad_clip")
    model = network()
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    rates = []
    for epoch in range(2):
        order = state.plan.order(epoch).tolist()
        for begin in range(0, 40, batch_size):
            images, labels = batch_of(1, order[begin : begin + batch_size])
            targets = smoothed(options.get("label_smoothing", 0.0), labels)
            loss = -(targets * model(images).double().log_softmax(1)).sum(1).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / (norm.item() + 1e-6))
            done = epoch + (begin + min(begin + batch_size, 40)) / 80  # in the middle of the step
            rates.append(0.1 * (done / 0.5 if done < 0.5 else 1 - (done - 0.5) / 1.5))
            with torch.no_grad():
                for parameter, gradient, speed in zip(model.parameters(), gradients, velocity, strict=True):
                    speed.mul_(0.9).add_(gradient * factor)
                    parameter -= rates[-1] * speed
    assert close(weights_of(state.bare_model), weights_of(model))
    assert recorder.trains[-1].lr == pytest.approx(rates[-1])
    expected = None if clip is None else pytest.approx(norm.item(), rel=1e-3)
    assert recorder.trains[-1].grad_norm == expected


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulating_gives_the_weights_of_one_pass(accumulate: int) -> None:
    expected, state = make_state(ema=0.5), make_state(ema=0.5, accumulate=accumulate)
    records = [run(each).trains[-1] for each in (expected, state)]
    assert close(weights_of(state.bare_model), weights_of(expected.bare_model))
    assert records[1].loss == pytest.approx(records[0].loss, abs=1e-5)
    assert records[1].accuracy == records[0].accuracy


def test_accumulating_mixes_the_same_pairs() -> None:
    augment = {"mixup": 0.3, "cutmix": 1.0, "crop_padding": 1, "flip": True, "cutout": 2}
    expected, state = make_state(augment=augment), make_state(augment=augment, accumulate=4)
    for each in (expected, state):
        run(each)
    assert close(weights_of(state.bare_model), weights_of(expected.bare_model))


class Shell(nn.Module):
    """Stands for DDP around a model, without its collectives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        return self.module(images)


@pytest.mark.parametrize("step", [0, 2], ids=["full batch", "last batch"])
@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_the_mean_gradient_over_the_ranks_is_that_of_the_global_batch(world_size: int, step: int) -> None:
    augment = {"mixup": 0.3, "flip": True}

    def gradient(rank: int, world_size: int) -> tuple[Tensor, list[int]]:
        state = make_state(augment=augment, trace_samples=True, label_smoothing=0.1)
        if world_size > 1:
            state.rank, state.world_size, state.model = rank, world_size, Shell(state.model)
        gradients: list[Tensor] = []
        parameters = list(state.bare_model.parameters())

        def keep() -> None:
            gradients.extend(
                parameter.grad.flatten() for parameter in parameters if parameter.grad is not None
            )

        state.optimizer = SimpleNamespace(step=keep)  # type: ignore[assignment]
        state.augment.start_epoch(0, state.plan.order(0), 6, 6)
        batches = loops.prefetch(state, 0, range(step, step + 1), state.plan.order(0))
        ids = loops.train_step(state, batches, step + 1, len(state.plan.batch(step)), Phases())
        batches.close()
        assert state.meter.samples == len(ids)
        return torch.cat(gradients), ids.tolist()

    expected, ids = gradient(0, 1)
    assert len(ids) == (16 if step == 0 else 8)
    ranks = [gradient(rank, world_size) for rank in range(world_size)]
    mean = torch.stack([each for each, _ in ranks]).mean(0)
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-4)
    assert [sample for _, traced in ranks for sample in traced] == ids


# --- Mixing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mix", [None, Mix(1, 0.7, None), Mix(1, 0.25, (0, 3, 0, 3))])
def test_the_loss_is_the_cross_entropy_with_mixed_targets(mix: Mix | None, label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, CLASSES, generator=generator)
    labels, partners = torch.randint(CLASSES, (2, 6), generator=generator)
    targets = smoothed(label_smoothing, labels)
    if mix is not None:
        targets = mix.lam * targets + (1 - mix.lam) * smoothed(label_smoothing, partners)
    expected = -(targets * logits.double().log_softmax(1)).sum().item()
    found = loss_sum(logits, labels, None if mix is None else partners, mix, label_smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("places", [range(16, 32), range(32, 43)], ids=["full batch", "last batch"])
@pytest.mark.parametrize("mix", [Mix(3, 0.7, None), Mix(7, 0.75, (1, 4, 2, 5))], ids=["mixup", "cutmix"])
def test_images_are_mixed_with_partners_of_the_same_global_batch(mix: Mix, places: range) -> None:
    step = places.start // 16

    def loaded(mix: Mix | None, rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        state = make_state(samples=43, augment={"crop_padding": 1, "flip": True})
        state.rank, state.world_size = rank, world_size
        state.augment.start_epoch(0, state.plan.order(0), 6, 6)
        state.augment.mix = lambda *place: mix  # type: ignore[method-assign]
        with closing(loops.prefetch(state, 0, range(step, step + 1), state.plan.order(0))) as batches:
            return prepare(state, *next(batches))

    images, labels, _ = loaded(None, 0, 1)
    expected, partner_labels = [], []
    for own in range(len(places)):
        partner = (own + mix.shift) % len(places)
        image = images[own].clone()
        if mix.box is None:
            image = mix.lam * image + (1 - mix.lam) * images[partner]
        else:
            image[:, 1:4, 2:5] = images[partner][:, 1:4, 2:5]
        expected.append(image)
        partner_labels.append(labels[partner].item())
    for world_size in (1, 3):
        found = [loaded(mix, rank, world_size) for rank in range(world_size)]
        torch.testing.assert_close(torch.cat([each[0] for each in found]), torch.stack(expected))
        assert torch.cat([each[1] for each in found]).tolist() == labels.tolist()
        assert [n for each in found if each[2] is not None for n in each[2].tolist()] == partner_labels


# --- Moving average ---------------------------------------------------------------------------------


def test_ema_follows_weights_and_statistics_and_is_evaluated() -> None:
    state = with_(make_state(network(norm=True), ema=0.8), monitor={"log_every_steps": 1})
    snapshots: list[dict[str, Tensor]] = []
    recorder = Recorder()
    recorder.after_log = lambda: snapshots.append(weights_of(state.bare_model))
    run(state, recorder=recorder)
    assert len(snapshots) == 6
    average = {key: value.double() for key, value in snapshots[0].items()}
    for snapshot in snapshots[1:]:
        for key, value in snapshot.items():
            average[key] = 0.8 * average[key] + 0.2 * value
    assert state.ema is not None
    found = weights_of(state.ema.module)
    for key, value in average.items():
        if key.endswith("num_batches_tracked"):
            assert found[key] == 6
        else:
            torch.testing.assert_close(found[key].double(), value, atol=1e-6, rtol=1e-5)
    model = copy.deepcopy(state.ema.module).eval()
    images, labels = batch_of(2, range(23), 23)
    expected = F.cross_entropy(model(images), labels).item()
    assert recorder.evaluations[-1].loss == pytest.approx(expected, rel=1e-5)
    bare = F.cross_entropy(copy.deepcopy(state.bare_model).eval()(images), labels).item()
    assert abs(bare - expected) > 1e-4


def test_the_moving_average_follows_a_statistic_that_a_model_binds_anew() -> None:
    model = nn.Module()
    model.register_buffer("seen", torch.tensor(0.0))
    average = MovingAverage(model, 0.5)
    for _ in range(3):
        model.seen = model.seen + 1
        average.update(model)
    assert average.module.get_buffer("seen") == 0.25 * 1 + 0.25 * 2 + 0.5 * 3


# --- Evaluation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", ["none", "flip", "multi_view"])
@pytest.mark.parametrize("samples", [1, 15, 16, 17, 150])
def test_evaluation_counts_every_sample_once(samples: int, tta: Any) -> None:
    state = with_(make_state(network(dropout=0.5, norm=True), val_samples=samples), eval={"tta": tta})
    model = copy.deepcopy(state.bare_model).eval()
    images, labels = batch_of(2, range(samples), samples)
    plain = logits = model(images)
    if tta == "flip":
        logits = (plain + model(images.flip(3))) / 2
    elif tta == "multi_view":
        logits = (plain + model(images.flip(3))) / 4
        for index in ([1, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 4]):  # reflected at a border of one pixel
            seen = images[:, :, index][:, :, :, index]
            logits = logits + (model(seen) + model(seen.flip(3))) / 8
    correct, plain_correct = (int((scores.argmax(1) == labels).sum()) for scores in (logits, plain))
    before = weights_of(state.bare_model)
    found = evaluate(state, tta, Progress(step=7, epoch=2), QUIET)
    assert found is not None
    assert msgspec.to_builtins(found.record) == {
        "kind": "eval",
        "loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5),
        "accuracy": correct / samples,
        "correct": correct,
        "total": samples,
        "skipped": 0,
        "step": 7,
        "epoch": 2,
        **(
            {}
            if tta == "none"
            else {"tta": tta, "plain_accuracy": plain_correct / samples, "plain_correct": plain_correct}
        ),
    }
    predicted = logits.argmax(1)
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    assert found.confusion == [[pairs[i, j] for j in range(CLASSES)] for i in range(CLASSES)]
    assert (found.classes, found.top5_correct) == (NAMES, samples)
    chances = logits.softmax(1).amax(1).tolist()
    wrong = sorted((predicted != labels).nonzero().flatten().tolist(), key=lambda i: -chances[i])
    assert [(one.id, one.label, one.predicted) for one in found.mistakes] == [
        (i, int(labels[i]), int(predicted[i])) for i in wrong[:24]
    ]
    assert same(weights_of(state.bare_model), before)
    assert state.bare_model.training  # as it was


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_evaluations_come_when_due_and_at_the_end(every: int, epochs: list[int]) -> None:
    recorder = run(with_(make_state(epochs=3), eval={"every_epochs": every}))
    assert [record.epoch for record in recorder.evaluations] == epochs
    assert [record.step for record in recorder.evaluations] == [3 * epoch for epoch in epochs]


def test_test_time_augmentation_can_wait_for_the_end() -> None:
    sections = {"tta": "multi_view", "tta_when": "end"}
    recorder = run(with_(make_state(epochs=3), eval=sections))
    assert [record.tta for record in recorder.evaluations] == [None, None, "multi_view"]


# --- Records ----------------------------------------------------------------------------------------


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
    monkeypatch.setattr(microbatch, "prepare", taking(microbatch.prepare, 0.25))
    monkeypatch.setattr(steps, "loss_sum", taking(steps.loss_sum, 1.25))
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


# --- Proof -----------------------------------------------------------------------------------------


class Careless(Cached):
    """Serves other samples than it is asked for in the second batch."""

    def __init__(self, how: str) -> None:
        super().__init__(split(40, 1), torch.device("cpu"), "host")
        self.how = how

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
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
    with pytest.raises(DataError, match=r"trained on \d+ samples, it should be 40.*internal error") as caught:
        run(state, recorder=recorder)
    assert caught.value.exit_code == 65
    assert recorder.evaluations == []


@pytest.mark.parametrize(("how", "seen"), [("repeats", 40), ("drops", 39)])
def test_an_evaluation_of_other_samples_is_an_error(how: str, seen: int) -> None:
    state = make_state(batch_size=4)
    state.val = Validation(Careless(how), np.arange(40), NAMES)
    with pytest.raises(DataError, match=rf"saw {seen} samples, it should be 40, or not the same ones"):
        evaluate(state, "none", Progress(), QUIET)


# --- Failure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(value: float) -> None:
    state = with_(make_state(), checkpoint={"every_steps": 2})
    with torch.no_grad():
        state.bare_model.get_parameter("6.bias").fill_(value)
    saves: list[Any] = []
    recorder = Recorder()
    told = r"the loss is not finite at step 1 \(epoch 1, on rank 0 first\); .*errors/bad\.json; lower"
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


# --- Saving -----------------------------------------------------------------------------------------


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
        saves.append((progress.epoch, best, progress.best_accuracy, evaluation.record.accuracy))

    run(state, progress, save=save)
    assert saves == [(1, True, 0.5, 0.5), (4, True, 0.6, 0.6), (5, False, 0.6, 0.6)]


# --- Stopping and going on --------------------------------------------------------------------------

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
