"""Image files of any size to crops of one size: decodes, cuts out and resizes.

JPEGs go to libjpeg-turbo through simplejpeg, which took 0.81 ms for a photo of 500 x 375 pixels where
torchvision took 0.87 and OpenCV 0.85. If the crop is twice the target or larger, libjpeg decodes at 1/2, 1/4
or 1/8. All other files, and those that fail there, go to Pillow. torch resizes with a triangle filter, to
within 1 of Pillow's result, in half of its time. Both release the interpreter lock.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import ExifTags

from disttrain.shards.colors import GRAY_MODES
from disttrain.shards.crops import Crops, Integers
from disttrain.shards.images import (
    MAX_PIXELS,
    Encoded,
    ImageError,
    Pixels,
    TooLargeError,
    decode_image,
    open_image,
    plain_header,
    simplejpeg,
)

_SCALES = (8, 4, 2)  # libjpeg decodes at these fractions as fast as it can; at 3/4 it is slower than at 1


class Header(NamedTuple):
    """What is read of an image file before its pixels.

    Attributes:
        height: of the upright image, in pixels.
        width: of the upright image, in pixels.
        jpeg: whether libjpeg gives the upright pixels: a gray or RGB JPEG that is not turned.
        gray: whether it stores gray pixels.
    """

    height: int
    width: int
    jpeg: bool
    gray: bool


def read_header(image: Encoded, most_pixels: int = MAX_PIXELS) -> Header:
    """Returns the size of an image file.

    Raises:
        ValueError: not an image, broken, or larger than `most_pixels`.
    """
    plain = plain_header(image)
    if plain is not None:
        if plain.width * plain.height > most_pixels:
            raise TooLargeError(plain.width, plain.height, most_pixels)
        return Header(plain.height, plain.width, plain.decoder == "jpeg", plain.mode == "L")
    with open_image(io.BytesIO(image), most_pixels) as picture:
        try:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises errors of many types; then it does not turn the image either
            orientation = 1
        width, height = picture.size
        if orientation in range(5, 9):
            width, height = height, width
        jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB")
    return Header(height, width, jpeg and orientation not in range(2, 9), picture.mode in GRAY_MODES)


def decode_crops(
    images: Sequence[Encoded],
    positions: Integers,
    crops: Crops,
    out: Pixels,
    decoded_side: int | None = None,
) -> None:
    """Decodes image files of any size, and resizes a crop of each to `out`.

    Args:
        images: files in `IMAGE_FORMATS`.
        positions: of the images in the order of the epoch, int64 [n].
        crops: chooses the crops.
        out: uint8 [n, side, side, channels]; partly written after an error.
        decoded_side: shorter side in pixels to which larger images are reduced before they are cropped.

    Raises:
        ImageError: an image cannot be decoded.
    """
    side, channels = out.shape[2:]
    headers: list[Header] = []
    place = 0
    try:
        for place in range(len(images)):  # also used after an error
            headers.append(read_header(images[place]))
        sizes = np.array([_reduced_size(header, decoded_side) for header in headers], np.int64)
        boxes = crops(positions, sizes.reshape(-1, 2)).tolist()
        for place, (image, header, box) in enumerate(zip(images, headers, boxes, strict=True)):
            if decoded_side is None or min(header[:2]) <= decoded_side:
                pixels = _decoded(image, header, box, side, channels)
            else:
                pixels = cut_out(decode_reduced(image, header, decoded_side, channels), box)
            out[place] = resized(pixels, side, side)
    except ValueError as error:
        raise ImageError(place, str(error)) from error


def decode_reduced(image: Encoded, header: Header, decoded_side: int, channels: int) -> Pixels:
    """Decodes an image file, and returns it with a shorter side of at most `decoded_side` pixels.

    Args:
        image: a file in `IMAGE_FORMATS`.
        header: what `read_header` returned for it.
        decoded_side: shorter side to which a larger image is reduced, in pixels.
        channels: 1 for gray, 3 for RGB.

    Raises:
        ValueError: the image cannot be decoded.
    """
    whole = (0, 0, header.height, header.width)
    return resized(
        _decoded(image, header, whole, decoded_side, channels), *_reduced_size(header, decoded_side)
    )


def _reduced_size(header: Header, decoded_side: int | None) -> tuple[int, int]:
    """Returns height and width of an image, reduced to a shorter side of at most `decoded_side` pixels."""
    shorter = min(header.height, header.width)
    if decoded_side is None or shorter <= decoded_side:
        return header.height, header.width
    return round(header.height * decoded_side / shorter), round(header.width * decoded_side / shorter)


def decode_crop(
    image: Encoded, crops: Crops, side: int, channels: int, most_pixels: int = MAX_PIXELS
) -> Pixels:
    """Decodes one image file, and returns its crop, resized to uint8 [side, side, channels].

    Args:
        image: a file in `IMAGE_FORMATS`.
        crops: chooses the crop, at position 0.
        side: of the result, in pixels.
        channels: 1 for gray, 3 for RGB.
        most_pixels: larger images are refused before they are decoded.

    Raises:
        ValueError: the image cannot be decoded.
        TooLargeError: it has more than `most_pixels`.
    """
    header = read_header(image, most_pixels)
    box = _box(crops, header.height, header.width)
    return resized(_decoded(image, header, box, side, channels, most_pixels), side, side)


def cut_out(pixels: Pixels, box: Sequence[int]) -> Pixels:
    """Returns a crop of an image; `box` is its top, left, height and width in pixels."""
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def cropped(pixels: Pixels, crops: Crops, side: int) -> Pixels:
    """Returns the crop of a decoded image, uint8 [H, W, C], resized to uint8 [side, side, C]."""
    return resized(cut_out(pixels, _box(crops, *pixels.shape[:2])), side, side)


def _box(crops: Crops, height: int, width: int) -> list[int]:
    """Returns top, left, height and width of the crop of an image at position 0."""
    box: list[int] = crops(np.zeros(1, np.int64), np.array([[height, width]], np.int64))[0].tolist()
    return box


def _decoded(
    image: Encoded,
    header: Header,
    box: Sequence[int],
    side: int,
    channels: int,
    most_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Returns the pixels of a crop: uint8 [height, width, channels], or a fraction of that if it is large."""
    top, left, height, width = box
    if header.jpeg and (channels == 3 or header.gray):  # Pillow has another formula for gray
        scale = next((n for n in _SCALES if min(height, width) // n >= side), 1)
        pixels = _by_simplejpeg(image, header, scale, channels)
        if pixels is not None:
            bottom, right = top + height, left + width
            # The edges of the crop are rounded to whole pixels of the smaller image.
            top, left, bottom, right = ((edge + scale // 2) // scale for edge in (top, left, bottom, right))
            return pixels[top:bottom, left:right]
    return cut_out(decode_image(image, channels, most_pixels), box)


def _by_simplejpeg(image: Encoded, header: Header, scale: int, channels: int) -> Pixels | None:
    """Returns the pixels at 1 / scale of the size; None if libjpeg has a doubt, which Pillow settles."""
    height, width = -(-header.height // scale), -(-header.width // scale)
    least = {} if scale == 1 else {"min_height": height, "min_width": width}
    try:
        pixels: Pixels = simplejpeg().decode_jpeg(image, "GRAY" if channels == 1 else "RGB", **least)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Returns an image, uint8 [H, W, C], resized to uint8 [height, width, C] with a triangle filter."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch
    import torch.nn.functional as F

    # Copied by NumPy, because torch takes several times as long for it.
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # channels_last
    result = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    resized_pixels: Pixels = result[0].permute(1, 2, 0).numpy()
    return resized_pixels
