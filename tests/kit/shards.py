"""Tars as other tools write them, and what a split holds."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from disttrain.shards.index import Index
from disttrain.shards.reader import Reader
from disttrain.shards.tar import IMAGE_EXTENSIONS

SEVEN = {"train": (3, 301, 1, 120, 49, 13, 233), "val": (5, 90)}
"""Samples in the uneven shards of the data set `seven`."""


def read_split(index: Index, split: str) -> Iterator[tuple[str, bytes, int]]:
    """Yields key, image file and label of every sample of a split, in the order of the index."""
    reader = Reader(index, split)
    for begin, end in itertools.pairwise(index.first_ids(split)):  # a shard is opened when it is its turn
        for sample in reader.samples(np.arange(begin, end)):
            image = next(sample[name] for name in IMAGE_EXTENSIONS if name in sample)
            yield sample["__key__"], image, int(sample["cls"])


def write_tar(path: Path, samples: int, seed: int, size: int = 8) -> None:
    """Writes a WebDataset tar of random images, with keys in folders and a member that is not used."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            label = int(random.integers(4))
            pixels = random.integers(0, 256, (size, size, 3)) // 4 + 48 * label
            image_format = ("PNG", "JPEG", "WEBP")[number % 3]
            image = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(image, image_format, quality=90)
            extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[image_format]
            members = {extension: image.getvalue(), "cls": f"{label}\n".encode(), "json": b"{}"}
            for name, content in members.items():
                member = tarfile.TarInfo(f"some/folder/{seed}-{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_members(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes a tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
