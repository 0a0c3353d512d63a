"""TrivialAugment, RandAugment, colour jitter and random erasing: what is drawn, and its independence."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from disttrain.config import AugmentConfig
from disttrain.training import auto_augment
from disttrain.training.augment import Augment
from disttrain.training.auto_augment import Policy
from disttrain.training.image_ops import Operation
from disttrain.training.normalize import Normalize
from kit.configs import load, mistake

NAMES = {
    "Identity": Operation.IDENTITY, "ShearX": Operation.SHEAR_X, "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X, "TranslateY": Operation.TRANSLATE_Y, "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS, "Color": Operation.SATURATION, "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS, "Posterize": Operation.POSTERIZE, "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTO_CONTRAST, "Equalize": Operation.EQUALIZE,
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "rand_augment": {},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "random_erasing": 0.5,
    "flip": True,
}
PLACES = np.arange(7000)
Drawn = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The operations and parameters of each pass over the images; the images stay as they are."""
    found: Drawn = []

    def note(images: torch.Tensor, operations: np.ndarray, parameters: np.ndarray) -> torch.Tensor:
        found.append((operations, parameters))
        return images

    monkeypatch.setattr(auto_augment, "apply", note)
    return found


def policy(seed: int = 0, **config: Any) -> Policy:
    return Policy(AugmentConfig.model_validate(config), seed)


def images(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def expected_parameters(transform: Any, bins: range, height: int, width: int) -> dict[Operation, set[float]]:
    """What torchvision would hand to its functions, from its own table of magnitudes."""
    found = {}
    for name, (magnitudes, signed) in transform._AUGMENTATION_SPACE.items():
        table = magnitudes(31, height, width)
        values = [0.0] if table is None else [float(table[number]) for number in bins]
        values += [-value for value in values] if signed else []
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            values = [1 + value for value in values]
        elif name == "Solarize":
            values = [255 * value for value in values]
        elif name.startswith("Translate"):
            values = [int(value) for value in values]
        found[NAMES[name]] = {round(value, 9) for value in values}
    return found


def assert_uniform(counts: Counter[Any], kinds: int) -> None:
    mean = sum(counts.values()) / kinds
    assert len(counts) == kinds
    assert sum((count - mean) ** 2 / mean for count in counts.values()) < kinds + 5 * (2 * kinds) ** 0.5


def test_trivial_augment_draws_as_torchvision(drawn: Drawn) -> None:
    policy(trivial_augment=True).change(images(1), 0, PLACES)
    (operations, parameters), expected = drawn[0], expected_parameters(
        v2.TrivialAugmentWide(), range(31), 32, 48
    )  # fmt: skip
    assert_uniform(Counter(operations.tolist()), len(expected))
    for operation, values in expected.items():
        own = parameters[operations == operation]
        if len(values) > 1:
            assert {round(value, 9) for value in own.tolist()} == values, operation
    turned = parameters[operations == Operation.ROTATE]
    assert_uniform(Counter(np.rint(np.abs(turned) / 4.5).tolist()), 31)
    assert abs((turned > 0).sum() - (turned < 0).sum()) < 5 * len(turned) ** 0.5


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_draws_as_torchvision(drawn: Drawn, magnitude: int) -> None:
    policy(rand_augment={"num_ops": 3, "magnitude": magnitude}).change(images(1), 0, PLACES)
    assert len(drawn) == 3
    expected = expected_parameters(v2.RandAugment(), range(magnitude, magnitude + 1), 32, 48)
    for operations, parameters in drawn:
        assert_uniform(Counter(operations.tolist()), len(expected))
        for operation, values in expected.items():
            if operation in (Operation.IDENTITY, Operation.AUTO_CONTRAST, Operation.EQUALIZE):
                continue
            assert {round(value, 9) for value in parameters[operations == operation].tolist()} == values
    pairs = Counter(zip(drawn[0][0].tolist(), drawn[1][0].tolist(), strict=True))
    assert_uniform(pairs, 14 * 14)


def test_colour_jitter_draws_factors_and_orders_evenly(drawn: Drawn) -> None:
    jitter = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    policy(color_jitter=jitter).change(images(1), 0, PLACES)
    orders = np.stack([operations for operations, _ in drawn], 1)
    assert_uniform(Counter(map(tuple, orders.tolist())), 24)
    ranges = {
        Operation.BRIGHTNESS: (0.6, 1.4), Operation.CONTRAST: (0.0, 2.5),
        Operation.SATURATION: (0.8, 1.2), Operation.HUE: (-0.1, 0.1),
    }  # fmt: skip
    operations, parameters = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for operation, (low, high) in ranges.items():
        own = parameters[operations == operation]
        assert len(own) == len(PLACES)
        assert low < own.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < own.max() < high
        assert abs(own.mean() - (low + high) / 2) < 5 * (high - low) / (12 * len(own)) ** 0.5


def test_a_setting_of_0_leaves_a_part_of_the_jitter_off(drawn: Drawn) -> None:
    policy(color_jitter={"saturation": 0.2}).change(images(1), 0, PLACES)
    operations = np.stack([operations for operations, _ in drawn])
    assert set(operations.flat) == {Operation.IDENTITY, Operation.SATURATION}
    assert ((operations == Operation.SATURATION).sum(0) == 1).all()


def test_random_erasing_draws_as_torchvision() -> None:
    height, width, wanted = 64, 96, 0.25
    boxes = policy(random_erasing=wanted).erased(0, PLACES, height, width)
    erased = boxes[boxes[:, 1] > 0]
    assert abs(len(erased) - wanted * len(PLACES)) < 5 * (wanted * (1 - wanted) * len(PLACES)) ** 0.5
    assert (boxes[boxes[:, 1] == 0] == 0).all()
    top, bottom, left, right = erased.T
    assert top.min() == 0
    assert left.min() == 0
    assert bottom.max() == height
    assert right.max() == width
    area = (bottom - top) * (right - left) / (height * width)
    aspect = (bottom - top) / (right - left)
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(p=1.0).make_params([torch.zeros(3, height, width)]) for _ in range(1500)]
    for own, their in (
        (area, [item["h"] * item["w"] / (height * width) for item in theirs]),
        (np.log(aspect), [math.log(item["h"] / item["w"]) for item in theirs]),
        (top / height, [item["i"] / height for item in theirs]),
    ):
        spread = (np.var(own) / len(own) + np.var(their) / len(their)) ** 0.5
        assert abs(np.mean(own) - np.mean(their)) < 5 * spread
        assert np.std(own) == pytest.approx(np.std(their), rel=0.1)


