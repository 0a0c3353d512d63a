"""Shared by several networks: image-size arithmetic, convolution with batch norm, and initialisation."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import nn

from disttrain.errors import UsageError


def map_size(layers: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width of the maps after a chain of convolutions and pools.

    Args:
        layers: modules that run in sequence, with square windows.
        image_size: height and width of the image in pixels.

    Raises:
        UsageError: the image is too small for the chain; the message has the smallest size.
    """
    height, width = _chain_length(layers, image_size[0]), _chain_length(layers, image_size[1])
    if min(height, width) < 1:
        smallest = next(side for side in count(1) if _chain_length(layers, side) >= 1)
        raise UsageError(
            f"images of {image_size[0]}x{image_size[1]} pixels are too small for this network; "
            f"the smallest are {smallest}x{smallest}"
        )
    return height, width


def conv_bn(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int | None = None, relu: bool = True
) -> nn.Sequential:
    """Returns a convolution without bias, its batch norm, and a ReLU.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the square kernel.
        stride: stride of the convolution.
        padding: zeros at each border; None keeps the size (for an odd kernel and stride 1).
        relu: whether to add the ReLU.
    """
    padding = kernel // 2 if padding is None else padding
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def init_weights(model: nn.Module) -> None:
    """Initialises convolutions as in He et al. 2015 (fan out) and linear layers as in Goyal et al. 2017.

    Linear weights with standard deviation 0.01 (section 5.1) make the loss start near ln(num_classes).
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def _chain_length(layers: nn.Module, length: int) -> int:
    for layer in layers.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, stride, padding = _side(layer.kernel_size), _side(layer.stride), _side(layer.padding)
            length = (length + 2 * padding - kernel) // stride + 1
            if length < 1:
                return 0
    return length


def _side(window: Any) -> int:
    return int(window[0] if isinstance(window, tuple) else window)
