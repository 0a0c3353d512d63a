"""`disttrain predict`: what a trained network takes images for.

Files are decoded and resized as packing does it, by threads, while the network computes.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from disttrain.errors import reason
from disttrain.inference.classifier import Classifier, load_model
from disttrain.inference.run import Facts
from disttrain.parallel import ordered_map, usable_cores
from disttrain.shards.imagefolder import fitted
from disttrain.shards.images import Pixels, as_picture, decode_image, encode_image

ImageSource = str | Path | Pixels
"""An image file, or its pixels: uint8 [H, W], [H, W, 1] or [H, W, 3]."""

_BATCH = 64  # images that a thread decodes at a time, and that go through the network together
_T = TypeVar("_T")


class Prediction(NamedTuple):
    """What an image is taken for.

    Attributes:
        image: name of the file; empty for pixels.
        top: the most probable classes with their probabilities 0..1, best first; empty if there is a problem.
        problem: why the image cannot be used, or None.
    """

    image: str
    top: tuple[tuple[str, float], ...]
    problem: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Its probability, 0..1."""
        return self.top[0][1] if self.top else None

    def as_json(self) -> dict[str, Any]:
        """Returns a line of `disttrain predict --json`."""
        top = [{"class": label, "probability": probability} for label, probability in self.top]
        return {"image": self.image, **top[0], "top": top}


def predict(
    source: str | Path | Classifier,
    images: ImageSource | Iterable[ImageSource],
    *,
    checkpoint: str | Path = "best",
    top: int = 5,
) -> list[Prediction]:
    """Returns what a network takes images for, in their order.

    Args:
        source: a run folder, an exported safetensors file, or what `load_model` returned.
        images: one or several image files, or pixels. They are prepared as those it was trained on: decoded,
            turned upright, brought to its size, made gray if it reads gray.
        checkpoint: of the run: best, latest, or a path.
        top: classes in each prediction.

    Raises:
        UsageError: there is no such run.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if isinstance(images, (str, Path, np.ndarray)):
        images = [images]
    classifier = source if isinstance(source, Classifier) else load_model(source, checkpoint)
    return [prediction for prediction, _ in predictions(classifier, images, top)]


def predictions(
    classifier: Classifier, images: Iterable[ImageSource], top: int
) -> Iterator[tuple[Prediction, Pixels | None]]:
    """Yields the prediction for each image, and its pixels as the network reads them, uint8 [H, W, C].

    Args:
        classifier: of which `as_evaluated` gives the precision.
        images: taken some batches ahead.
        top: classes in each prediction.
    """
    classes = classifier.classes
    for batch in decoded(images, classifier.facts):
        sound = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        rows: Iterator[tuple[list[float], list[int]]] = iter(())
        if sound:
            stacked = torch.from_numpy(np.stack(sound)).to(classifier.device)
            with torch.inference_mode(), classifier.as_evaluated():
                best = classifier(stacked).softmax(1).topk(min(top, len(classes)))
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for image, pixels in batch:
            name = "" if isinstance(image, np.ndarray) else str(image)
            if isinstance(pixels, str):
                yield Prediction(name, (), pixels), None
            else:
                values, labels = next(rows)
                found = tuple((classes[label], value) for label, value in zip(labels, values, strict=True))
                yield Prediction(name, found), pixels


def decoded(images: Iterable[ImageSource], facts: Facts) -> Iterator[list[tuple[ImageSource, Pixels | str]]]:
    """Yields batches of images with their pixels, prepared by threads, or why they cannot be used."""

    def prepare(batch: Sequence[ImageSource]) -> list[tuple[ImageSource, Pixels | str]]:
        return [(image, _prepared_or_reason(image, facts)) for image in batch]

    return ordered_map(prepare, _batches(images, _BATCH), usable_cores())


def _prepared_or_reason(image: ImageSource, facts: Facts) -> Pixels | str:
    try:
        return prepared(image, facts)
    except (OSError, ValueError) as error:
        return reason(error)


def prepared(image: ImageSource, facts: Facts) -> Pixels:
    """Returns an image as `disttrain data pack --size` would have stored it for the network.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no image, or broken, or too large.
    """
    height, width, channels = facts.shape
    jpeg = False
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
            shape = list(image.shape)
            raise ValueError(f"expected uint8 [H, W], [H, W, 1] or [H, W, 3], got {image.dtype} {shape}")
        picture = as_picture(image).convert("L" if channels == 1 else "RGB")
        pixels = np.array(picture).reshape(*image.shape[:2], channels)
    else:
        if not stat.S_ISREG(os.stat(image).st_mode):  # noqa: PTH116  half the time of Path's, for each file
            raise ValueError("is not a file")
        with open(image, "rb") as file:  # noqa: PTH123
            data = file.read()
        pixels = decode_image(data, channels)
        jpeg = data[:3] == b"\xff\xd8\xff"
    if pixels.shape[:2] != (height, width):
        pixels = fitted(pixels, height, width)
        if jpeg:  # packing stores it as a JPEG again
            pixels = decode_image(encode_image(pixels, "JPEG"), channels)
    return pixels


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
