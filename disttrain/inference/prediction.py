"""Classifies images with a trained model.

Threads decode and resize the files, in the same way as packing, while the network computes.
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

_BATCH = 64  # images of one decoding task and of one forward pass
_T = TypeVar("_T")


class Prediction(NamedTuple):
    """The prediction for an image.

    Attributes:
        image: name of the file; empty for pixels.
        top: the most probable classes with their probabilities 0..1, best first; empty if there is a problem.
        problem: why the image is unusable, or None.
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
        """The probability of the most probable class, 0..1."""
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
    """Returns the predictions of a model for images, in their order.

    Args:
        source: a run folder, an exported safetensors file, or a model from `load_model`.
        images: one or more image files, or pixels. They are prepared like the training images: decoded,
            rotated according to EXIF, resized to the input size of the model, and made gray if it takes gray.
        checkpoint: checkpoint of the run: best, latest, or a path.
        top: classes per prediction.

    Raises:
        UsageError: the run does not exist.
        CheckpointError: the checkpoint does not exist or is damaged.
    """
    if isinstance(images, (str, Path, np.ndarray)):
        images = [images]
    classifier = source if isinstance(source, Classifier) else load_model(source, checkpoint)
    return [prediction for prediction, _ in predictions(classifier, images, top)]


def predictions(
    classifier: Classifier, images: Iterable[ImageSource], top: int
) -> Iterator[tuple[Prediction, Pixels | None]]:
    """Yields the prediction for each image with its prepared pixels, uint8 [H, W, C], or None if unusable.

    Args:
        classifier: computes in the precision of `as_evaluated`.
        images: read a few batches ahead.
        top: classes per prediction.
    """
    classes = classifier.classes
    for batch in decoded(images, classifier.facts):
        usable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        rows: Iterator[tuple[list[float], list[int]]] = iter(())
        if usable:
            stacked = torch.from_numpy(np.stack(usable)).to(classifier.device)
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
    """Yields batches of images, each with its pixels, prepared by threads, or why it is unusable."""

    def prepare(batch: Sequence[ImageSource]) -> list[tuple[ImageSource, Pixels | str]]:
        return [(image, _prepared_or_reason(image, facts)) for image in batch]

    return ordered_map(prepare, _batches(images, _BATCH), usable_cores())


def _prepared_or_reason(image: ImageSource, facts: Facts) -> Pixels | str:
    try:
        return prepared(image, facts)
    except (OSError, ValueError) as error:
        return reason(error)


def prepared(image: ImageSource, facts: Facts) -> Pixels:
    """Returns the pixels of an image as `disttrain data pack --size` would store them: uint8 [H, W, C].

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an image, or is broken or too large.
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
        if not stat.S_ISREG(os.stat(image).st_mode):  # noqa: PTH116  takes half the time of Path.stat
            raise ValueError("is not a file")
        with open(image, "rb") as file:  # noqa: PTH123
            data = file.read()
        pixels = decode_image(data, channels)
        jpeg = data[:3] == b"\xff\xd8\xff"
    if pixels.shape[:2] != (height, width):
        pixels = fitted(pixels, height, width)
        if jpeg:  # packing stores a resized JPEG as a JPEG, which is lossy
            pixels = decode_image(encode_image(pixels, "JPEG"), channels)
    return pixels


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
