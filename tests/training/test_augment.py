"""Augmentation against slow references, and its independence of the ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.config import AugmentConfig
from disttrain.training.augment import Augment, Mix
from disttrain.training.normalize import Normalize

EVERYTHING = {"crop_padding": 2, "flip": True, "cutout": 3}
RESIZED = {"resized_crop": 0.2, "flip": True, "cutout": 3}


def augment(
    seed: int = 0,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    channels_last: bool = True,
    **config: Any,
) -> Augment:
    # A row of a single pixel: fits images of any width.
    normalize = Normalize(mean, std, 1, channels_last=channels_last)
    return Augment(AugmentConfig(**config), seed=seed, normalize=normalize)


def started(samples: int, height: int, width: int, epoch: int = 0, **options: Any) -> Augment:
    result = augment(**options)
    result.start_epoch(epoch, np.arange(samples), height, width)
    return result


def random_images(count: int, height: int = 7, width: int = 6, channels: int = 1) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return torch.from_numpy(pixels)


def train(images: torch.Tensor, epoch: int = 0, **options: Any) -> torch.Tensor:
    count, height, width, _ = images.shape
    return started(count, height, width, epoch, **options).train(images, slice(0, count))


# --- Normalizing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_takes_off_mean_and_divides_by_deviation(channels: int, channels_last: bool) -> None:
    mean, std = (0.49, 0.48, 0.45)[:channels], (0.2, 0.25, 0.3)[:channels]
    images = random_images(5, channels=channels)
    result = Normalize(mean, std, 6, channels_last=channels_last)(images)
    expected = (images.numpy().astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    assert result.dtype == torch.float32
    assert result.shape == (5, channels, 7, 6)
    np.testing.assert_allclose(result.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


def test_a_constant_channel_is_zero() -> None:
    images = random_images(4, channels=3)
    images[..., 1] = 102
    result = augment(mean=(0.5, 0.4, 0.5), std=(0.2, 0.0, 0.2)).normalize(images)
    assert result.isfinite().all()
    assert result[:, 1].abs().max() < 1e-6


def test_without_augmentation_training_images_are_plain() -> None:
    images = random_images(9)
    plain = augment(mean=(0.3,), std=(0.2,)).normalize(images)
    assert torch.equal(train(images, mean=(0.3,), std=(0.2,)), plain)


# --- Crop and flip ----------------------------------------------------------------------------------


def test_large_images_are_flipped_where_small_ones_are() -> None:
    large, small = random_images(40, 70, 64, 3), random_images(40, channels=3)
    flipped = []
    for images in (large, small):
        plain, found = train(images), train(images, flip=True)
        sides = [torch.equal(one, other.flip(2)) for one, other in zip(found, plain, strict=True)]
        same = [torch.equal(one, other) for one, other in zip(found, plain, strict=True)]
        assert [not side for side in sides] == same
        flipped.append(sides)
    assert flipped[0] == flipped[1]
    assert 5 < sum(flipped[0]) < 35


def references(image: np.ndarray, padding: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Returns every crop and flip of one image [H, W, C], with its choice."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    found = {}
    for top, left, flipped in product(range(2 * padding + 1), range(2 * padding + 1), (False, True)):
        crop = padded[top : top + height, left : left + width]
        if flip or not flipped:
            found[(crop[:, ::-1] if flipped else crop).tobytes()] = (top, left, flipped)
    return found


def as_bytes(result: torch.Tensor) -> list[bytes]:
    """Undoes the normalization by mean 0 and deviation 1."""
    pixels = (result * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [image.tobytes() for image in pixels]


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (2, True), (5, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_are_those_of_the_reflected_image(padding: int, flip: bool, channels: int) -> None:
    images = random_images(200, channels=channels)
    result = as_bytes(train(images, crop_padding=padding, flip=flip))
    for image, augmented in zip(images.numpy(), result, strict=True):
        assert augmented in references(image, padding, flip)


def test_every_offset_and_flip_is_as_likely() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1)
    known = references(image[0].numpy(), 2, flip=True)
    assert len(known) == 50
    result = train(image.expand(50_000, -1, -1, -1), crop_padding=2, flip=True)
    counts = Counter(known[augmented] for augmented in as_bytes(result))
    assert len(counts) == 50
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 49 + 5 * 98**0.5


# --- Cutout -----------------------------------------------------------------------------------------


def hole(size: int, centre: int, length: int) -> tuple[int, ...]:
    """Returns the rows or columns of a hole: `size` around the centre, one more before it if even."""
    first = centre - size // 2
    return tuple(place for place in range(first, first + size) if 0 <= place < length)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cutout_is_a_clipped_square_with_a_uniform_centre(size: int) -> None:
    height, width, count = 7, 6, 8400
    images = torch.full((count, height, width, 3), 255, dtype=torch.uint8)
    result = train(images, cutout=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    cut = result == 0
    assert cut.any(1).eq(cut.all(1)).all()  # all channels together
    rows, columns = cut[:, 0].any(2), cut[:, 0].any(1)
    assert cut[:, 0].eq(rows[:, :, None] & columns[:, None, :]).all()
    for found, length in ((rows, height), (columns, width)):
        counts = Counter(tuple(line.nonzero().flatten().tolist()) for line in found)
        assert set(counts) == {hole(size, centre, length) for centre in range(length)}
        assert max(abs(n - count / length) for n in counts.values()) < 5 * (count / length) ** 0.5


def test_cutout_comes_after_crop_and_flip() -> None:
    images = random_images(100)
    uncut = train(images, crop_padding=2, flip=True, mean=(0.5,), std=(0.2,))
    result = train(images, **EVERYTHING, mean=(0.5,), std=(0.2,))
    assert torch.equal(result, torch.where(result == 0, 0, uncut))
    assert (result != uncut).any()


# --- Any number of ranks ----------------------------------------------------------------------------


def ramps(count: int, height: int, width: int) -> torch.Tensor:
    """Images with the column of each pixel in the first channel, the row in the second, 7 in the third."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([columns, rows, torch.full_like(rows, 7)], 2).to(torch.uint8)
    return image.expand(count, -1, -1, -1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_resized_crop_enlarges_a_part_of_the_image_to_the_whole(flip: bool, channels_last: bool) -> None:
    count, height, width = 2000, 24, 40
    pixels: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    result = train(
        ramps(count, height, width), resized_crop=0.25, flip=flip, channels_last=channels_last, **pixels
    )
    assert result.shape == (count, 3, height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(result[:, 2], torch.full_like(result[:, 2], 7))
    # What was linear still is: two pixels in the middle tell where the part lies.
    columns, rows = result[:, 0, height // 2, :], result[:, 1, :, width // 2]
    torch.testing.assert_close(result[:, 0], columns[:, None, :].expand(-1, height, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(result[:, 1], rows[:, :, None].expand(-1, -1, width), atol=1e-3, rtol=0)
    across = columns[:, width // 2] - columns[:, width // 2 - 1]  # pixels of the image in one of the result
    down = rows[:, height // 2] - rows[:, height // 2 - 1]
    assert (across < 0).float().mean() == pytest.approx(0.5 if flip else 0.0, abs=0.05)
    wide, high = across.abs() * width, down * height
    centre = (columns[:, width // 2] + columns[:, width // 2 - 1]) / 2 + 0.5
    assert (centre - wide / 2).min() > -0.01
    assert (centre + wide / 2).max() < width + 0.01
    assert (centre - wide / 2).min() < 0.5, "at the border, too"
    free = (wide < width - 0.01) & (high < height - 0.01)  # the others were cut to the length of the image
    share = wide * high / (width * height)
    assert share.max() <= 1.001
    assert 0.249 < share[free].min() < 0.27
    aspect = (wide / high)[free]
    assert aspect.min() > 3 / 4 - 1e-2
    assert aspect.max() < 4 / 3 + 1e-2
    assert aspect.max() / aspect.min() > 1.6


@pytest.mark.parametrize("config", [EVERYTHING, RESIZED])
def test_parts_of_a_batch_are_augmented_as_the_whole(config: dict[str, Any]) -> None:
    images = random_images(30)
    one = started(30, 7, 6, **config)
    whole = one.train(images, slice(0, 30))
    other = started(30, 7, 6, **config)  # another rank
    assert torch.equal(other.train(images[17:], slice(17, 30)), whole[17:])
    assert torch.equal(other.train(images[:17], slice(0, 17)), whole[:17])
    places = np.array([29, 3, 3, 0])
    assert torch.equal(other.train(images[places], places), whole[places])


def test_every_epoch_and_seed_augments_differently() -> None:
    image = random_images(1).expand(200, -1, -1, -1)
    results = {
        key: as_bytes(train(image, epoch=epoch, seed=seed, **EVERYTHING))
        for key in product(range(3), range(3))
        for seed, epoch in [key]
    }
    assert len({tuple(result) for result in results.values()}) == 9
    same = as_bytes(train(image, epoch=1, seed=2, **EVERYTHING))
    assert results[2, 1] == same


def test_alternating_flips_show_every_sample_from_both_sides_in_turn() -> None:
    images = random_images(200)
    orders = [np.random.default_rng(epoch).permutation(200) for epoch in range(4)]
    flipped = []
    for epoch, order in enumerate(orders):
        augmentation = augment(flip="alternating", std=(1 / 255,))
        augmentation.start_epoch(epoch, order, 7, 6)
        result = augmentation.train(images[torch.from_numpy(order)], slice(0, 200)).round().byte()
        mirrored = images[torch.from_numpy(order)].flip(2).permute(0, 3, 1, 2)
        sides = (result == mirrored).flatten(1).all(1)
        assert torch.equal(result[~sides], images[torch.from_numpy(order)].permute(0, 3, 1, 2)[~sides])
        by_sample = np.empty(200, bool)
        by_sample[order] = sides.numpy()
        flipped.append(by_sample)
    assert 70 < flipped[0].sum() < 130
    for before, after in itertools.pairwise(flipped):
        assert (before != after).all()


def test_the_choices_of_one_sample_are_independent() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1)
    known = references(image[0].numpy(), 2, flip=True)
    result = as_bytes(train(image.expand(20_000, -1, -1, -1), crop_padding=2, flip=True))
    choices = np.array([known[augmented] for augmented in result], dtype=np.float64)
    later = np.roll(choices, 1, axis=0)
    correlation = np.corrcoef(np.hstack([choices, later]).T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / 20_000**0.5


# --- Mixing -----------------------------------------------------------------------------------------


def mixes(count: int = 2000, batch: int = 8, **config: float) -> list[Mix]:
    one = augment(**config)
    found = [one.mix(epoch, step, batch, 10, 12) for epoch in range(2) for step in range(count // 2)]
    return [mix for mix in found if mix is not None]


@pytest.mark.parametrize("config", [{}, {"mixup": 0.0, "cutmix": 0.0}, EVERYTHING])
def test_mixing_is_off_by_default(config: dict[str, Any]) -> None:
    assert augment(**config).mix(0, 0, 8, 10, 12) is None


@pytest.mark.parametrize("config", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_one_sample_has_no_partner(config: dict[str, Any]) -> None:
    assert augment(**config).mix(0, 0, 1, 10, 12) is None


@pytest.mark.parametrize("config", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_partners_are_others_of_the_batch_and_each_is_as_likely(config: dict[str, Any]) -> None:
    found = mixes(**config)
    assert len(found) == 2000
    counts = Counter(mix.shift for mix in found)
    assert set(counts) == set(range(1, 8))
    assert max(abs(count - 2000 / 7) for count in counts.values()) < 5 * (2000 / 7) ** 0.5


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_of_mixup_has_a_beta_distribution(alpha: float) -> None:
    found = mixes(mixup=alpha)
    assert all(mix.box is None for mix in found)
    shares = np.array([mix.lam for mix in found])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * (variance / 2000) ** 0.5
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_the_share_of_cutmix_is_what_the_box_leaves() -> None:
    found = mixes(cutmix=1.0)
    boxes = [mix.box for mix in found if mix.box is not None]
    assert len(boxes) == 2000
    for mix, (top, bottom, left, right) in zip(found, boxes, strict=True):
        assert 0 <= top <= bottom <= 10
        assert 0 <= left <= right <= 12
        assert mix.lam == pytest.approx(1 - (bottom - top) * (right - left) / 120, abs=1e-12)
    areas = [(bottom - top) * (right - left) / 120 for top, bottom, left, right in boxes]
    assert 0.25 < float(np.mean(areas)) < 0.45
    assert max(areas) > 0.7
    covered = np.zeros((10, 12))
    for top, bottom, left, right in boxes:
        covered[top:bottom, left:right] += 1
    assert covered.min() > 0.1 * covered.max()


def test_both_kinds_alternate_at_random() -> None:
    kinds = [mix.box is None for mix in mixes(mixup=0.2, cutmix=1.0)]
    assert abs(sum(kinds) - 1000) < 5 * 500**0.5


def test_all_ranks_mix_alike_and_every_step_differently() -> None:
    assert mixes(mixup=0.2, cutmix=1.0) == mixes(mixup=0.2, cutmix=1.0)
    shares = {mix.lam for mix in mixes(mixup=1.0)}
    assert len(shares) == 2000
    assert mixes(mixup=1.0, seed=1)[0] != mixes(mixup=1.0)[0]
