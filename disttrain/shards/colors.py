"""Pillow's pictures to the 8-bit gray or RGB pixels that they look like.

Transparent pixels lie on white, as on a page in a browser. The upper 8 bits of 16 are kept, and of the 12
bits of a TIFF file. Pixels whose range is not known are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from disttrain.shards.remarks import remark

RULES = 2
"""Changes whenever this module makes other pixels of a file."""

GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes without color."""

_FEW_LEVELS = (
    "16-bit pixels with values below 4096, of which at most 16 levels are left; make 8-bit images, or "
    "multiply the values by 16 if they have 12 bits, by 256 if 8"
)
_NO_RANGE = "have no known range; convert the image to 8 or 16 bits"
_GRAY_SCALE = {"'1'": 255, "'L;2'": 85, "'L;4'": 17}  # what Pillow multiplies the gray values of a PNG by


class Stored(NamedTuple):
    """How a file stores its pixels, which Pillow's mode does not tell; read before the pixels.

    Attributes:
        bits: bits of a value: 8 or less, 12 or 16; 0 if its range is not known.
        scale: what Pillow multiplies the values by that it reads, but not the transparent one.
    """

    bits: int
    scale: int = 1


def stored(picture: Image.Image) -> Stored:
    """Returns how the file of a picture stores its pixels."""
    layout = str([tile[3] for tile in getattr(picture, "tile", ())])
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        return Stored(0)
    if ";12" in layout:
        return Stored(12)
    if ";16" in layout or picture.mode.startswith("I"):
        return Stored(16)
    return Stored(8, next((scale for name, scale in _GRAY_SCALE.items() if name in layout), 1))


def is_opaque(picture: Image.Image) -> bool:
    """Returns whether no pixel can be transparent."""
    return not picture.has_transparency_data


def flattened(picture: Image.Image, mode: str, how: Stored) -> Image.Image:
    """Returns a picture in the mode L or RGB, without transparency.

    Raises:
        ValueError: the range of its values is not known.
    """
    if picture.mode == mode and is_opaque(picture) and how.bits <= 8:
        return picture
    if not how.bits:
        raise ValueError(
            f"{'floating-point' if picture.mode == 'F' else '32-bit or signed'} pixels {_NO_RANGE}"
        )
    picture = _scaled_transparency(picture, how)
    if picture.mode.startswith("I"):
        picture = _upper_bits(picture, how.bits)
    elif how.bits == 16 and _highest(picture) < 16:
        remark(_FEW_LEVELS)
    if not is_opaque(picture):
        colors = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colors)
    return picture.convert(mode)


def _scaled_transparency(picture: Image.Image, how: Stored) -> Image.Image:
    """Returns a picture whose transparent value, if it has one, is on the scale of its pixels."""
    key = picture.info.get("transparency")
    if key is None or picture.mode not in ("1", "L", "RGB") or (how.bits <= 8 and how.scale == 1):
        return picture
    values = np.atleast_1d(key) * how.scale >> max(0, how.bits - 8)
    picture = picture.copy()
    picture.info["transparency"] = tuple(values.tolist()) if picture.mode == "RGB" else int(values[0])
    return picture


def _upper_bits(picture: Image.Image, bits: int) -> Image.Image:
    """Returns a gray picture of 12 or 16 bits in 8 bits; Pillow's own conversion would clip the values."""
    values = np.asarray(picture).astype(np.int64)
    if bits == 16 and values.max() < 4096:
        remark(_FEW_LEVELS)
    pixels = (values >> (bits - 8)).astype(np.uint8)
    if (key := picture.info.get("transparency")) is not None:
        pixels[values == key] = 255
    return Image.fromarray(pixels)


def _highest(picture: Image.Image) -> int:
    """Returns the highest value of a picture, but for its transparency."""
    extrema = picture.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    names = picture.getbands()
    return max(int(band[1]) for name, band in zip(names, bands, strict=True) if name != "A")
