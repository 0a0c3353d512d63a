"""A small inception network for images of 32x32 pixels."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from disttrain.models.layers import conv_bn, init_weights, map_size


class Inception(nn.Module):
    """Four parallel branches whose maps are concatenated (Szegedy et al. 2014, figure 2b).

    Takes float [B, inputs, H, W]; returns float [B, direct + three + five + pooled, H, W].

    Args:
        inputs: channels of the input.
        direct: maps of the 1x1 branch.
        reduced: maps after the 1x1 convolution that reduces the input of the 3x3 and the 5x5 branch.
        three: maps of the 3x3 branch.
        five: maps of the 5x5 branch.
        pooled: maps of the branch of a 3x3 max pool and a 1x1 convolution.
    """

    def __init__(self, inputs: int, direct: int, reduced: int, three: int, five: int, pooled: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn(inputs, direct, 1),
                nn.Sequential(conv_bn(inputs, reduced, 1), conv_bn(reduced, three, 3)),
                nn.Sequential(conv_bn(inputs, reduced, 1), conv_bn(reduced, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv_bn(inputs, pooled, 1)),
            ]
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Returns the maps of all branches, along the channels."""
        return torch.cat([branch(maps) for branch in self.branches], dim=1)


class InceptionSmall(nn.Sequential):
    """Six inception modules in three stages, after GoogLeNet (Szegedy et al. 2014, table 1).

    Takes images float [B, in_channels, H, W], 3x32x32 by design and 5x5 or larger; returns scores
    float [B, num_classes].

    For a 32x32 image the stem returns 192 maps of 28x28, the input of GoogLeNet's first module. The modules
    have the output widths of GoogLeNet's 3a, 3b, 4a, 4e, 5a and 5b. Batch norm follows every convolution;
    there are no auxiliary heads.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        stem = nn.Sequential(conv_bn(in_channels, 64, 3, padding=0), conv_bn(64, 192, 3, padding=0))
        map_size(stem, image_size)
        modules = nn.Sequential(
            Inception(192, direct=64, reduced=64, three=128, five=32, pooled=32),
            Inception(256, direct=128, reduced=64, three=192, five=96, pooled=64),
            nn.MaxPool2d(3, 2, padding=1),
            Inception(480, direct=192, reduced=96, three=208, five=48, pooled=64),
            Inception(512, direct=256, reduced=128, three=320, five=128, pooled=128),
            nn.MaxPool2d(3, 2, padding=1),
            Inception(832, direct=256, reduced=128, three=320, five=128, pooled=128),
            Inception(832, direct=384, reduced=128, three=384, five=128, pooled=128),
        )
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, num_classes))
        super().__init__(OrderedDict(stem=stem, inceptions=modules, classifier=classifier))
        init_weights(self)
