"""Image operations as torchvision v2 defines them, each with its own parameter for every image of a batch.

The pixels are those of torchvision's functions, which take one parameter for all images of a call. An image
is changed in the same way in any batch. This module draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_VALUES = {"cpu": 2**18}  # pixel values in one call: on a CPU as many as its cache holds
_MOST_VALUES = 2**25  # elsewhere, to bound the memory
_GRAY = [float(np.float32(weight)) for weight in (0.2989, 0.587, 0.114)]

Parameters = npt.NDArray[np.float64]
Operations = npt.NDArray[np.int64]


class Operation(IntEnum):
    """An operation, and the meaning of its parameter."""

    IDENTITY = 0
    """Ignores it, as AUTO_CONTRAST and EQUALIZE do."""
    SHEAR_X = 1
    """The tangent of the angle."""
    SHEAR_Y = 2
    TRANSLATE_X = 3
    """Pixels to the right."""
    TRANSLATE_Y = 4
    """Pixels down."""
    ROTATE = 5
    """Degrees, counter-clockwise."""
    BRIGHTNESS = 6
    """A factor, at least 0; 1 changes nothing."""
    SATURATION = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    """Bits that stay."""
    SOLARIZE = 11
    """Values from this threshold on are inverted."""
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    HUE = 14
    """A part of the colour circle, from -0.5 to 0.5."""


_AFFINE = range(Operation.SHEAR_X, Operation.ROTATE + 1)  # these are computed together


def apply(images: Tensor, operations: Operations, parameters: Parameters) -> Tensor:
    """Applies one operation to each image. Does not wait for the device.

    Moved pixels come from the nearest pixel, and from outside the image they are black.

    Args:
        images: uint8 [B, H, W, C] with one channel or three. With one, SATURATION and HUE change nothing.
        operations: values of `Operation`, int64 [B], on the host.
        parameters: their parameters, float64 [B], on the host.

    Returns:
        New images, uint8 [B, H, W, C].
    """
    kinds = np.where(np.isin(operations, _AFFINE), Operation.SHEAR_X, operations)
    order = np.argsort(kinds, kind="stable")
    result = images.index_select(0, _on(images, order))
    size = max(1, _CHUNK_VALUES.get(images.device.type, _MOST_VALUES) // max(1, images[0].numel()))
    begin = 0
    for kind, count in enumerate(np.bincount(kinds).tolist()):
        for start in range(begin, begin + count, size) if kind != Operation.IDENTITY else ():
            part = slice(start, min(start + size, begin + count))
            own = order[part]
            if kind == Operation.SHEAR_X:
                result[part] = _affine(result[part], operations[own], parameters[own])
            elif kind in _ON_PIXELS:
                result[part] = _ON_PIXELS[Operation(kind)](result[part], parameters[own])
            else:
                planes = result[part].permute(0, 3, 1, 2).contiguous()
                changed = _ON_PLANES[Operation(kind)](planes, parameters[own])
                result[part] = changed.permute(0, 2, 3, 1)
        begin += count
    return result.index_select(0, _on(images, np.argsort(order)))


def blank(images: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns images with a rectangle set to 0 in each.

    Args:
        images: [B, C, H, W].
        top: the first row, [B]; may lie outside the image, as the others may.
        bottom: the row after the last one.
        left: the first column.
        right: the column after the last one.
    """
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    hole = inside_rows[:, :, None] & inside_columns[:, None, :]
    return images.masked_fill(hole.view(batch, 1, height, width), 0.0)


def _on(images: Tensor, values: npt.NDArray[np.generic]) -> Tensor:
    """Returns values from the host on the device of the images."""
    return torch.from_numpy(values).to(images.device, non_blocking=True)


def _per_image(images: Tensor, values: Parameters) -> Tensor:
    """Returns a value for each image that broadcasts over its pixels: float32 [B, 1, 1, 1]."""
    return _on(images, values.astype(np.float32)).view(-1, 1, 1, 1)


def _fma(first: Tensor, second: Tensor | float, third: Tensor) -> Tensor:
    """Returns first * second + third, rounded once to float32; all are float32.

    So does torch.add with `alpha`, which torchvision uses, on most but not all values of a tensor.
    """
    return third.double().add(first.double().mul_(second)).float()


def _blend(images: Tensor, other: Tensor, factors: Parameters) -> Tensor:
    """Mixes images with weight `factors` and others with weight 1 - `factors`."""
    rest = _per_image(images, 1.0 - factors)
    return _fma(other, rest, images * _per_image(images, factors)).clamp_(0, 255).byte()


def _brightness(images: Tensor, factors: Parameters) -> Tensor:
    return (images * _per_image(images, factors)).clamp_(max=255).byte()


def _sharpness(images: Tensor, factors: Parameters) -> Tensor:
    """Mixes images with their blurred versions; the outermost pixels stay."""
    if min(images.shape[1:3]) <= 2:
        return images
    values = images.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    inner = values[:, 1:-1, 1:-1]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    change = sums.float().mul_(1 / 13).round_().sub_(inner)
    mixed = _fma(change, _per_image(images, 1.0 - factors), inner.float())
    result = images.clone()
    result[:, 1:-1, 1:-1] = mixed.clamp_(0, 255).byte()
    return result


