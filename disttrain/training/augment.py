"""Augmentation of whole batches, on the device.

Every random choice is a function of (seed, epoch, position of the sample in the epoch) or of the sample id.
So an image is augmented the same way on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain import counter_rng
from disttrain.config import AugmentConfig
from disttrain.data.epoch_plan import Ids
from disttrain.shards.crops import AREA, ASPECT, COLUMN, MAX_ASPECT, ROW
from disttrain.training.auto_augment import Policy
from disttrain.training.image_ops import blank
from disttrain.training.normalize import Normalize

_ROWS, _COLUMNS, _FLIP, _CUT_ROWS, _CUT_COLUMNS, _MIX = range(2, 8)  # streams of random numbers
_LARGE = 64 * 64  # pixels; on a CPU, such images are copied whole
_FINE = 2**24  # number of values that a random number in 0..1 can have


@dataclass(frozen=True)
class Mix:
    """How the samples of a global batch are mixed with each other.

    Attributes:
        shift: sample p of the batch is mixed with sample (p + shift) modulo the batch size.
        lam: weight of the sample; its partner has weight 1 - lam.
        box: rows and columns (top, bottom, left, right) pasted from the partner, or None to blend.
    """

    shift: int
    lam: float
    box: tuple[int, int, int, int] | None


class Augment:
    """Turns stored uint8 images into the network's input.

    Args:
        config: the augmentation of training images.
        seed: the seed of the run.
        normalize: on the device of the images.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, normalize: Normalize) -> None:
        self.normalize = normalize
        self._config = config
        self._seed = seed
        self._device = normalize.offset.device
        self._draws: dict[int, Tensor] = {}
        self._policy = Policy(config, seed)
        self._epoch = 0
        self._crops: Tensor | None = None  # centre and half size of each crop, in grid_sample's units

    @property
    def same_in_any_batch(self) -> bool:
        """Whether an image gets the same bits in a batch of any size.

        Copies of pixels do, and the normalization of each row of pixels. Sums over pixels may not.
        """
        return self._config.resized_crop is None and not self._policy.changes_pixels

    def start_epoch(self, epoch: int, order: Ids, height: int, width: int) -> None:
        """Draws the random choices of an epoch, counted from 0, for every position in its order."""
        self._epoch = epoch
        padding, size = self._config.crop_padding, self._config.cutout
        ranges: dict[int, int] = {}
        if padding:
            ranges |= {_ROWS: 2 * padding + 1, _COLUMNS: 2 * padding + 1}
        if self._config.flip is True:
            ranges |= {_FLIP: 2}
        if size:
            ranges |= {_CUT_ROWS: height, _CUT_COLUMNS: width}
        for stream, below in ranges.items():
            draws = counter_rng.integers(counter_rng.derive(self._seed, stream, epoch), len(order), below)
            self._draws[stream] = torch.from_numpy(draws).to(self._device)
        if self._config.resized_crop is not None:
            self._crops = torch.from_numpy(self._draw_crops(epoch, len(order), height, width)).to(
                self._device
            )
        if self._config.flip == "alternating":  # this choice depends on the sample, not on its position
            first = counter_rng.bits_at(counter_rng.derive(self._seed, _FLIP), order.astype(np.uint64))
            flips = ((first >> np.uint64(63)).astype(np.int64) + epoch) % 2
            self._draws[_FLIP] = torch.from_numpy(flips).to(self._device)

    def train(self, images: Tensor, places: slice | Ids) -> Tensor:
        """Crops, resizes, flips, changes pixels, normalizes and cuts out holes. Does not wait for the device.

        Args:
            images: uint8 [B, H, W, C].
            places: positions of these images in the epoch: a slice, or int64 [B].

        Returns:
            float32 [B, C, H, W].
        """
        known = np.arange(places.start, places.stop) if isinstance(places, slice) else places
        there: slice | Tensor
        if isinstance(places, slice):
            there = places
        else:
            there = torch.from_numpy(places).to(self._device, non_blocking=True)
        if self._crops is not None and not self._policy.changes_pixels:
            result = self._resize_crops(self.normalize(images), there)
        else:
            if self._crops is not None:
                crops = self._resize_crops(images.permute(0, 3, 1, 2).float(), there)
                images = crops.round_().byte().permute(0, 2, 3, 1)
            elif _ROWS in self._draws or _FLIP in self._draws:
                images = self._crop_and_flip(images, there)
            if self._policy.changes_pixels:
                images = self._policy.change(images, self._epoch, known)
            result = self.normalize(images)
        if self._config.random_erasing:
            result = self._policy.erase(result, self._epoch, known)
        if _CUT_ROWS in self._draws:
            half = self._config.cutout / 2
            row, column = self._draws[_CUT_ROWS][there], self._draws[_CUT_COLUMNS][there]
            result = blank(result, row - half, row + half, column - half, column + half)
        return result

    def mix(self, epoch: int, step: int, batch: int, height: int, width: int) -> Mix | None:
        """Returns how to mix the global batch of `batch` samples in a step of an epoch, or None."""
        mixup, cutmix = self._config.mixup, self._config.cutmix
        if not (mixup or cutmix) or batch < 2:
            return None
        key = counter_rng.derive(self._seed, _MIX, epoch, step)
        draws = counter_rng.uniform(key, 4)
        shift = 1 + int(draws[0] * (batch - 1))
        use_cutmix = bool(cutmix) and (not mixup or draws[1] < 0.5)
        lam = counter_rng.symmetric_beta(counter_rng.derive(key, 1), cutmix if use_cutmix else mixup)
        if not use_cutmix:
            return Mix(shift, lam, None)
        side = (1 - lam) ** 0.5
        row, column = int(draws[2] * height), int(draws[3] * width)
        top, bottom = np.clip([row - side * height / 2, row + side * height / 2], 0, height).astype(int)
        left, right = np.clip([column - side * width / 2, column + side * width / 2], 0, width).astype(int)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        return Mix(shift, float(kept), (int(top), int(bottom), int(left), int(right)))

    def _draw_crops(self, epoch: int, count: int, height: int, width: int) -> npt.NDArray[np.float32]:
        """Returns (column, row) of the centre and of half the size of each crop: float32 [count, 2, 2].

        The unit is half the image, the origin is its centre. A crop that would be longer than the image is
        cut to the image's length, which changes the aspect ratio.
        """
        area, aspect, row, column = (
            counter_rng.integers(counter_rng.derive(self._seed, stream, epoch), count, _FINE) / _FINE
            for stream in (AREA, ASPECT, ROW, COLUMN)
        )
        least = self._config.resized_crop
        assert least is not None
        pixels = (least + (1 - least) * area) * height * width
        ratio = np.exp((2 * aspect - 1) * np.log(MAX_ASPECT))
        half = np.stack([np.sqrt(pixels * ratio) / width, np.sqrt(pixels / ratio) / height], 1).clip(max=1)
        centre = (1 - half) * (2 * np.stack([column, row], 1) - 1)
        return np.stack([centre, half], 1).astype(np.float32)

    def _resize_crops(self, images: Tensor, places: slice | Tensor) -> Tensor:
        """Resizes the crop of each image to the image's size, and flips it if drawn: float32 [B, C, H, W]."""
        assert self._crops is not None
        centre, half = self._crops[places].unbind(1)
        if _FLIP in self._draws:
            sides = torch.where(self._draws[_FLIP][places] == 1, -1.0, 1.0)
            half = torch.stack([half[:, 0] * sides, half[:, 1]], 1)
        theta = torch.cat([torch.diag_embed(half), centre[:, :, None]], 2)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        result = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        order = torch.channels_last if self.normalize.channels_last else torch.contiguous_format
        return result.contiguous(memory_format=order)

    def _crop_and_flip(self, images: Tensor, places: slice | Tensor) -> Tensor:
        batch, height, width, channels = images.shape
        if _ROWS not in self._draws and height * width >= _LARGE and images.device.type == "cpu":
            flipped = images.clone()
            for place in self._draws[_FLIP][places].nonzero().view(-1).tolist():
                flipped[place] = images[place].flip(1)
            return flipped
        rows = torch.arange(height, device=self._device)
        columns = torch.arange(width, device=self._device)
        if _ROWS in self._draws:
            padding = self._config.crop_padding
            rows = _reflect(rows + (self._draws[_ROWS][places, None] - padding), height)
            columns = _reflect(columns + (self._draws[_COLUMNS][places, None] - padding), width)
        if _FLIP in self._draws:
            columns = torch.where(self._draws[_FLIP][places, None] == 1, columns.flip(-1), columns)
        # One gather of whole pixels is several times faster than indexing by image, row and column.
        lines = torch.arange(0, batch * height, height, device=self._device)[:, None] + rows
        pixels = (lines[:, :, None] * width + columns.expand(batch, -1)[:, None, :]).view(-1)
        return images.reshape(-1, channels).index_select(0, pixels).view(batch, height, width, channels)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Maps indices outside 0..size-1 back by reflection at the border pixels."""
    return size - 1 - (size - 1 - index.abs()).abs()
