"""The mean and standard deviation that images are normalized with."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.config import DataConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For red, green and blue in 0..1, as all of torchvision's weights expect."""


def statistics(
    config: DataConfig, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation per channel for `data.normalize`, of pixel values in 0..1.

    Args:
        config: its `normalize` is used.
        mean: the data set's mean per channel.
        std: the data set's standard deviation per channel.
    """
    if config.normalize == "imagenet":
        if len(mean) == 1:  # for gray images, the averages over the colours
            return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
        return IMAGENET_MEAN, IMAGENET_STD
    if config.normalize == "unit":
        return (0.0,) * len(mean), (1.0,) * len(mean)
    return tuple(mean), tuple(std)
