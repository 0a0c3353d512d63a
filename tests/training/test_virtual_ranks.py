"""A step of train.reproducible on one rank; integration/test_same_bits.py has several."""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disttrain import counter_rng
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import DecodedSplit
from disttrain.data.epoch_plan import virtual_ranks
from disttrain.errors import TrainingError
from disttrain.training import log_metrics
from disttrain.training.microbatch import Inputs, augment_micro_batch, micro_batches
from disttrain.training.normalize import Normalize
from disttrain.training.phases import Phases
from disttrain.training.rng import seed_all
from disttrain.training.state import TrainState
from disttrain.training.train import prefetch
from disttrain.training.virtual_ranks import _STEP, reproducible_step, weight_digests
from kit.training import MEAN, STD, batch_of, make_state, network, run

pytestmark = pytest.mark.usefixtures("clean_process")


def state_of(**options: Any) -> TrainState:
    torch.manual_seed(0)
    return make_state(**{"reproducible": True, "virtual_ranks": 4, "channels_last": False} | options)


def take_step(state: TrainState) -> list[int]:
    """Takes the first step; returns the ids."""
    order = state.plan.order(0)
    state.augment.start_epoch(0, order, *state.image_size)
    state.model.train()
    batches = prefetch(state, 0, range(1), order)
    ids = reproducible_step(state, batches, 1, state.plan.batch_size, Phases())
    batches.close()
    return [int(i) for i in ids]


def test_a_step_is_that_of_ranks_of_their_own() -> None:
    state = state_of(model=network(dropout=0.5, norm=True))
    start = copy.deepcopy(state.model)
    ids = take_step(state)
    gradients: list[list[Tensor]] = []
    norms: list[Tensor] = []
    for number in range(4):  # four samples each
        rank = copy.deepcopy(start)
        images, labels = batch_of(1, ids[4 * number : 4 * number + 4])
        seed_all(counter_rng.derive(state.config.seed, _STEP, 1, number), torch.device("cpu"))
        (nn.functional.cross_entropy(rank(images), labels, reduction="sum") / 16).backward()
        gradients.append([p.grad for p in rank.parameters() if p.grad is not None])
        norms.append(rank[1].running_mean.double())
    with torch.no_grad():
        for parameter, one, two, three, four in zip(start.parameters(), *gradients, strict=True):
            parameter -= 0.1 * ((one + two) + (three + four))
    for found, expected in zip(state.model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.model[1].running_mean, (sum(norms) / 4).float())
    assert state.model[1].num_batches_tracked == 1


def test_a_parameter_that_takes_no_part_has_a_gradient_of_zero() -> None:
    model = network()
    model.unused = nn.Parameter(torch.ones(3))
    model.forward = lambda images: nn.Sequential.forward(
        nn.Sequential(*[part for part in model.children() if isinstance(part, nn.Module)]), images
    )
    state = state_of(model=model, optim={"weight_decay": 0.5})
    take_step(state)
    assert torch.allclose(model.unused, torch.full((3,), 1 - 0.1 * 0.5))


@pytest.mark.parametrize(("samples", "parts"), [(16, 4), (13, 4), (12, 3), (9, 3), (5, 2), (4, 1), (1, 1)])
def test_a_smaller_last_batch_has_fewer_virtual_ranks(samples: int, parts: int) -> None:
    state = state_of(samples=16 + samples)
    assert virtual_ranks(samples, state.config.train) == parts
    (micro,) = micro_batches(state, 0, 1)
    assert micro.window == slice(16, 16 + samples)
    assert list(micro.parts) == [len(part) for part in torch.arange(samples).tensor_split(parts)]


@pytest.mark.parametrize(
    "augment",
    [{"crop_padding": 2, "flip": True, "cutout": 3}, {"mixup": 1.0}, {"cutmix": 1.0}, {"resized_crop": 0.3}],
    ids=lambda augment: "-".join(augment),
)
@pytest.mark.parametrize("shape", [(6, 6), (5, 7)], ids=str)
def test_inputs_do_not_depend_on_the_number_of_ranks(augment: dict[str, Any], shape: tuple[int, int]) -> None:
    def inputs(rank: int, world_size: int) -> list[Inputs]:
        state = state_of(samples=96, batch_size=48, augment=augment, virtual_ranks=8)
        height, width = shape
        images = np.random.default_rng(1).integers(0, 256, (96, height, width, 1), np.uint8)
        state.train_data = Cached(DecodedSplit(images, np.arange(96)), torch.device("cpu"), "host")
        state.augment.normalize = Normalize((MEAN,), (STD,), width, channels_last=True)
        state.image_size = shape
        state.rank, state.world_size = rank, world_size
        order = state.plan.order(0)
        state.augment.start_epoch(0, order, *shape)
        with closing(prefetch(state, 0, range(1), order)) as batches:
            return [one for micro, batch in batches for one in augment_micro_batch(state, micro, batch)]

    alone = inputs(0, 1)
    assert [len(each.ids) for each in alone] == [6] * 8
    for world_size in (3, 8):
        found = [each for rank in range(world_size) for each in inputs(rank, world_size)]
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one.images, other.images)
            assert one.images.stride() == other.images.stride()
            assert torch.equal(one.labels, other.labels)
            assert one.ids.tolist() == other.ids.tolist() == one.labels.tolist()
            assert one.images.data_ptr() % 64 == 0, "a sum may depend on the alignment"
            if other.partners is not None:
                assert one.partners is not None
                assert torch.equal(one.partners, other.partners)


def test_large_images_are_loaded_for_fewer_virtual_ranks_at_a_time() -> None:
    state = state_of()
    state.image_size = (1024, 512)  # 4 samples have 2 Mi pixels, half of what is loaded at once
    found = list(micro_batches(state, 0, 0))
    assert [(micro.window, micro.parts) for micro in found] == [
        (slice(0, 8), (4, 4)),
        (slice(8, 16), (4, 4)),
    ]


def test_log_points_have_a_digest_of_each_tensor() -> None:
    state = state_of(model=network(norm=True))
    recorder = run(state)
    assert recorder.trains[-1].weights == weight_digests(state)
    assert list(weight_digests(state)) == list(state.model.state_dict())
    before = weight_digests(state)
    with torch.no_grad():
        state.model[0].bias[0] += 1e-7
    changed = {name for name, digest in weight_digests(state).items() if digest != before[name]}
    assert changed == {"0.bias"}


def test_ranks_with_different_weights_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = log_metrics.reduce_record

    def with_another_rank(*arguments: Any) -> Any:
        total = real(*arguments)
        return replace(total, weights=total.weights + 1)

    monkeypatch.setattr(log_metrics, "reduce_record", with_another_rank)
    with pytest.raises(TrainingError, match=r"different weights at step \d+, although train.reproducible"):
        run(state_of())
