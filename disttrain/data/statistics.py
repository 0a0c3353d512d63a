"""What is subtracted from the images of a data set, and by what they are divided."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.config import DataConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixel values in 0..1, red, green and blue, as all weights of torchvision are used with."""


def statistics(
    config: DataConfig, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation per channel, of pixel values in 0..1, that the images are normalized with.

    Args:
        config: its `normalize` decides.
        mean: of the data set, per channel.
        std: of the data set, per channel.
    """
    if config.normalize == "imagenet":
        if len(mean) == 1:  # of gray images, the means over the colours
            return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
        return IMAGENET_MEAN, IMAGENET_STD
    if config.normalize == "unit":
        return (0.0,) * len(mean), (1.0,) * len(mean)
    return tuple(mean), tuple(std)
