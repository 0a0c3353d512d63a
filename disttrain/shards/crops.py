"""Which part of an image becomes a sample: pure functions of the seed, the epoch, the position and the size.

So an image is cropped the same way on any number of ranks and after any resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from disttrain import counter_rng

AREA, ASPECT, ROW, COLUMN = range(8, 12)
"""Streams of random numbers, for crops here and on the device."""
MAX_ASPECT = 4 / 3
"""Largest aspect ratio of a random crop; the smallest is the inverse."""

_ATTEMPTS = 10

Integers = npt.NDArray[np.int64]


class Crops(Protocol):
    """Chooses the crop of each image."""

    def __call__(self, positions: Integers, sizes: Integers) -> Integers:
        """Returns top, left, height and width of each crop in pixels: int64 [n, 4].

        Args:
            positions: of the images in the order of the epoch, int64 [n].
            sizes: height and width of the upright images in pixels, int64 [n, 2].
        """


@dataclass(frozen=True)
class CenterCrops:
    """The square in the center of each image.

    Resized to the side S, it is what others get if they resize the shorter side to S / share and then crop
    the center: up to the rounding to whole pixels of the image.

    Attributes:
        share: side of the square, as a share of the image's shorter side.
    """

    share: float

    def __call__(self, positions: Integers, sizes: Integers) -> Integers:
        """Returns the crops; see `Crops`."""
        sides = np.maximum(1, np.rint(self.share * sizes.min(1))).astype(np.int64)
        return np.stack([*((sizes - sides[:, None]) // 2).T, sides, sides], 1)


@dataclass(frozen=True)
class RandomCrops:
    """A random part of each image (Szegedy et al. 2014), drawn like torchvision's RandomResizedCrop.

    Area and aspect ratio are drawn until the crop fits into the image, ten times at most. Then it is the
    largest part in the center with an allowed aspect ratio.

    Attributes:
        seed: of the run.
        epoch: from 0.
        least_area: least share of the image's area; the largest is 1.
    """

    seed: int
    epoch: int
    least_area: float

    def __call__(self, positions: Integers, sizes: Integers) -> Integers:
        """Returns the crops; see `Crops`."""
        counters = positions[:, None] * _ATTEMPTS + np.arange(_ATTEMPTS)
        height, width = sizes[:, :1], sizes[:, 1:]
        area = height * width * (self.least_area + (1 - self.least_area) * self._draws(AREA, counters))
        ratio = np.exp((2 * self._draws(ASPECT, counters) - 1) * math.log(MAX_ASPECT))
        heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
        rows, first = np.arange(len(sizes)), fits.argmax(1)
        chosen = np.stack([heights[rows, first], widths[rows, first]], 1)
        chosen[~fits.any(1)] = _largest(sizes)[~fits.any(1)]
        free = sizes - chosen + 1
        draws = np.stack([self._draws(stream, counters[:, 0]) for stream in (ROW, COLUMN)], 1)
        corner = (draws * free).astype(np.int64)
        corner[~fits.any(1)] = ((sizes - chosen) // 2)[~fits.any(1)]
        return np.concatenate([corner, chosen], 1)

    def _draws(self, stream: int, counters: Integers) -> npt.NDArray[np.float64]:
        """Returns random numbers in (0, 1), in the shape of the counters."""
        return counter_rng.uniform_at(counter_rng.derive(self.seed, stream, self.epoch), counters)


def _largest(sizes: Integers) -> Integers:
    """Returns height and width of the largest part of each image with an allowed aspect ratio."""
    height, width = sizes.T
    return np.stack(
        [
            np.minimum(height, np.maximum(1, np.rint(width * MAX_ASPECT))),
            np.minimum(width, np.maximum(1, np.rint(height * MAX_ASPECT))),
        ],
        1,
    ).astype(np.int64)