def _posterize(images: Tensor, bits: Parameters) -> Tensor:
    masks = 256 - 2 ** (8 - bits)
    return images & _per_image(images, masks).byte()


def _solarize(images: Tensor, thresholds: Parameters) -> Tensor:
    least = np.ceil(thresholds.astype(np.float32).astype(np.float64))
    above = images >= _per_image(images, least).byte()
    return images ^ above.view(torch.uint8).neg_()  # several times faster than torch.where


def _gray(planes: Tensor) -> Tensor:
    """Returns the gray values, whole numbers in float32 [B, 1, H, W]."""
    if planes.shape[1] == 1:
        return planes.float()
    red, green, blue = planes.float().split(1, 1)
    return _fma(blue, _GRAY[2], _fma(green, _GRAY[1], red * _GRAY[0])).floor_()


def _saturation(planes: Tensor, factors: Parameters) -> Tensor:
    return planes if planes.shape[1] == 1 else _blend(planes, _gray(planes), factors)


def _contrast(planes: Tensor, factors: Parameters) -> Tensor:
    # A sum of whole numbers is exact in any order.
    total = _gray(planes).sum((1, 2, 3), keepdim=True, dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.uint8, device=planes.device).view(1, 1, 1, -1)
    table = _blend(levels, total.float() / planes[0, 0].numel(), factors)
    first = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=planes.device)
    places = planes.int().add_(first.view(-1, 1, 1, 1))
    return table.view(-1).index_select(0, places.view(-1)).view(planes.shape)


def _auto_contrast(planes: Tensor, _: Parameters) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.autocontrast(planes)  # type: ignore[no-any-return]


def _equalize(planes: Tensor, _: Parameters) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(planes)  # type: ignore[no-any-return]


def _hue(planes: Tensor, shifts: Parameters) -> Tensor:
    """Turns the hue, by way of HSV (Smith 1978)."""
    if planes.shape[1] == 1:
        return planes
    red, green, blue = (planes.float() / 255).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = spread + (spread == 0)
    # Factors of 0 and 1 are several times faster than torch.where.
    is_red = (value == red).float()
    is_green = (value == green).float() * (1 - is_red)
    is_blue = 1 - is_red - is_green
    sector = (is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)) / divisor
    sector += 2 * is_green + 4 * is_blue + 6 * _per_image(planes, shifts)[:, 0]
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = sector + offset
        place -= (place / 6).floor_() * 6
        channels.append(value - spread * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels, 1).mul_(255 + 1 - 1e-3).byte()


def _affine(images: Tensor, operations: Operations, parameters: Parameters) -> Tensor:
    """Shears from the upper left corner, translates, or rotates around the centre."""
    count, height, width, channels = images.shape
    rows = torch.arange(height, dtype=torch.float64, device=images.device)[:, None]
    columns = torch.arange(width, dtype=torch.float64, device=images.device)
    maps = _on(images, _inverse_maps(operations, parameters, height, width))[:, :, :, None, None]
    by_column, by_row, constant = maps.unbind(2)
    # [column or row] of the source of each pixel, counted from a black border.
    source = (by_column * columns + (constant + 1)).float() + (by_row * rows).float()
    column, row = source.round_().unbind(1)
    bordered = F.pad(images, (0, 0, 1, 1, 1, 1))
    pixels = row.clamp_(0, height + 1).int().mul_(width + 2).add_(column.clamp_(0, width + 1).int())
    step = (height + 2) * (width + 2)
    pixels += torch.arange(0, count * step, step, dtype=torch.int32, device=images.device)[:, None, None]
    return bordered.view(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)


def _inverse_maps(operations: Operations, parameters: Parameters, height: int, width: int) -> Parameters:
    """Returns the map from a pixel's place to that of its source.

    The result is float64 [B, 2, 3]: for column and row of the source, the factors of the pixel's column and
    row, and a constant.
    """
    shear_x, shear_y, right, down, degrees = (
        np.where(operations == operation, parameters, 0.0) for operation in _AFFINE
    )
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return np.stack(
        [
            np.stack([cos, shear_x - sin, x - cos * x + sin * y + shear_x / 2 - right], 1),
            np.stack([sin + shear_y, cos, y - sin * x - cos * y + shear_y / 2 - down], 1),
        ],
        1,
    )


_Kernel = Callable[[Tensor, Parameters], Tensor]
_ON_PIXELS: dict[Operation, _Kernel] = {
    Operation.BRIGHTNESS: _brightness,
    Operation.SHARPNESS: _sharpness,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
}
"""These take images [B, H, W, C]."""
_ON_PLANES: dict[Operation, _Kernel] = {
    Operation.SATURATION: _saturation,
    Operation.CONTRAST: _contrast,
    Operation.AUTO_CONTRAST: _auto_contrast,
    Operation.EQUALIZE: _equalize,
    Operation.HUE: _hue,
}
"""These take images [B, C, H, W]: faster where channels are combined or reduced."""
