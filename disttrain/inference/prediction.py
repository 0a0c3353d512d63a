"""Classifies images with a trained model.

Threads decode and resize the files, in the same way as packing, while the network computes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict, Unpack, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from disttrain.errors import reason
from disttrain.inference.classifier import Classifier, load_model
from disttrain.inference.run import Facts
from disttrain.parallel import chunked, ordered_map, usable_cores
from disttrain.shards.crops import CenterCrops
from disttrain.shards.imagefolder import fitted
from disttrain.shards.images import (
    MAX_PIXELS,
    Encoded,
    Pixels,
    TooLargeError,
    as_picture,
    decode_image,
    encode_image,
    pixels_of,
)
from disttrain.shards.photos import cropped, decode_crop
from disttrain.shards.remarks import collected, pillow_warnings

ImageSource = str | os.PathLike[str] | Encoded | BinaryIO | Image.Image | Pixels | Tensor
"""An image: the name of its file, its bytes, an open file, a Pillow image, or its pixels.

Pixels are an array, uint8 [H, W], [H, W, 1] or [H, W, 3], or a tensor, uint8 [H, W], [C, H, W] or [H, W, C].
"""

_BATCH = 64  # images of one decoding task and of one forward pass


class Prediction(NamedTuple):
    """The prediction for an image.

    Attributes:
        image: name of the file; empty for pixels.
        top: the most probable classes with their probabilities 0..1, best first; empty if there is a problem.
            In multi-label data, all `labels` are among them.
        problem: why the image is unusable, or None.
        remarks: what Pillow warns about, or that gray levels are lost.
        labels: in multi-label data, the classes that the image has: those with a probability of at least the
            threshold. Otherwise None.
    """

    image: str
    top: tuple[tuple[str, float], ...]
    problem: str | None = None
    remarks: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """The probability of the most probable class, 0..1."""
        return self.top[0][1] if self.top else None

    def as_json(self) -> dict[str, Any]:
        """Returns a line of `disttrain predict --json`; class and probability may be None.

        With multi-label data, `labels` is in it.
        """
        top = [{"class": label, "probability": probability} for label, probability in self.top]
        best = {"class": self.label, "probability": self.probability}
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"image": self.image, **labels, **best, "top": top, "problem": self.problem}


@pillow_warnings()
def predict(
    source: str | Path | Classifier,
    images: ImageSource | Iterable[ImageSource],
    *,
    checkpoint: str | Path = "best",
    top: int = 5,
    threshold: float = 0.5,
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Returns the predictions of a model for images, in their order.

    Args:
        source: a run folder, an exported safetensors file, or a model from `load_model`.
        images: one or more images, see `ImageSource`; [B, ...] pixels are several. They are prepared like the
            training images: decoded, rotated according to EXIF, resized to the input size of the model, and
            made gray if it takes gray.
        checkpoint: checkpoint of the run: best, latest, or a path.
        top: classes per prediction.
        threshold: with multi-label data, the least probability of the `labels`.
        max_pixels: images with more are not decoded.

    Raises:
        UsageError: the run does not exist.
        CheckpointError: the checkpoint does not exist or is damaged.
    """
    classifier = source if isinstance(source, Classifier) else load_model(source, checkpoint)
    several = cast(Iterable[ImageSource], [images] if _is_one(images) else images)
    found = predictions(classifier, several, top=top, threshold=threshold, max_pixels=max_pixels)
    return [prediction for prediction, _ in found]


def _is_one(images: object) -> bool:
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != 4
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


class PredictOptions(TypedDict):
    """What is taken of images and of their predictions.

    Attributes:
        top: classes per prediction.
        threshold: with multi-label data, the least probability of the `labels`.
        max_pixels: images with more are not decoded.
    """

    top: int
    threshold: float
    max_pixels: int


def predictions(
    classifier: Classifier, images: Iterable[ImageSource], **options: Unpack[PredictOptions]
) -> Iterator[tuple[Prediction, Pixels | None]]:
    """Yields the prediction for each image with its prepared pixels, uint8 [H, W, C], or None if unusable.

    Args:
        classifier: computes in the precision of `as_evaluated`.
        images: read a few batches ahead.
        options: see `PredictOptions`.
    """
    top, threshold = options["top"], options["threshold"]
    classes, multi_label = classifier.classes, classifier.facts.multi_label
    most = len(classes) if multi_label else min(top, len(classes))
    for batch in decoded(images, classifier.facts, options["max_pixels"]):
        usable = [pixels for _, pixels, _ in batch if not isinstance(pixels, str)]
        rows: Iterator[list[tuple[str, float]]] = iter(())
        if usable:
            stacked = torch.from_numpy(np.stack(usable)).to(classifier.device)
            with torch.inference_mode(), classifier.as_evaluated():
                best = classifier.probabilities(classifier(stacked)).topk(most)
            columns = (best.values.tolist(), best.indices.tolist())
            rows = (_named(classes, *row) for row in zip(*columns, strict=True))
        for image, pixels, remarks in batch:
            name = _name(image)
            if isinstance(pixels, str):
                yield Prediction(name, (), pixels, remarks), None
            else:
                found = next(rows)
                labels = tuple(label for label, value in found if value >= threshold) if multi_label else None
                shown = tuple(found[: max(top, len(labels or ()))])
                yield Prediction(name, shown, None, remarks, labels), pixels


