"""Small convolutional networks of up to 100,000 parameters, for MNIST, CIFAR-10 and the like."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from disttrain.errors import UsageError
from disttrain.models.layers import map_size


def _stages(
    channels: int,
    widths: Sequence[int],
    kernel: int,
    *,
    padding: int = 0,
    activate: type[nn.Module] = nn.ReLU,
    pool: tuple[int, int, int] = (2, 2, 0),
) -> nn.Sequential:
    """Returns a convolution, an activation and a max pool for each width.

    `pool` is the kernel, stride and padding of the pools.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((channels, *widths)):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=padding), activate(), nn.MaxPool2d(*pool)]
    return nn.Sequential(*layers)


class CnnMnist(nn.Sequential):
    """Two 3x3 convolutions and one linear layer.

    Takes images float [B, in_channels, H, W], 1x28x28 by design and 4x4 or larger; returns scores
    float [B, num_classes].
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        features = _stages(in_channels, (8, 16), 3, padding=1)
        height, width = map_size(features, image_size)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(16 * height * width, num_classes))
        super().__init__(OrderedDict(features=features, classifier=classifier))


def _lenet_head(inputs: int, num_classes: int, activate: type[nn.Module]) -> nn.Sequential:
    """Returns the linear layers of LeNet-5."""
    layers = (nn.Linear(inputs, 120), activate(), nn.Linear(120, 84), activate(), nn.Linear(84, num_classes))
    return nn.Sequential(nn.Flatten(), *layers)


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al. 1998, section II.B): tanh and average pooling, 28x28 digits padded to 32x32.

    Takes images float [B, in_channels, H, W], 1x28x28 by design and 12x12 or larger; returns scores
    float [B, num_classes].

    It differs from the paper in four points: the pooling has no trainable coefficient, bias and squashing
    function; each map of C3 sees all six maps of S2; tanh is not scaled; the output is a linear layer for a
    softmax instead of Euclidean radial basis functions. C5 is a linear layer, which for 28x28 images is the
    same as the paper's 5x5 convolution.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
        )
        height, width = map_size(features, image_size)
        classifier = _lenet_head(16 * height * width, num_classes, nn.Tanh)
        super().__init__(OrderedDict(features=features, classifier=classifier))


class LeNetBN(nn.Sequential):
    """LeNet-5 with ReLU, max pooling and a batch norm before the linear layers.

    Takes images float [B, in_channels, H, W], 3x32x32 by design and 16x16 or larger; returns scores
    float [B, num_classes].
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        features = _stages(in_channels, (6, 16), 5).append(nn.BatchNorm2d(16))
        height, width = map_size(features, image_size)
        classifier = _lenet_head(16 * height * width, num_classes, nn.ReLU)
        super().__init__(OrderedDict(features=features, classifier=classifier))


class TrafficCNN(nn.Sequential):
    """Two 5x5 convolutions of 4 and 10 kernels and one linear layer, for small images such as traffic signs.

    Takes images float [B, in_channels, H, W], 3x32x32 by design and 16x16 or larger; returns scores
    float [B, num_classes].
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        features = _stages(in_channels, (4, 10), 5)
        height, width = map_size(features, image_size)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(10 * height * width, num_classes))
        super().__init__(OrderedDict(features=features, classifier=classifier))


_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class ConvNet4(nn.Sequential):
    """Four layers with weights, to compare activations (Krizhevsky et al. 2012, section 3.1, figure 1).

    Takes images float [B, in_channels, H, W], 3x32x32 by design, of any size; returns scores
    float [B, num_classes].

    The paper does not give the widths of its network. These are from the first author's CIFAR-10 network in
    cuda-convnet: 32, 32 and 64 kernels of 5x5 and overlapping pools, here always max pools.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: tuple[int, int], activation: str = "relu"
    ) -> None:
        if activation not in _ACTIVATIONS:
            choices = ", ".join(_ACTIVATIONS)
            raise UsageError(f"model.args.activation: expected one of {choices}, got {activation!r}")
        features = _stages(
            in_channels, (32, 32, 64), 5, padding=2, activate=_ACTIVATIONS[activation], pool=(3, 2, 1)
        )
        height, width = map_size(features, image_size)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * height * width, num_classes))
        super().__init__(OrderedDict(features=features, classifier=classifier))
