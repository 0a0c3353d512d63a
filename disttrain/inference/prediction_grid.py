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


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Cell(NamedTuple):
    """An image of the grid.

    Attributes:
        pixels: uint8 [H, W, C].
        label: the predicted class, or in multi-label data the predicted classes.
        probability: probability of that class, 0..1; None for several.
        truth: the true class, or None if unknown.
    """

    pixels: Pixels
    label: str
    probability: float | None
    truth: str | None


def check_name(path: Path) -> None:
    """Raises UsageError if a grid cannot be saved under this name."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"--grid {path}: expected a name that ends in .png, .jpg or .webp")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--grid {path}: folder {path.parent} does not exist; create it first")


def draw(cells: list[Cell]) -> Image.Image:
    """Returns the grid. Below each image is the prediction, and the true class in green or red if known."""
    font = ImageFont.load_default(12)
    texts = [_texts(cell, font) for cell in cells]
    labels, truths = (max((len(pair[which]) for pair in texts), default=1) for which in (0, 1))
    columns = max(1, min(len(cells), math.ceil(math.sqrt(1.5 * len(cells)))))
    rows = max(1, -(-len(cells) // columns))
    wide, high = _SIDE + _GAP, _SIDE + (labels + max(1, truths)) * _LINE + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (cell, (label, truth)) in enumerate(zip(cells, texts, strict=True)):
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        picture = as_picture(cell.pixels).convert("RGB")
        small = max(picture.size) < _SIDE  # keep its pixels visible
        resampling = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        picture = ImageOps.contain(picture, (_SIDE, _SIDE), resampling)
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2))
        share = _share(cell)
        pen.text((left + _SIDE, top + _SIDE + 1), share, _INK, font, anchor="ra")
        color = _RIGHT if cell.truth == cell.label else _WRONG
        if cell.truth is not None:
            pen.rectangle((left - 2, top - 2, left + _SIDE + 1, top + _SIDE + 1), outline=color, width=2)
        lines = [(line, _INK) for line in label] + [(line, color) for line in truth]
        for place, (line, ink) in enumerate(lines):
            pen.text((left, top + _SIDE + place * _LINE + (1 if ink == _INK else 0)), line, ink, font)
    return sheet


def _share(cell: Cell) -> str:
    return "" if cell.probability is None else percent(cell.probability, 0)


def _texts(cell: Cell, font: _Font) -> tuple[list[str], list[str]]:
    """Returns the lines of the prediction and of the true class; long names take up to two lines."""
    beside = _SIDE - (_GAP + font.getlength(share) if (share := _share(cell)) else 0)
    truth = [] if cell.truth is None else _folded(f"is {cell.truth}", (_SIDE, _SIDE), font)
    return _folded(cell.label, (beside, _SIDE), font), truth


def save(sheet: Image.Image, path: Path) -> None:
    """Saves a grid, or raises StorageError."""
    try:
        sheet.save(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason(error)}; choose another --grid") from None


def _folded(text: str, rooms: tuple[float, float], font: _Font) -> list[str]:
    """Returns a text in one or two lines, which have room for so many pixels; what does not fit is cut."""
    if font.getlength(text) <= rooms[0]:
        return [text]
    words = text.split()
    first = next(
        n for n in range(len(words), -1, -1) if not n or font.getlength(" ".join(words[:n])) <= rooms[0]
    )
    if not first:  # a word that is too long for the first line
        return [_cut(text, rooms[0], font)]
    return [" ".join(words[:first]), _cut(" ".join(words[first:]), rooms[1], font)]


def _cut(text: str, room: float, font: _Font) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."
