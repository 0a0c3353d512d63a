"""AlexNet for images of 32x32 pixels."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from disttrain.models.layers import map_size


class AlexNetCifar(nn.Sequential):
    """Five convolutions and three linear layers (Krizhevsky et al. 2012, section 3.5), reduced to 32x32.

    Takes images float [B, in_channels, H, W], 3x32x32 by design and 18x18 or larger; returns scores
    float [B, num_classes]. Kernels and widths are smaller than in the paper. It keeps the overlapping pools
    and dropout, but not the local response normalization.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: tuple[int, int], dropout: float = 0.5
    ) -> None:
        features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 4, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 4, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        height, width = map_size(features, image_size)
        classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(256 * height * width, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )
        super().__init__(OrderedDict(features=features, classifier=classifier))
