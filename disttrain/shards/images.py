"""Image files to pixels: the accepted formats, the size limit, and the decoders.

Nearly all data sets have ordinary JPEG or PNG files. These are recognised by their first bytes, and go to a
decoder directly: JPEGs to libjpeg-turbo through simplejpeg, PNGs to that of Pillow. Pillow reads all other
files, and those that fail there. The short cut pays off for small images: 23 us instead of 55 us for an MNIST
image, and 15 us instead of 110 us for a CIFAR-10 JPEG. Pillow's header parser also blocks other threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from disttrain.shards.colors import Stored, flattened, stored

MAX_PIXELS = 8192 * 8192
"""Larger images are refused before they are decoded, because a file of 10 kB can decode to gigabytes."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that Pillow may try, beside HEIF; some of its other plugins start programs."""

_HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"))

Pixels = npt.NDArray[np.uint8]
Encoded = bytes | bytearray | memoryview
"""The bytes of an image file."""


def decode_image(image: Encoded, channels: int, most_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes an image file.

    Applies the EXIF orientation, puts transparent pixels on white, keeps the upper 8 of 16 bits, and takes
    the first frame of an animation.

    Args:
        image: the file, in one of `IMAGE_FORMATS`.
        channels: 1 for gray, 3 for RGB.
        most_pixels: larger images are refused before they are decoded.

    Returns:
        uint8 [height, width, channels]

    Raises:
        ValueError: not an image, broken, or too large; the message is the reason.
    """
    plain = plain_header(image)
    if plain is not None and plain.width * plain.height <= most_pixels:
        with contextlib.suppress(ValueError, OSError):  # the full reader below gives the reason
            return _decode_plain(plain, channels)
    with _value_errors(), open_image(io.BytesIO(image), most_pixels) as picture:
        return _upright(picture, channels, stored(picture))


def decode_exactly(image: Encoded, height: int, width: int, channels: int) -> Pixels:
    """Decodes an image file of a known size: uint8 [height, width, channels]; see `decode_image`.

    Raises:
        ValueError: it cannot be decoded, or has another size.
    """
    pixels = decode_image(image, channels, height * width)
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels")
    return pixels


class TooLargeError(ValueError):
    """An image has more pixels than are allowed."""

    def __init__(self, width: int, height: int, limit: int) -> None:
        super().__init__(f"{width}x{height} pixels are over the limit of {limit}")


class ImageError(ValueError):
    """One of several images cannot be decoded; `place` is its position."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def decode_into(images: Sequence[Encoded], out: Pixels) -> None:
    """Decodes image files of one size into `out`, with the pixels of `decode_image`.

    The decoders release the interpreter lock, so threads help if each has 64 images or more.

    Args:
        images: files in `IMAGE_FORMATS`.
        out: uint8 [len(images), height, width, channels]; partly written after an error.

    Raises:
        ImageError: an image cannot be decoded or has another size.
    """
    for place, image in enumerate(images):
        try:
            out[place] = decode_exactly(image, *out.shape[1:])
        except ValueError as error:
            raise ImageError(place, str(error)) from error


@functools.cache
def simplejpeg() -> Any:
    """Returns the module, which most commands do not need."""
    import simplejpeg

    return simplejpeg


class Plain(NamedTuple):
    """An ordinary JPEG or PNG, from its header."""

    decoder: Literal["jpeg", "zip"]
    """Pillow's name for the decoder."""
    width: int
    height: int
    mode: Literal["L", "RGB"]
    data: Encoded
    """The decoder's input."""


def plain_header(image: Encoded) -> Plain | None:
    """Returns the header of an ordinary JPEG or PNG; None for any other file.

    An ordinary file needs only the decoder: 8 bits, gray or RGB, no transparency, no EXIF or XMP that could
    rotate the image, no animation, and nothing unknown or out of order before the pixels.
    """
    try:
        if image[:3] == b"\xff\xd8\xff":
            return _plain_jpeg(image)
        if image[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
            return _plain_png(image)
    except (IndexError, struct.error):  # the file ends within the header
        pass
    return None


_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length from itself on
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, height, width, components
_NOT_OF_PIXELS = frozenset((0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE))  # DHT, DQT, DRI, JFIF, Adobe, comment


def _plain_jpeg(image: Encoded) -> Plain | None:
    """Parses the segments before the first scan like libjpeg; returns None if libjpeg might parse more."""
    position, width, height, components = 2, 0, 0, 0
    while True:
        prefix, marker, length = _SEGMENT(image, position)
        if prefix != 0xFF:
            return None
        if marker in _NOT_OF_PIXELS:
            if length < (9 if marker in (0xE0, 0xEE) else 2):  # Pillow reads 7 bytes of JFIF and Adobe
                return None
        elif 0xC0 <= marker <= 0xC2 and not components:  # frame: baseline, extended or progressive
            bits, height, width, components = _FRAME(image, position + 4)
            if bits != 8 or components not in (1, 3) or not width or not height:
                return None
            if length != 8 + 3 * components:
                return None
        elif marker == 0xDA and components:  # scan
            return Plain("jpeg", width, height, "L" if components == 1 else "RGB", image)
        else:
            return None
        position += 2 + length


_IHDR = struct.Struct(">IIBBBBBI").unpack_from  # width, height, bits, color, three methods, CRC
_CHUNK = struct.Struct(">I4s").unpack_from


def _plain_png(image: Encoded) -> Plain | None:
    width, height, bits, color, compression, row_filter, interlace, crc = _IHDR(image, 16)
    if bits != 8 or color not in (0, 2) or compression or row_filter or interlace or not width or not height:
        return None
    if zlib.crc32(image[12:29]) != crc:
        return None
    position, parts = 33, []
    while (chunk := _CHUNK(image, position))[1] == b"IDAT":
        end = position + 8 + chunk[0]
        parts.append(image[position + 8 : end])
        position = end + 4
    if chunk[1] != b"IEND" or not parts:
        return None
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return Plain("zip", width, height, "L" if color == 0 else "RGB", data)


def _decode_plain(plain: Plain, channels: int) -> Pixels:
    """Decodes an ordinary JPEG or PNG.

    Raises:
        ValueError, OSError: it is damaged, or the decoder has a doubt.
    """
    mode = "L" if channels == 1 else "RGB"
    if plain.decoder == "jpeg" and channels >= len(plain.mode):  # Pillow has another formula for gray
        decoded: Pixels = simplejpeg().decode_jpeg(plain.data, "GRAY" if channels == 1 else "RGB")
        return decoded
    option = "" if plain.decoder == "jpeg" else 0  # JPEG: color space of the file; PNG: no interlacing
    size = plain.width, plain.height
    picture = Image.frombytes(plain.mode, size, plain.data, plain.decoder, plain.mode, option)
    if picture.mode != mode:  # otherwise Pillow would copy it
        picture = picture.convert(mode)
    pixels = np.frombuffer(bytearray(picture.tobytes()), np.uint8)
    return pixels.reshape(plain.height, plain.width, channels)


def pixels_of(picture: Image.Image, channels: int, most_pixels: int = MAX_PIXELS) -> Pixels:
    """Returns a Pillow image, which stays as it is, as `decode_image` returns its file: uint8 [H, W, C].

    Raises:
        ValueError: it is broken or too large.
    """
    if picture.width * picture.height > most_pixels:
        raise TooLargeError(*picture.size, most_pixels)
    with _value_errors():
        how = stored(picture)
        return _upright(picture.copy(), channels, how)


def _upright(picture: Image.Image, channels: int, how: Stored) -> Pixels:
    """Rotates a picture according to EXIF, and returns its pixels, uint8 [H, W, C]."""
    ImageOps.exif_transpose(picture, in_place=True)
    pixels = np.array(flattened(picture, "L" if channels == 1 else "RGB", how))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """Raises ValueError for whatever Pillow raises on a broken file, even SyntaxError and struct.error."""
    try:
        yield
    except TooLargeError:
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def open_image(file: BinaryIO, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header of an image file; Pillow reads the pixels on demand.

    Raises:
        ValueError: not an image in a known format, or larger than `most_pixels`.
    """
    head = file.read(30)
    file.seek(0)
    width, height = _webp_size(head)  # for WebP, Pillow allocates the pixels immediately
    if width * height > most_pixels:
        raise TooLargeError(width, height, most_pixels)
    try:
        picture = Image.open(file, formats=_known_formats(heif=head[4:12] in _HEIF))
    except UnidentifiedImageError:
        raise ValueError("damaged, or not an image in a known format") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if picture.width * picture.height > most_pixels:
        raise TooLargeError(*picture.size, most_pixels)
    return picture


@functools.cache
def _known_formats(*, heif: bool) -> tuple[str, ...]:
    """Returns the formats to try, without those that this Pillow does not know.

    Raises:
        ValueError: a HEIF image, and the package that decodes it is missing.
    """
    Image.init()
    known = tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)
    if not heif:
        return known
    try:
        importlib.import_module("pi_heif").register_heif_opener()
    except ImportError:
        raise ValueError('a HEIC image, which needs pip install "disttrain[heic]"') from None
    return (*known, "HEIF")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Returns width and height from the first 30 bytes of a WebP file; zeros for any other file."""
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def pixel_sums(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Returns the exact sums of uint8 [..., C] pixels and of their squares: int64 [2, C]."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    squares = np.square(flat, dtype=np.uint16)  # 255 * 255 < 2**16
    return np.stack([flat.sum(axis=0, dtype=np.int64), squares.sum(axis=0, dtype=np.int64)])


def encode_image(pixels: Pixels, image_format: Literal["PNG", "JPEG"]) -> bytes:
    """Returns uint8 [H, W] or [H, W, C] pixels as an image file; JPEG has quality 95."""
    file = io.BytesIO()
    as_picture(pixels).save(file, image_format, quality=95, subsampling=0)  # PNG ignores these options
    return file.getvalue()


def as_picture(pixels: Pixels) -> Image.Image:
    """Returns uint8 [H, W] or [H, W, C] pixels as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
