"""Image files to pixels: which formats are opened, how large they may be, and what their pixels are.

Every file is Pillow's to judge. Where many images are to come, torchvision decodes the ordinary JPEGs, in a
third of Pillow's time for 32x32 pixels and 0.6 of it for 256x256 (31 and 89, 244 and 433 us, one core of a
Xeon). Which those are, the walk over a JPEG's header in `_is_plain_jpeg` tells in 2 us where Pillow's header
reader takes 25; so it doubles the speed of small JPEGs. It also keeps torchvision from what it would decode
to other pixels than Pillow (turned by EXIF, CMYK) or to gigabytes (a header that claims 65535x65535).
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 8192 * 8192
"""Larger pictures are refused before they are decoded: a file of 10 kB can ask for gigabytes."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try on a file; some of its other readers start programs."""

Pixels = npt.NDArray[np.uint8]
Encoded = bytes | bytearray | memoryview
"""The bytes of an image file, wherever they were read to."""

_Operator: TypeAlias = "Callable[[torch.Tensor, int, bool], torch.Tensor]"
"""torchvision's on a file's bytes, 1 for gray or 3 for RGB, and whether EXIF turns it; to [C, H, W]."""

_MANY = 20_000  # JPEGs from which on torchvision is worth its import

_many = False  # of them are to come


