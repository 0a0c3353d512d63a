"""A residual network that a CPU trains in a minute or two, for figures in docs/benchmarks.md."""

from collections import OrderedDict

from torch import nn

from disttrain.models.layers import conv_bn, init_weights
from disttrain.models.resnet import basic_block


class SmallResNet(nn.Sequential):
    """Three stages of one residual block, of 16, 32 and 64 maps, after a convolution of stride 2."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        stages = nn.Sequential(basic_block(16, 16, 1), basic_block(16, 32, 2), basic_block(32, 64, 2))
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        stem = conv_bn(in_channels, 16, 3, stride=2)
        super().__init__(OrderedDict(stem=stem, stages=stages, classifier=classifier))
        init_weights(self)
