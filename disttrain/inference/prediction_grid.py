"""The prediction grid: one picture of many images with their predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from disttrain.errors import StorageError, UsageError, reason
from disttrain.shards.images import Pixels, as_picture
from disttrain.units import percent

MOST = 400
"""Most images in a grid; a larger picture is of no use."""

_SIDE, _GAP, _LINE = 112, 8, 16  # pixels: side of an image, gap between images, height of a line of text
_RIGHT, _WRONG, _INK, _PAPER = "#1a7f37", "#cf222e", "#1f2328", "#ffffff"


class Cell(NamedTuple):
    """An image of the grid.

    Attributes:
        pixels: uint8 [H, W, C].
        label: the predicted class.
        probability: probability of that class, 0..1.
        truth: the true class, or None if unknown.
    """

    pixels: Pixels
    label: str
    probability: float
    truth: str | None


def check_name(path: Path) -> None:
    """Raises UsageError if a grid cannot be saved under this name."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"--grid {path}: expected a name that ends in .png, .jpg or .webp")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--grid {path}: folder {path.parent} does not exist; create it first")


def draw(cells: list[Cell]) -> Image.Image:
    """Returns the grid. Below each image is the prediction, and the true class in green or red if known."""
    columns = max(1, min(len(cells), math.ceil(math.sqrt(1.5 * len(cells)))))
    rows = max(1, -(-len(cells) // columns))
    wide, high = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, cell in enumerate(cells):
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        picture = as_picture(cell.pixels).convert("RGB")
        small = max(picture.size) < _SIDE  # keep its pixels visible
        resampling = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        picture = ImageOps.contain(picture, (_SIDE, _SIDE), resampling)
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2))
        share = percent(cell.probability, 0)
        room = _SIDE - _GAP - font.getlength(share)
        pen.text((left, top + _SIDE + 1), _cut(cell.label, room, font), _INK, font)
        pen.text((left + _SIDE, top + _SIDE + 1), share, _INK, font, anchor="ra")
        if cell.truth is not None:
            color = _RIGHT if cell.truth == cell.label else _WRONG
            pen.rectangle((left - 2, top - 2, left + _SIDE + 1, top + _SIDE + 1), outline=color, width=2)
            pen.text((left, top + _SIDE + _LINE), _cut(f"is {cell.truth}", _SIDE, font), color, font)
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    """Saves a grid, or raises StorageError."""
    try:
        sheet.save(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason(error)}; choose another --grid") from None


def _cut(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."
