"""Every operation against torchvision's own function, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from disttrain.training.image_ops import Operation, apply

SIZES = [(32, 32, 3), (21, 40, 3), (28, 28, 1)]


def sheared(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, 0.0, [0, 0], 1.0, degrees, center=[0, 0])


def moved(image: Tensor, x: float, y: float) -> Tensor:
    return F.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0])


AFFINE: dict[Operation, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    Operation.SHEAR_X: (lambda image, x: sheared(image, x, 0), [0.0, 0.033, 0.77, -0.99]),
    Operation.SHEAR_Y: (lambda image, x: sheared(image, 0, x), [0.0, 0.033, 0.77, -0.99]),
    Operation.TRANSLATE_X: (lambda image, x: moved(image, x, 0), [0, 5, -14, 32, -32]),
    Operation.TRANSLATE_Y: (lambda image, x: moved(image, 0, x), [0, 5, -14, 32, -32]),
    Operation.ROTATE: (F.rotate, [0.0, 31.5, -90.0, 128.25, -135.0]),
}
COLOURS: dict[Operation, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    Operation.IDENTITY: (lambda image, x: image, [0.0]),
    Operation.BRIGHTNESS: (F.adjust_brightness, [0.0, 0.01, 0.7, 1.0, 1.33, 1.99]),
    Operation.SATURATION: (F.adjust_saturation, [0.0, 0.01, 0.7, 1.0, 1.33, 1.99]),
    Operation.CONTRAST: (F.adjust_contrast, [0.0, 0.01, 0.7, 1.0, 1.33, 1.99]),
    Operation.SHARPNESS: (F.adjust_sharpness, [0.0, 0.01, 0.7, 1.0, 1.33, 1.99]),
    Operation.POSTERIZE: (lambda image, x: F.posterize(image, int(x)), list(range(1, 9))),
    Operation.SOLARIZE: (F.solarize, [0.0, 8.5, 119.0, 119.00001, 254.99, 255.0]),
    Operation.AUTO_CONTRAST: (lambda image, x: F.autocontrast(image), [0.0]),
    Operation.EQUALIZE: (lambda image, x: F.equalize(image), [0.0]),
}


def photo(height: int, width: int, channels: int, seed: int = 0) -> Tensor:
    """A smooth image with noise and a gray half, uint8 [C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noisy = 255 * smooth + 9 * torch.randn(smooth.shape, generator=generator)
    noisy[:, : height // 3] = noisy[:1, : height // 3]
    return noisy.clamp(0, 255).byte()


def ours(image: Tensor, operation: Operation, parameters: list[float]) -> Tensor:
    """One operation on copies of an image [C, H, W]: uint8 [B, C, H, W]."""
    count = len(parameters)
    images = image.permute(1, 2, 0).expand(count, -1, -1, -1)
    result = apply(images, np.full(count, operation, np.int64), np.array(parameters, np.float64))
    assert result.dtype == torch.uint8
    return result.permute(0, 3, 1, 2)


@pytest.mark.parametrize("operation", COLOURS, ids=lambda operation: operation.name.lower())
@pytest.mark.parametrize("size", SIZES)
def test_colours_are_exactly_those_of_torchvision(operation: Operation, size: tuple[int, int, int]) -> None:
    theirs, parameters = COLOURS[operation]
    for image in (photo(*size), photo(*size) // 4 + 50, torch.full_like(photo(*size), 77)):
        expected = torch.stack([theirs(image, parameter) for parameter in parameters])
        assert torch.equal(ours(image, operation, parameters), expected)


def near_a_tie(operation: Operation, parameter: float, height: int, width: int) -> Tensor:
    """Where the source of a pixel lies halfway between two pixels, so that rounding decides: [H, W]."""
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    y, x = row - (height - 1) / 2, column - (width - 1) / 2
    cos, sin = math.cos(math.radians(parameter)), math.sin(math.radians(parameter))
    source = {
        Operation.ROTATE: [sin * x + cos * y + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2],
        Operation.SHEAR_X: [row, column + parameter * (row + 0.5)],
        Operation.SHEAR_Y: [row + parameter * (column + 0.5), column],
        Operation.TRANSLATE_X: [row, column],
        Operation.TRANSLATE_Y: [row, column],
    }
    return ((torch.stack(source[operation]).remainder(1) - 0.5).abs() < 0.001).any(0)


@pytest.mark.parametrize("operation", AFFINE, ids=lambda operation: operation.name.lower())
@pytest.mark.parametrize("size", SIZES)
def test_pixels_move_as_in_torchvision(operation: Operation, size: tuple[int, int, int]) -> None:
    theirs, parameters = AFFINE[operation]
    image = photo(*size)
    found = ours(image, operation, parameters)
    for parameter, result in zip(parameters, found, strict=True):
        differs = (result != theirs(image, parameter)).any(0)
        assert not (differs & ~near_a_tie(operation, parameter, *size[:2])).any(), parameter


@pytest.mark.parametrize("size", SIZES)
def test_hue_is_that_of_torchvision(size: tuple[int, int, int]) -> None:
    shifts = [-0.5, -0.1, 0.0, 0.02, 0.3, 0.5]
    image = photo(*size)
    expected = torch.stack([F.adjust_hue(image, shift) for shift in shifts])
    distance = (ours(image, Operation.HUE, shifts).int() - expected.int()).abs()
    assert distance.max() <= 1  # a rounding of the last bit in float32
    assert (distance > 0).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(32, 32, 3), (300, 310, 3), (2, 9, 1)])
def test_an_image_changes_in_the_same_way_in_any_batch(size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    count = 40 if size[0] < 100 else 6
    images = torch.stack([photo(*size, seed=seed).permute(1, 2, 0) for seed in range(count)])
    before = images.clone()
    operations = rng.integers(0, len(Operation), count)
    parameters = np.where(operations == Operation.HUE, 0.1, rng.integers(1, 3, count))
    whole = apply(images, operations, parameters)
    assert torch.equal(images, before)
    assert whole.shape == images.shape
    for i in range(count):
        alone = apply(images[i : i + 1], operations[i : i + 1], parameters[i : i + 1])
        assert torch.equal(alone[0], whole[i])
