"""Arrays as pictures embedded in a page."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from disttrain.shards.images import Pixels, as_picture

MOST_SIDE = 160
"""Longest side of a picture, in pixels; larger ones are scaled down."""


class Picture(NamedTuple):
    """An image for a page.

    Attributes:
        uri: the image file as a data: URI.
        width: in pixels.
        height: in pixels.
    """

    uri: str
    width: int
    height: int


def picture_of(pixels: Pixels) -> Picture:
    """Returns a picture of uint8 pixels [H, W] or [H, W, C], scaled down if it is large."""
    image = as_picture(pixels)
    if max(image.size) <= MOST_SIDE:
        return _encoded(image, "PNG", optimize=True)
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    return _encoded(image.convert("RGB"), "JPEG", quality=85)


def mosaic(tiles: npt.NDArray[np.float64], columns: int = 8) -> Picture:
    """Returns the tiles as one picture, with one transparent pixel between them.

    Args:
        tiles: 0..1, [N, H, W] or [N, H, W, 3].
        columns: tiles per row.
    """
    count, height, width = tiles.shape[:3]
    rows = -(-count // columns)
    columns = min(columns, count)
    sheet = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4), np.uint8)
    values = np.rint(255 * tiles.clip(0, 1)).astype(np.uint8)
    if tiles.ndim == 3:
        values = np.repeat(values[..., None], 3, axis=3)
    for number, tile in enumerate(values):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    return _encoded(Image.fromarray(sheet), "PNG", optimize=True)


def stretched(tiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns each tile scaled to 0..1 by its own minimum and maximum."""
    each = tuple(range(1, tiles.ndim))
    low, high = tiles.min(each, keepdims=True), tiles.max(each, keepdims=True)
    spread: npt.NDArray[np.float64] = (tiles - low) / np.maximum(high - low, 1e-12)
    return spread


def _encoded(image: Image.Image, kind: str, **options: int) -> Picture:
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return Picture(f"data:image/{kind.lower()};base64,{data}", *image.size)
