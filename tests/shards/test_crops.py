"""Which part of an image becomes a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from disttrain.shards.crops import CenterCrops, RandomCrops

COUNT = 4000
SIZES = np.array([[375, 500], [500, 333], [240, 240], [1000, 130]] * (COUNT // 4))
PLACES = np.arange(COUNT)


def test_random_crops_lie_in_the_image_with_area_and_aspect() -> None:
    top, left, height, width = RandomCrops(3, 1, 0.08)(PLACES, SIZES).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height <= SIZES[:, 0]).all()
    assert (left + width <= SIZES[:, 1]).all()
    usual = np.flatnonzero(np.arange(COUNT) % 4 != 3)  # 1000x130 often takes the largest part in the center
    area = (height * width / SIZES.prod(1))[usual]
    assert area.min() >= 0.079
    assert area.max() <= 1
    ratio = (width / height)[usual]
    assert ratio.min() >= 0.73
    assert ratio.max() <= 1.37


def test_random_crops_are_drawn_as_by_torchvision() -> None:
    top, left, height, width = RandomCrops(0, 0, 0.08)(PLACES, np.array([[375, 500]] * COUNT)).T
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in PLACES])
    for ours, other in zip((top, left, height, width), theirs.T, strict=True):
        spread = other.std() / COUNT**0.5
        assert abs(ours.mean() - other.mean()) < 5 * spread  # of two means
        assert ours.std() == pytest.approx(other.std(), rel=0.06)


def test_a_random_crop_depends_on_seed_epoch_position_and_size_alone() -> None:
    crops = RandomCrops(7, 2, 0.2)(PLACES, SIZES)
    some = np.array([5, 1234, 17, 3999])
    assert (RandomCrops(7, 2, 0.2)(some, SIZES[some]) == crops[some]).all()
    for other in (RandomCrops(8, 2, 0.2), RandomCrops(7, 3, 0.2)):
        assert (other(PLACES, SIZES) != crops)[SIZES[:, 0] < 1000].any(1).mean() > 0.99


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (2, 3)])
def test_extreme_images_have_crops(size: tuple[int, int]) -> None:
    boxes = RandomCrops(0, 0, 0.08)(np.arange(100), np.array([size] * 100))
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    (box,) = CenterCrops(0.875)(np.zeros(1, np.int64), np.array([size])).tolist()
    assert box[2] == box[3] == 1 or size == (2, 3)


def test_center_crops_are_the_square_that_resize_and_crop_leave() -> None:
    (box,) = CenterCrops(0.875)(np.zeros(1, np.int64), np.array([[375, 500]])).tolist()
    assert box == [23, 86, 328, 328]  # 224 of 256 of 375 pixels, in the middle
