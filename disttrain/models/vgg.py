"""VGG networks with batch norm and a small head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import nn

from disttrain.models.layers import conv_bn, init_weights, map_size


class VGG(nn.Sequential):
    """Five stages of 3x3 convolutions, each followed by a max pool (Simonyan & Zisserman 2014, table 1).

    Takes images float [B, in_channels, H, W], 3x32x32 by design and 32x32 or larger; returns scores
    float [B, num_classes].

    Batch norm follows every convolution (Ioffe & Szegedy 2015). A global average pool and one linear layer
    replace the paper's three linear layers, whose 4096 units are for maps of 7x7.

    Args:
        depths: number of convolutions in each of the five stages.
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.
        dropout: probability of dropping a feature before the linear layer.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        dropout: float = 0.5,
    ) -> None:
        features = nn.Sequential()
        channels = in_channels
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                features.append(conv_bn(channels, width, 3))
                channels = width
            features.append(nn.MaxPool2d(2))
        map_size(features, image_size)
        classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, num_classes)
        )
        super().__init__(OrderedDict(features=features, classifier=classifier))
        init_weights(self)


vgg16 = partial(VGG, (2, 2, 3, 3, 3))  # configuration D: 13 convolutions
vgg19 = partial(VGG, (2, 2, 4, 4, 4))  # configuration E: 16 convolutions
