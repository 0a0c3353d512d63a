"""Photos of several sizes: smooth pictures with some noise, as image files, folders and tars."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from disttrain.shards.imagefolder import pack_folder
from disttrain.shards.index import Index
from disttrain.shards.pack import Options

SIZES = ((48, 64), (90, 60), (37, 130), (64, 64), (128, 40))
"""Height and width of the photos, in turn."""


def picture(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Returns a smooth picture with some noise; its hue depends on the seed modulo 3."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    coarse[..., seed % 3] //= 4
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def photo(
    seed: int, height: int, width: int, image_format: str = "JPEG", mode: str = "RGB", **save: Any
) -> bytes:
    """Returns an image file of `picture`."""
    file = io.BytesIO()
    picture(seed, height, width, mode).save(file, image_format, **({"quality": 92} | save))
    return file.getvalue()


def write_folder(folder: Path, train: int = 45, val: int = 12) -> None:
    """Writes photos of three classes: DIR/{train,val}/<class>/<files>."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = folder / split / "abc"[number % 3] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = SIZES[number % len(SIZES)]
            path.write_bytes(photo(number + 1000 * (split == "val"), height, width))


def pack_photos(folder: Path, root: Path, name: str = "photos", **how: Any) -> Index:
    """Packs `write_folder`'s photos in about seven shards."""
    write_folder(folder)
    return pack_folder(folder, name, str(root), Options(shard_mib=0.03), **how)
