"""Residual networks for small and large images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from disttrain.models.layers import conv_bn, init_weights


class Residual(nn.Module):
    """Adds a branch to its input (He et al. 2015, section 3.2).

    Takes float [B, inputs, H, W]; returns float [B, outputs, H / stride, W / stride]. If the shape changes,
    a strided 1x1 convolution projects the input (option B of the paper).
    """

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        self.outputs = outputs
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride=stride, relu=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Returns ReLU(branch + shortcut)."""
        return torch.relu(self.branch(maps) + self.shortcut(maps))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Returns the block of two 3x3 convolutions (He et al. 2015, figure 5 left)."""
    branch = nn.Sequential(conv_bn(inputs, width, 3, stride=stride), conv_bn(width, width, 3, relu=False))
    return Residual(branch, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """Returns the 1x1, 3x3, 1x1 block (He et al. 2015, figure 5 right), strided in its 3x3 convolution."""
    branch = nn.Sequential(
        conv_bn(inputs, width, 1),
        conv_bn(width, width, 3, stride=stride),
        conv_bn(width, 4 * width, 1, relu=False),
    )
    return Residual(branch, inputs, 4 * width, stride)


class ResNet(nn.Sequential):
    """Four stages of residual blocks, a global average pool and a linear layer (He et al. 2015, table 1).

    Takes images float [B, in_channels, H, W] of any size; returns scores float [B, num_classes]. Images of up
    to 64x64 go through a 3x3 convolution of stride 1 first. Larger ones go through the paper's 7x7
    convolution and max pool, which divide the size by 4.

    Args:
        block: returns a block for its input channels, width and stride.
        depths: number of blocks in each of the four stages.
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], Residual],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
    ) -> None:
        if max(image_size) <= 64:
            stem = conv_bn(in_channels, 64, 3)
        else:
            stem = nn.Sequential(conv_bn(in_channels, 64, 7, stride=2), nn.MaxPool2d(3, 2, padding=1))
        stages = nn.Sequential()
        channels = 64
        for depth, width, stride in zip(depths, (64, 128, 256, 512), (1, 2, 2, 2), strict=True):
            stage = nn.Sequential()
            for number in range(depth):
                added = block(channels, width, 1 if number else stride)
                stage.append(added)
                channels = added.outputs
            stages.append(stage)
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        super().__init__(OrderedDict(stem=stem, stages=stages, classifier=classifier))
        init_weights(self)


resnet18 = partial(ResNet, basic_block, (2, 2, 2, 2))
resnet34 = partial(ResNet, basic_block, (3, 4, 6, 3))
resnet50 = partial(ResNet, bottleneck, (3, 4, 6, 3))
