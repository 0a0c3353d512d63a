"""Image files of any size to crops of one size."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from disttrain.shards.crops import CenterCrops, RandomCrops
from disttrain.shards.images import ImageError, TooLargeError, decode_image
from disttrain.shards.photos import decode_crop, decode_crops, read_header
from kit.photos import photo, picture

Boxes = npt.NDArray[np.int64]
SIDE = 32


class Fixed:
    """One crop for all images."""

    def __init__(self, *box: int) -> None:
        self.box = box

    def __call__(self, positions: Boxes, sizes: Boxes) -> Boxes:
        """Returns the crop for each image."""
        return np.array([self.box] * len(sizes))


def by_pillow(image: bytes, box: Sequence[int], side: int = SIDE, channels: int = 3) -> npt.NDArray[np.int64]:
    """Decodes a whole image, cuts out the box and resizes it: [side, side, channels]."""
    pixels = decode_image(image, channels)
    top, left, height, width = box
    whole = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    crop = whole.crop((left, top, left + width, top + height))
    found = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR), np.int64)
    return found.reshape(side, side, channels)


def exif(orientation: int) -> Image.Exif:
    """Returns EXIF data with an orientation."""
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def cmyk(*, inverted: bool) -> bytes:
    """Returns a CMYK JPEG; Adobe's are inverted and stored as YCCK."""
    image = photo(5, 70, 90, mode="CMYK")
    return image if inverted else image.replace(b"Adobe", b"Other", 1)


FILES = {
    "jpeg": photo(0, 60, 80),
    "4:4:4": photo(1, 61, 83, subsampling=0),
    "progressive": photo(2, 60, 80, progressive=True),
    "gray in a colour set": photo(3, 60, 80, mode="L"),
    "upright exif": photo(4, 60, 80, exif=exif(1)),
    "turned": photo(4, 60, 80, exif=exif(6)),
    "mirrored": photo(4, 60, 80, exif=exif(2)),
    "cmyk": cmyk(inverted=True),
    "cmyk of another program": cmyk(inverted=False),
    "png": photo(6, 60, 80, "PNG"),
    "16 bits": photo(6, 60, 80, "PNG", mode="I;16"),
    "transparent": photo(7, 60, 80, "PNG", mode="RGBA"),
    "palette": photo(7, 60, 80, "PNG", mode="P"),
    "webp": photo(8, 60, 80, "WEBP"),
    "animated": photo(9, 60, 80, "GIF", save_all=True, append_images=[picture(10, 60, 80)]),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_has_pillows_pixels(kind: str) -> None:
    image = FILES[kind]
    header = read_header(image)
    assert (header.height, header.width) == decode_image(image, 3).shape[:2]
    for box in ((0, 0, header.height, header.width), (5, 9, 40, 44), (7, 3, 20, 31), (2, 2, SIDE, SIDE)):
        found = decode_crop(image, Fixed(*box), SIDE, 3).astype(int)
        assert np.abs(found - by_pillow(image, box)).max() <= 2, box


def test_gray_images_of_a_gray_set() -> None:
    for image in (FILES["gray in a colour set"], FILES["png"], FILES["jpeg"], FILES["16 bits"]):
        found = decode_crop(image, Fixed(3, 4, 50, 41), SIDE, 1).astype(int)
        assert np.abs(found - by_pillow(image, (3, 4, 50, 41), channels=1)).max() <= 2


@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_scaled_decode_is_near_to_the_whole_one(side: int) -> None:
    image = photo(11, 390, 520)
    box = (24, 48, 296, 416)  # whole pixels at 1/8 too
    found = decode_crop(image, Fixed(*box), side, 3).astype(int)
    difference = np.abs(found - by_pillow(image, box, side))
    assert difference.mean() < 1.5
    assert difference.max() <= 12


def test_crops_are_written_in_order_whatever_the_company() -> None:
    files = [FILES["jpeg"], FILES["turned"], FILES["png"], photo(12, 300, 200)]
    positions = np.array([40, 2, 77, 13])
    crops = RandomCrops(0, 5, 0.1)
    out = np.empty((4, SIDE, SIDE, 3), np.uint8)
    decode_crops(files, positions, crops, out)
    for number in range(4):
        alone = np.empty((1, SIDE, SIDE, 3), np.uint8)
        decode_crops(files[number : number + 1], positions[number : number + 1], crops, alone)
        assert (alone[0] == out[number]).all()


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (3, 3), (31, 200)])
def test_small_and_narrow_images_are_enlarged(size: tuple[int, int]) -> None:
    image, sizes, positions = photo(13, *size), np.array([size] * 20), np.arange(20)
    out = np.empty((20, SIDE, SIDE, 3), np.uint8)
    decode_crops([image] * 20, positions, RandomCrops(0, 0, 0.08), out)
    for found, box in zip(out, RandomCrops(0, 0, 0.08)(positions, sizes), strict=True):
        assert np.abs(found.astype(int) - by_pillow(image, box.tolist())).max() <= 2, box
    (box,) = CenterCrops(0.875)(positions[:1], sizes[:1])
    center = decode_crop(image, CenterCrops(0.875), SIDE, 3).astype(int)
    assert np.abs(center - by_pillow(image, box.tolist())).max() <= 2


def flipped_bit(image: bytes, share: float) -> bytes:
    """Returns a file with one byte of its pixels changed."""
    place = int(len(image) * share)
    return image[:place] + bytes([image[place] ^ 0x5A]) + image[place + 1 :]


BAD = {
    "cut off": photo(0, 60, 80)[:900],
    "empty": b"",
    "no image": b"hello" * 100,
    "png cut off": photo(0, 60, 80, "PNG")[:2000],
}


@pytest.mark.parametrize("kind", BAD)
def test_the_bad_image_is_named_by_its_place(kind: str) -> None:
    out = np.empty((3, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ImageError) as caught:
        decode_crops([FILES["jpeg"], BAD[kind], FILES["png"]], np.arange(3), CenterCrops(0.875), out)
    assert caught.value.place == 1


def test_a_changed_byte_is_refused_or_decoded() -> None:
    image = photo(14, 90, 120)
    box = (5, 6, 70, 80)
    for share in np.linspace(0.3, 0.99, 12):
        bad = flipped_bit(image, share)
        try:
            expected = by_pillow(bad, box)
        except ValueError:
            with pytest.raises(ValueError, match=r"."):
                decode_crop(bad, Fixed(*box), SIDE, 3)
            continue
        # What libjpeg makes of impossible coefficients differs between its versions.
        assert np.abs(decode_crop(bad, Fixed(*box), SIDE, 3).astype(int) - expected).mean() < 5


def test_a_huge_header_is_refused_before_decoding() -> None:
    image = photo(0, 60, 80)
    frame = image.index(b"\xff\xc0")
    huge = image[: frame + 5] + (60000).to_bytes(2, "big") * 2 + image[frame + 9 :]
    with pytest.raises(TooLargeError, match="60000x60000 pixels are over the limit"):
        decode_crop(huge, CenterCrops(0.875), SIDE, 3)
    with pytest.raises(TooLargeError, match="80x60 pixels are over the limit of 100"):
        decode_crop(image, CenterCrops(0.875), SIDE, 3, most_pixels=100)


def test_bytes_of_any_kind_are_taken() -> None:
    image = FILES["jpeg"]
    expected = decode_crop(image, CenterCrops(0.8), SIDE, 3)
    for other in (bytearray(image), memoryview(image)):
        assert (decode_crop(other, CenterCrops(0.8), SIDE, 3) == expected).all()
    assert io.BytesIO(image).read() == image
