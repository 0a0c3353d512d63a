"""Images become what they look like: transparency, deep pixels, and remarks on images that can be used."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from disttrain.shards.existing_tars import index_folder
from disttrain.shards.imagefolder import pack_folder
from disttrain.shards.images import decode_image, decode_into, pixels_of
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.remarks import collected, pillow_warnings
from kit.shards import read_split
from kit.toy import encode

CORRUPT_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\x40\0\0\0\xff\xff\0\0"
WHITE = [255, 255, 255]


def png(bits, color, row, width=1, transparent=b""):
    """Returns a PNG of one row, with any depth."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
    keys = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + keys + data + chunk(b"IEND", b"")


def tiff(bits, kind, row, width):
    """Returns a gray TIFF of one row; kind is 1 for unsigned, 2 for signed integers, 3 for floats."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(row)), (339, kind)]
    row += bytes(len(row) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0" + struct.pack("<IH", 8 + len(row), 10)[:4] + row + struct.pack("<H", 10) + entries + bytes(4)
    )


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def remarks_on(image):
    with collected() as found:
        decode_image(image, 3)
    return found


# --- Transparency -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "GIF", "JPEG2000"])
def test_invisible_pixels_are_white_whatever_color_they_hide(image_format):
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    pixels = np.array([[[255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    assert decode_image(file.getvalue(), 3).tolist() == [[WHITE, [0, 0, 0]]]
    assert decode_image(file.getvalue(), 1).tolist() == [[[255], [0]]]


def test_half_transparent_pixels_are_mixed_with_white():
    half = Image.fromarray(np.array([[[255, 0, 0, 128]]], np.uint8))
    gray = Image.fromarray(np.array([[[0, 128]]], np.uint8), "LA")
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = b"\x80"
    for picture, channels, expected in (
        (half, 3, [255, 127, 127]),
        (gray, 1, [127]),
        (palette, 3, [255, 127, 127]),
    ):
        file = io.BytesIO()
        picture.save(file, "PNG")
        assert decode_image(file.getvalue(), channels).tolist() == [[expected]]
        assert pixels_of(picture, channels).tolist() == [[expected]]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, words(1, 2, 3)), [WHITE, [4, 5, 6]]),
        (png(16, 2, words(256, 512, 768, 4096, 0, 0), 2, words(256, 512, 768)), [WHITE, [16, 0, 0]]),
        (png(8, 0, bytes([1, 2]), 2, words(1)), [WHITE, [2] * 3]),
        (png(4, 0, bytes([0x12]), 2, words(1)), [WHITE, [34] * 3]),
        (png(2, 0, bytes([0b01100000]), 2, words(1)), [WHITE, [170] * 3]),
        (png(1, 0, bytes([0b01000000]), 2, words(0)), [WHITE, WHITE]),
        (png(16, 0, words(300, 5000), 2, words(300)), [WHITE, [19] * 3]),
    ],
    ids=["rgb", "rgb of 16 bits", "gray", "gray of 4 bits", "of 2 bits", "of 1 bit", "of 16 bits"],
)
def test_a_png_may_have_one_transparent_color(image, expected):
    assert decode_image(image, 3).tolist() == [expected]
    out = np.empty((1, 1, 2, 3), np.uint8)
    decode_into([image], out)
    assert out[0].tolist() == [expected]


def test_packing_shows_all_readers_the_same_opaque_image(root, source):
    hidden = np.array([[[255, 0, 0, 0], [9, 9, 9, 255]]], np.uint8)
    keyed = png(8, 2, bytes([1, 2, 3, 9, 9, 9]), 2, words(1, 2, 3))
    for split, image in (("train", encode(hidden)), ("train", keyed), ("val", keyed)):
        (source / split / "a").mkdir(parents=True, exist_ok=True)
        (source / split / "a" / f"{len(image)}.png").write_bytes(image)
    index = pack_folder(source, "set", None, Options())
    for _, image, _ in read_split(index, "train"):
        with Image.open(io.BytesIO(image)) as picture:
            assert picture.mode == "RGB"
            assert np.asarray(picture.convert("RGB")).tolist() == [[WHITE, [9, 9, 9]]]


# --- Deep pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (png(16, 0, words(256, 65535), 2), [1, 255]),
        (tiff(16, 1, struct.pack("<2H", 256, 65535), 2), [1, 255]),
        (tiff(12, 1, b"\xff\xf8\x00", 2), [255, 128]),
        (b"P5 2 1 4095\n" + words(2048, 4095), [128, 255]),
        (b"P5 2 1 65535\n" + words(256, 65535), [1, 255]),
    ],
    ids=["png", "tiff", "tiff of 12 bits", "pgm of 12 bits", "pgm"],
)
def test_the_upper_8_bits_are_kept(image, expected):
    for channels in (1, 3):
        assert decode_image(image, channels).tolist() == [[[value] * channels for value in expected]]
    assert remarks_on(image) == []


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (tiff(32, 1, struct.pack("<2I", 1, 200), 2), "32-bit or signed"),
        (tiff(32, 2, struct.pack("<2i", 1, 200), 2), "32-bit or signed"),
        (tiff(16, 2, struct.pack("<2h", 1, 200), 2), "32-bit or signed"),
        (tiff(32, 3, struct.pack("<2f", 0, 1), 2), "floating-point"),
    ],
    ids=["32 bits", "signed 32", "signed 16", "float"],
)
def test_pixels_of_unknown_range_are_refused(image, what):
    with pytest.raises(
        ValueError, match=f"{what} pixels have no known range; convert the image to 8 or 16 bits"
    ):
        decode_image(image, 1)
    with Image.open(io.BytesIO(image)) as picture, pytest.raises(ValueError, match=what):
        pixels_of(picture, 1)


@pytest.mark.parametrize("color", [0, 2, 4, 6], ids=["gray", "rgb", "gray and alpha", "rgb and alpha"])
def test_few_levels_in_16_bits_are_told(color):
    values = {0: (1,), 2: (1, 2, 3), 4: (1, 65535), 6: (1, 2, 3, 65535)}[color]
    for highest, told in ((4095, 1), (4096, 0)):
        found = remarks_on(png(16, color, words(highest, *values[1:])))
        assert len(found) == told
        assert all("at most 16 levels are left" in text for text in found)


# --- Remarks on a data set ---------------------------------------------------------------------------


def test_remarks_on_images_are_told_once_with_their_number(root, source, said, recwarn):
    pixels = np.random.default_rng(0).integers(0, 4096, (6, 8, 8))
    for offset, split in enumerate(("train", "val")):
        (source / split / "a").mkdir(parents=True)
        for number in range(3):
            dark = Image.fromarray(pixels[number + offset].astype(np.uint16))
            dark.save(source / split / "a" / f"{number}.png")
        jpeg = encode(pixels[5].astype(np.uint8), "JPEG", exif=CORRUPT_EXIF)
        (source / split / "a" / "photo.jpg").write_bytes(jpeg)
    index = pack_folder(source, "set", None, Options(say=said.append))
    assert sum("6 images, such as" in line and "at most 16 levels" in line for line in said) == 1
    assert sum("Pillow says: Corrupt EXIF" in line and "photo.jpg" in line for line in said) == 1
    said.clear()
    index_folder(index.folder, {"train": (), "val": ()}, Options(force=True, say=said.append))
    (told,) = (line for line in said if "Corrupt EXIF" in line)
    assert "2 images" in told
    assert "sample 0000000" in told
    assert not recwarn.list
    assert load_index("set", None).splits["train"].samples == 4


def test_only_pillows_warnings_become_remarks(recwarn):
    import warnings

    with pillow_warnings(), collected() as found:
        decode_image(encode(np.zeros((4, 4), np.uint8), "JPEG", exif=CORRUPT_EXIF), 1)
        warnings.warn("another", stacklevel=1)
    assert any("Corrupt EXIF" in text for text in found)
    assert [str(warning.message) for warning in recwarn.list] == ["another"]