def started(epoch: int = 0, seed: int = 0, samples: int = 40, **config: Any) -> Augment:
    normalize = Normalize((0.5,) * 3, (0.2,) * 3, 1, channels_last=True)
    result = Augment(AugmentConfig.model_validate(config), seed=seed, normalize=normalize)
    result.start_epoch(epoch, np.arange(samples), 32, 48)
    return result


def test_erased_pixels_are_the_mean_and_no_others_change() -> None:
    plain = started(trivial_augment=True).train(images(40), slice(0, 40))
    result = started(trivial_augment=True, random_erasing=1.0).train(images(40), slice(0, 40))
    boxes = policy(random_erasing=1.0).erased(0, np.arange(40), 32, 48)
    for image, before, (top, bottom, left, right) in zip(result, plain, boxes, strict=True):
        before[:, top:bottom, left:right] = 0
        assert torch.equal(image, before)


@pytest.mark.parametrize("more", [{}, {"resized_crop": 0.3}, {"crop_padding": 3}])
def test_images_change_alike_in_any_part_of_a_batch(more: dict[str, Any]) -> None:
    whole = started(**EVERYTHING, **more).train(images(40), slice(0, 40))
    other = started(**EVERYTHING, **more)  # another rank
    for part in (slice(25, 40), slice(0, 1), slice(1, 25)):
        assert torch.equal(other.train(images(40)[part], part), whole[part])
    places = np.array([39, 3, 3, 0])
    assert torch.equal(other.train(images(40)[places], places), whole[places])


def test_every_epoch_and_seed_changes_images_differently() -> None:
    keys = [(0, 0), (1, 0), (0, 1)]
    results = [started(*key, **EVERYTHING).train(images(40), slice(0, 40)) for key in keys]
    again = started(1, 0, **EVERYTHING).train(images(40), slice(0, 40))
    assert torch.equal(again, results[1])
    assert not any(torch.equal(results[a], results[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_resized_crops_before_pixels_change_are_those_without() -> None:
    cropped = started(resized_crop=0.3, flip=True).train(images(40), slice(0, 40))
    both = started(resized_crop=0.3, flip=True, color_jitter={}).train(images(40), slice(0, 40))
    assert (both - cropped).abs().max() < 0.51 / (255 * 0.2)  # rounded to whole pixel values


def test_two_policies_at_once_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    assert load(file, "augment.rand_augment={}").augment.rand_augment.magnitude == 9
    assert load(file, "augment.rand_augment.num_ops=1").augment.rand_augment.num_ops == 1
    message = mistake(file, "augment.trivial_augment=true", "augment.rand_augment={}")
    assert "augment.trivial_augment takes its place; remove one of them" in message