def _named(classes: Sequence[str], values: list[float], labels: list[int]) -> list[tuple[str, float]]:
    return [(classes[label], value) for label, value in zip(labels, values, strict=True)]


def _name(image: ImageSource) -> str:
    """Returns the name of an image's file, or an empty string."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    name = getattr(image, "filename" if isinstance(image, Image.Image) else "name", "")
    return name if isinstance(name, str) else ""  # the name of a pipe is a number


class Decoded(NamedTuple):
    """An image with its pixels, uint8 [H, W, C], or why it is unusable; and remarks on it."""

    image: ImageSource
    pixels: Pixels | str
    remarks: tuple[str, ...]


def decoded(
    images: Iterable[ImageSource], facts: Facts, max_pixels: int = MAX_PIXELS
) -> Iterator[list[Decoded]]:
    """Yields batches of images, prepared by threads."""

    def prepare(batch: Sequence[ImageSource]) -> list[Decoded]:
        return [_decoded(image, facts, max_pixels) for image in batch]

    return ordered_map(prepare, chunked(images, _BATCH), usable_cores())


def _decoded(image: ImageSource, facts: Facts, max_pixels: int) -> Decoded:
    pixels: Pixels | str
    with collected() as remarks:
        try:
            pixels = prepared(image, facts, max_pixels)
        except TooLargeError as error:
            pixels = f"{error}; allow more with --max-pixels (in Python max_pixels)"
        except (OSError, ValueError) as error:
            pixels = reason(error)
    return Decoded(image, pixels, tuple(remarks))


def prepared(image: ImageSource, facts: Facts, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Returns the pixels of an image as an evaluation takes them: uint8 [H, W, C].

    Without data.image_size, that is as `disttrain data pack --size` would store them.

    Raises:
        OSError: the file cannot be read.
        ValueError: not an image, or it is broken or too large.
    """
    height, width, channels = facts.shape
    crops = None if facts.crop_pct is None else CenterCrops(facts.crop_pct)
    if isinstance(image, (np.ndarray, Tensor)):
        pixels, jpeg = _checked(image, channels), False
    elif isinstance(image, Image.Image):
        pixels, jpeg = pixels_of(image, channels, max_pixels), image.format in ("JPEG", "MPO")
    else:
        data = _bytes_of(image)
        if crops is not None:
            return decode_crop(data, crops, height, channels, max_pixels)
        pixels, jpeg = decode_image(data, channels, max_pixels), data[:3] == b"\xff\xd8\xff"
    if crops is not None:
        return cropped(pixels, crops, height)
    if pixels.shape[:2] != (height, width):
        pixels = fitted(pixels, height, width)
        if jpeg:  # packing stores a resized JPEG as a JPEG, which is lossy
            pixels = decode_image(encode_image(pixels, "JPEG"), channels)
    return pixels


def _checked(image: Pixels | Tensor, channels: int) -> Pixels:
    """Returns the pixels of an array or a tensor: uint8 [H, W, C].

    Raises:
        ValueError: it has another dtype or shape.
    """
    shape = tuple(image.shape)
    if image.dtype not in (np.uint8, torch.uint8) or len(shape) not in (2, 3) or 0 in shape:
        raise _not_pixels(image)
    if isinstance(image, Tensor):
        if len(shape) == 3 and shape[0] in (1, 3):
            image = image.permute(1, 2, 0)
        image = image.detach().cpu().contiguous().numpy()
    if image.shape[2:] not in ((), (1,), (3,)):
        raise _not_pixels(image)
    return pixels_of(as_picture(image), channels, image.size)


def _not_pixels(image: Pixels | Tensor) -> ValueError:
    return ValueError(
        f"expected uint8 [H, W], [H, W, 1] or [H, W, 3], got {image.dtype} {list(image.shape)}; "
        "convert pixels of 0..1 with (255 * pixels).round() to uint8"
    )


def _bytes_of(image: str | os.PathLike[str] | Encoded | BinaryIO) -> Encoded:
    """Returns the bytes of an image file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file, or a file opened as text.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return image
    if isinstance(image, (str, os.PathLike)):
        if not stat.S_ISREG(os.stat(image).st_mode):  # noqa: PTH116  takes half the time of Path.stat
            raise ValueError("is not a file")
        with open(image, "rb") as file:  # noqa: PTH123
            return file.read()
    # Numbers would be file descriptors to `open`.
    data: Any = image.read() if hasattr(image, "read") else None
    if isinstance(data, bytes):
        return data
    if data is None:
        raise ValueError(f"expected a file name, bytes, an open file, a picture or pixels, got {image!r:.60}")
    raise ValueError('the file was opened as text; open it with "rb"')
