"""One step on one rank, against steps written out by hand."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.training import train as loops
from disttrain.training.augment import Mix
from disttrain.training.ema import MovingAverage
from disttrain.training.loss import loss_and_scores, loss_sum
from disttrain.training.microbatch import augment_micro_batch
from disttrain.training.phases import Phases
from disttrain.training.step import train_step
from disttrain.training.virtual_ranks import step_function
from kit.training import (
    CLASSES,
    Recorder,
    batch_of,
    make_state,
    network,
    run,
    weights_of,
    with_,
)

pytestmark = pytest.mark.usefixtures("clean_process")


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(found[key], expected[key], atol=tolerance) for key in expected)


def smoothed(label_smoothing: float, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).double()
    return (1 - label_smoothing) * targets + label_smoothing / CLASSES


# --- Steps ----------------------------------------------------------------------------------------


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

        class Keeper:
            def step(self) -> None:
                gradients.extend(p.grad.flatten() for p in parameters if p.grad is not None)

        state.optimizer = Keeper()  # type: ignore[assignment]
        state.augment.start_epoch(0, state.plan.order(0), 6, 6)
        batches = loops.prefetch(state, 0, range(step, step + 1), state.plan.order(0))
        ids = train_step(state, batches, step + 1, len(state.plan.batch(step)), Phases())
        batches.close()
        assert state.meter.samples == len(ids)
        return torch.cat(gradients), ids.tolist()

    expected, ids = gradient(0, 1)
    assert len(ids) == (16 if step == 0 else 8)
    ranks = [gradient(rank, world_size) for rank in range(world_size)]
    mean = torch.stack([each for each, _ in ranks]).mean(0)
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-4)
    assert [sample for _, traced in ranks for sample in traced] == ids


# --- Auxiliary losses -----------------------------------------------------------------------------


class Helped(nn.Module):
    """Returns auxiliary scores, too, in training mode."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
        self.head, self.helpers = nn.Linear(8, CLASSES), nn.ModuleList()
        self.helpers.extend(nn.Linear(8, CLASSES) for _ in range(heads))

    def forward(self, images: Tensor) -> Any:
        hidden = self.body(images)
        scores = self.head(hidden)
        return (scores, None, *(helper(hidden) for helper in self.helpers)) if self.training else scores


@pytest.mark.parametrize(("heads", "given", "weight"), [(1, None, 0.4), (2, None, 0.3), (2, 0.7, 0.7)])
@pytest.mark.parametrize("reproducible", [False, True])
def test_auxiliary_losses_are_added_with_their_weight(
    heads: int, given: float | None, weight: float, reproducible: bool
) -> None:
    model = Helped(heads)
    expected = copy.deepcopy(model)
    options = {"reproducible": reproducible, "label_smoothing": 0.1, "channels_last": False}
    state = make_state(model=model, samples=16, aux_weight=given, **options)
    order = state.plan.order(0)
    state.augment.start_epoch(0, order, 6, 6)
    with closing(loops.prefetch(state, 0, range(1), order)) as batches:
        ids = step_function(state.config.train)(state, batches, 1, 16, Phases())
    images, labels = batch_of(1, ids, 16)
    scores, _, *others = expected(images)
    losses = [F.cross_entropy(part, labels, label_smoothing=0.1) for part in (scores, *others)]
    (losses[0] + weight * sum(losses[1:])).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert close(weights_of(state.bare_model), expected.state_dict())
    assert state.meter.totals()[1] == (scores.argmax(1) == labels).sum()  # of the scores alone


def test_auxiliary_losses_are_mixed_as_the_loss_is() -> None:
    scores, other = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(0))
    labels, partners = torch.arange(6) % CLASSES, torch.arange(1, 7) % CLASSES
    mix, config = Mix(1, 0.7, None), make_state().config.train
    found, kept = loss_and_scores((scores, other), labels, partners, mix, config, None)
    parts = [loss_sum(part, labels, partners, mix, config, None) for part in (scores, other)]
    assert found.item() == pytest.approx((parts[0] + 0.4 * parts[1]).item())
    assert kept is scores


# --- Mixing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"loss": "focal"}, {"loss": "focal", "focal_gamma": 0.5}], ids=str)
@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 0.0, 1.5]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mix", [None, Mix(1, 0.7, None), Mix(1, 0.25, (0, 3, 0, 3))])
def test_the_loss_is_that_of_the_formula(
    mix: Mix | None, label_smoothing: float, weights: list[float] | None, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, CLASSES, generator=generator)
    labels, partners = torch.randint(CLASSES, (2, 6), generator=generator)
    factors = torch.tensor(weights or [1.0] * CLASSES, dtype=torch.float64)
    targets = factors[labels, None] * smoothed(label_smoothing, labels)
    if mix is not None:
        other = factors[partners, None] * smoothed(label_smoothing, partners)
        targets = mix.lam * targets + (1 - mix.lam) * other
    gamma = options.get("focal_gamma", 2) if options else 0
    logs = logits.double().log_softmax(1)
    expected = -(targets * (1 - logs.exp()) ** gamma * logs).sum().item()
    config = make_state(label_smoothing=label_smoothing, **options).config.train
    class_weights = None if weights is None else torch.tensor(weights)
    found = loss_sum(logits, labels, None if mix is None else partners, mix, config, class_weights)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_the_gradient_of_the_focal_loss_is_finite_where_p_is_1(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    config = make_state(loss="focal", focal_gamma=gamma, label_smoothing=0.1).config.train
    loss_sum(logits, torch.zeros(2, dtype=torch.int64), None, None, config, None).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_divides_the_weighted_losses_by_the_batch(reproducible: bool) -> None:
    state = make_state(samples=16, reproducible=reproducible, channels_last=False)
    state.class_weights = torch.tensor([0.5, 3.0, 0.0, 1.5])
    expected, order = copy.deepcopy(state.bare_model), state.plan.order(0)
    state.augment.start_epoch(0, order, 6, 6)
    with closing(loops.prefetch(state, 0, range(1), order)) as batches:
        ids = step_function(state.config.train)(state, batches, 1, 16, Phases())
    images, labels = batch_of(1, ids, 16)
    losses = F.cross_entropy(expected(images), labels, reduction="none") * state.class_weights[labels]
    (losses.sum() / 16).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert close(weights_of(state.bare_model), expected.state_dict())


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
            (inputs,) = augment_micro_batch(state, *next(batches))
        return inputs.images, inputs.labels, inputs.partners

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


# --- Moving average -------------------------------------------------------------------------------


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