def decode_image(image: Encoded, channels: int, most_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes an image file.

    The EXIF orientation is applied, transparency dropped, 16 bits are cut to their upper 8, and of an
    animation the first frame is taken.

    Args:
        image: the file, of one of `IMAGE_FORMATS`.
        channels: 1 for gray, 3 for RGB.
        most_pixels: larger pictures are refused before they are decoded.

    Returns:
        uint8 [height, width, channels]

    Raises:
        ValueError: it is no image, broken, or too large; the message is the reason.
    """
    if _many and _is_plain_jpeg(image, channels, most_pixels) and (decoder := _torchvision_jpeg()):
        with contextlib.suppress(RuntimeError):  # the reason comes from Pillow
            return _as_pixels(decoder(_as_tensor(image), channels, False))
    return _by_pillow(image, channels, most_pixels)


class ImageError(ValueError):
    """One image of several is refused."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def decode_into(images: Sequence[Encoded], out: Pixels) -> None:
    """Decodes image files of one size to their places; the pixels are those of `decode_image`.

    The decoders work without the interpreter lock, so threads with 64 images or more each gain from it.

    Args:
        images: files of `IMAGE_FORMATS`.
        out: uint8 [len(images), height, width, channels]; partly written if an image is refused.

    Raises:
        ImageError: one is refused by `decode_image` or has another size; it says which.
    """
    _, height, width, channels = out.shape
    for place, image in enumerate(images):
        try:
            pixels = decode_image(image, channels, height * width)
            if pixels.shape != out.shape[1:]:
                raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels")
        except ValueError as error:
            raise ImageError(place, str(error)) from error
        out[place] = pixels


def expect_images(count: int) -> None:
    """Chooses the JPEG decoder for a number of images to come; the pixels are the same in any case.

    torchvision takes over a second to import; a process pays for it when it meets the first JPEG.
    """
    global _many
    _many = _many or count >= _MANY


def use_torchvision() -> bool:
    """Lets torchvision decode ordinary JPEGs from now on; False if it cannot be had or its pixels differ."""
    expect_images(_MANY)
    return _torchvision_jpeg() is not None


@functools.cache
def _torchvision_jpeg() -> _Operator | None:
    """Returns torchvision's decoder if it gives Pillow's pixels: the two bring libjpegs of their own."""
    try:
        import torch
        import torchvision  # noqa: F401  # registers the operator

        operator: _Operator = torch.ops.image.decode_jpeg.default  # the function of torchvision.io warns
    except (ImportError, AttributeError):
        return None
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((45, 35), Image.Resampling.BICUBIC)
    kinds = (("L", 0), ("RGB", 0), ("RGB", 1), ("RGB", 2))
    for (mode, subsampling), quality, progressive in itertools.product(kinds, (30, 75, 95), (False, True)):
        file = io.BytesIO()
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        picture.convert(mode).save(file, "JPEG", **options)
        image = file.getvalue()
        for channels in {len(mode), 3}:
            try:
                pixels = _as_pixels(operator(_as_tensor(image), channels, False))
            except RuntimeError:
                return None
            if not np.array_equal(pixels, _by_pillow(image, channels, MAX_PIXELS)):
                return None
    return operator


_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length from itself on
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, height, width, components
_NOT_OF_PIXELS = frozenset((0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE))  # DHT, DQT, DRI, JFIF, Adobe, comment


def _is_plain_jpeg(image: Encoded, channels: int, most_pixels: int) -> bool:
    """Tells whether a file is a JPEG of which torchvision gives Pillow's pixels, and not too large.

    That is: 8 bits, gray or YCbCr, no EXIF or XMP that could turn the picture, and nothing unknown or out
    of order before the first scan. It walks the segments as libjpeg does.
    """
    position, components = 2, 0
    try:
        if image[:3] != b"\xff\xd8\xff":
            return False
        while True:
            prefix, marker, length = _SEGMENT(image, position)
            if prefix != 0xFF:
                return False
            if marker in _NOT_OF_PIXELS:
                if length < (9 if marker in (0xE0, 0xEE) else 2):  # Pillow reads 7 bytes of these two
                    return False
            elif 0xC0 <= marker <= 0xC2 and not components:  # frame: baseline, extended or progressive
                bits, height, width, components = _FRAME(image, position + 4)
                if bits != 8 or components not in (1, 3) or not 0 < width * height <= most_pixels:
                    return False
                if length != 8 + 3 * components or components > channels:  # gray by another formula
                    return False
            else:
                return marker == 0xDA and components > 0  # scan
            position += 2 + length
    except struct.error:  # it ends in the header
        return False


def _as_tensor(image: Encoded) -> torch.Tensor:
    import torch

    # A copy, because torch warns of memory that cannot be written; it takes a hundredth of the decoding.
    return torch.frombuffer(bytearray(image), dtype=torch.uint8)


def _as_pixels(tensor: torch.Tensor) -> Pixels:
    pixels: Pixels = tensor.numpy()
    return pixels.transpose(1, 2, 0)


def _by_pillow(image: Encoded, channels: int, most_pixels: int) -> Pixels:
    try:
        with open_image(io.BytesIO(image), most_pixels) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            pixels = np.array(_convert(picture, "L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises anything on a broken file, SyntaxError and struct.error too
        raise ValueError(str(error) or type(error).__name__) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def open_image(file: BinaryIO, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header of an image file; the pixels follow on demand.

    Raises:
        ValueError: it is no image of a known format, or larger than `most_pixels`.
    """
    try:
        picture = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not a sound image file of a known format") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if picture.width * picture.height > most_pixels:
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"{size} pixels are more than the limit of {most_pixels}")
    return picture


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them to 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits are not supported")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns about the direct way
    return picture.convert(mode)


def pixel_sums(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Returns the sums of uint8 [..., C] pixels and of their squares, exact: int64 [2, C]."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    squares = np.square(flat, dtype=np.uint16)  # 255 * 255 < 2**16
    return np.stack([flat.sum(axis=0, dtype=np.int64), squares.sum(axis=0, dtype=np.int64)])


def encode_image(pixels: Pixels, image_format: Literal["PNG", "JPEG"]) -> bytes:
    """Returns uint8 [H, W] or [H, W, C] pixels as an image file; JPEG of quality 95."""
    file = io.BytesIO()
    as_picture(pixels).save(file, image_format, quality=95, subsampling=0)  # PNG ignores the two
    return file.getvalue()


def as_picture(pixels: Pixels) -> Image.Image:
    """Returns uint8 [H, W] or [H, W, C] pixels as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
