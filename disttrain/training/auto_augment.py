"""What happens to which image: TrivialAugment, RandAugment, colour jitter and random erasing.

Every random choice is a function of (seed, epoch, position of the sample in the epoch), and is drawn on the
host. The operations, their magnitudes and their order are those of torchvision v2.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disttrain import counter_rng
from disttrain.config import AugmentConfig, ColorJitterConfig
from disttrain.data.epoch_plan import Ids
from disttrain.training.image_ops import Operation, Operations, Parameters, apply, blank

_OPERATION, _MAGNITUDE, _SIGN = range(28, 31)  # streams of random numbers
_JITTER, _ERASE = range(31, 33)
_BINS = 31  # number of magnitudes of an operation
_DRAWN = Operation.EQUALIZE + 1  # number of operations of TrivialAugment and of RandAugment
_ENHANCE = [Operation.BRIGHTNESS, Operation.SATURATION, Operation.CONTRAST, Operation.SHARPNESS]
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # shares of the image's area; height / width
_ERASE_ATTEMPTS = 10


class Policy:
    """Changes the images of an epoch, before and after they are normalized.

    Args:
        config: the augmentation of training images.
        seed: the seed of the run.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self.changes_pixels = (
            config.trivial_augment or config.rand_augment is not None or config.color_jitter is not None
        )

    def change(self, images: Tensor, epoch: int, places: Ids) -> Tensor:
        """Applies what is drawn for these places: uint8 [B, H, W, C] to the same, on the images' device."""
        config, (height, width) = self._config, images.shape[1:3]
        if config.trivial_augment:
            images = apply(images, *self._trivial(epoch, places))
        if config.rand_augment is not None:
            table = _rand_magnitudes(height, width)[:, config.rand_augment.magnitude]
            for number in range(config.rand_augment.num_ops):
                operations = self._integers(_OPERATION, epoch, places, _DRAWN, number)
                signs = self._signs(epoch, places, number)
                images = apply(images, operations, _parameters(operations, table[operations], signs))
        if config.color_jitter is not None:
            for operations, factors in self._jitter(config.color_jitter, epoch, places):
                images = apply(images, operations, factors)
        return images

    def erase(self, images: Tensor, epoch: int, places: Ids) -> Tensor:
        """Sets a rectangle to 0 in some normalized images [B, C, H, W] (Zhong et al. 2020)."""
        boxes = self.erased(epoch, places, *images.shape[2:])
        top, bottom, left, right = torch.from_numpy(boxes).to(images.device, non_blocking=True).unbind(1)
        return blank(images, top, bottom, left, right)

    def erased(self, epoch: int, places: Ids, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns (top, bottom, left, right) of what is erased, int64 [B, 4]; all are 0 for nothing."""
        boxes = np.zeros((len(places), 4), np.int64)
        still = self._uniform(_ERASE, epoch, places, 0, 0) < self._config.random_erasing
        for attempt in range(1, _ERASE_ATTEMPTS + 1):
            area, aspect, row, column = (
                self._uniform(_ERASE, epoch, places, attempt, number) for number in range(4)
            )
            pixels = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * area)
            low, high = np.log(_ERASED_ASPECT)
            ratio = np.exp(low + (high - low) * aspect)
            rows, columns = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
            fits = still & (rows < height) & (columns < width)
            top, left = np.floor(row * (height - rows + 1)), np.floor(column * (width - columns + 1))
            boxes[fits] = np.stack([top, top + rows, left, left + columns], 1)[fits].astype(np.int64)
            still &= ~fits
        return boxes

    def _trivial(self, epoch: int, places: Ids) -> tuple[Operations, Parameters]:
        """One operation of any strength (Müller & Hutter 2021)."""
        operations = self._integers(_OPERATION, epoch, places, _DRAWN)
        bins = self._integers(_MAGNITUDE, epoch, places, _BINS)
        magnitudes = _wide_magnitudes()[operations, bins]
        return operations, _parameters(operations, magnitudes, self._signs(epoch, places))

    def _jitter(
        self, config: ColorJitterConfig, epoch: int, places: Ids
    ) -> Iterator[tuple[Operations, Parameters]]:
        """Four operations in a random order; those that are off do nothing."""
        ranges = {
            Operation.BRIGHTNESS: (max(0.0, 1 - config.brightness), 1 + config.brightness),
            Operation.CONTRAST: (max(0.0, 1 - config.contrast), 1 + config.contrast),
            Operation.SATURATION: (max(0.0, 1 - config.saturation), 1 + config.saturation),
            Operation.HUE: (-config.hue, config.hue),
        }
        settings = (config.brightness, config.contrast, config.saturation, config.hue)
        known = np.array([op if on else Operation.IDENTITY for op, on in zip(ranges, settings, strict=True)])
        factors = np.stack(
            [
                low + (high - low) * self._uniform(_JITTER, epoch, places, 1, number)
                for number, (low, high) in enumerate(ranges.values())
            ],
            1,
        )
        ranks = [self._uniform(_JITTER, epoch, places, 0, number) for number in range(len(ranges))]
        for which in np.argsort(np.stack(ranks), axis=0, kind="stable"):
            yield known[which], factors[np.arange(len(places)), which]

    def _signs(self, epoch: int, places: Ids, number: int = 0) -> Parameters:
        return np.where(self._integers(_SIGN, epoch, places, 2, number) == 0, 1.0, -1.0)

    def _integers(self, stream: int, epoch: int, places: Ids, below: int, number: int = 0) -> Operations:
        key = counter_rng.derive(self._seed, stream, epoch, number)
        return counter_rng.integers_at(key, places, below)

    def _uniform(self, stream: int, epoch: int, places: Ids, *numbers: int) -> Parameters:
        return counter_rng.uniform_at(counter_rng.derive(self._seed, stream, epoch, *numbers), places)


def _wide_magnitudes() -> Parameters:
    """Returns TrivialAugmentWide's magnitude of each operation and bin, float64 [operations, bins]."""
    return _magnitudes(0.99, (32.0, 32.0), 135.0, 0.99, posterized=6)


def _rand_magnitudes(height: int, width: int) -> Parameters:
    """Returns RandAugment's magnitude of each operation and bin, float64 [operations, bins]."""
    share = 150.0 / 331.0
    return _magnitudes(0.3, (share * width, share * height), 30.0, 0.9, posterized=4)


def _magnitudes(
    shear: float, translate: tuple[float, float], rotate: float, enhance: float, *, posterized: int
) -> Parameters:
    """Returns magnitudes from the least to the one given, in float32 steps as torchvision takes them."""
    most = dict.fromkeys(_ENHANCE, enhance) | {
        Operation.SHEAR_X: shear,
        Operation.SHEAR_Y: shear,
        Operation.TRANSLATE_X: translate[0],
        Operation.TRANSLATE_Y: translate[1],
        Operation.ROTATE: rotate,
    }
    table = np.zeros((_DRAWN, _BINS))
    for operation, last in most.items():
        table[operation] = torch.linspace(0.0, last, _BINS).numpy()
    table[Operation.POSTERIZE] = (8 - torch.arange(_BINS) / ((_BINS - 1) / posterized)).round().numpy()
    table[Operation.SOLARIZE] = torch.linspace(1.0, 0.0, _BINS).numpy()
    return table


def _parameters(operations: Operations, magnitudes: Parameters, signs: Parameters) -> Parameters:
    """Returns the parameters of operations from magnitudes; some take a random sign."""
    signed = magnitudes * signs
    return np.select(
        [
            np.isin(operations, _ENHANCE),
            operations == Operation.POSTERIZE,
            operations == Operation.SOLARIZE,
            np.isin(operations, [Operation.TRANSLATE_X, Operation.TRANSLATE_Y]),
        ],
        [1.0 + signed, magnitudes, 255.0 * magnitudes, np.trunc(signed)],
        signed,
    )
