"""Image files to pixels, against Pillow's own reader."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttrain.parallel import ordered_map
from disttrain.shards.images import (
    ImageError,
    Pixels,
    decode_image,
    decode_into,
    open_image,
)
from kit import REPOSITORY


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth colors, of which a JPEG keeps most."""
    small = Image.fromarray(noise(4, 5))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(picture: Image.Image | Pixels, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, image_format, **options)
    return file.getvalue()


def pillow(image: bytes, channels: int) -> Pixels:
    with Image.open(io.BytesIO(image)) as picture:
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def pillow_or_none(image: bytes, channels: int) -> Pixels | None:
    try:
        return pillow(image, channels)
    except Exception:  # it raises anything on a broken file
        return None


def decoded_or_none(image: bytes, channels: int) -> Pixels | None:
    try:
        return decode_image(image, channels)
    except ValueError:
        return None


def assert_same_verdict(image: bytes, channels: int) -> None:
    """Refused where Pillow refuses, and else Pillow's pixels."""
    expected, found = pillow_or_none(image, channels), decoded_or_none(image, channels)
    if found is None or expected is None:
        assert found is expected, image.hex()
    else:
        assert np.array_equal(found, expected), image.hex()


# --- Pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (9, 1), (7, 5), (16, 16), (33, 17), (70, 101)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "gray"])
def test_a_jpeg_has_the_pixels_of_pillow(subsampling: str, size: tuple[int, int], channels: int) -> None:
    options = {} if subsampling == "gray" else {"subsampling": subsampling}
    picture = photo(*size, mode="L" if subsampling == "gray" else "RGB")
    for quality in (10, 50, 75, 90, 95, 100):
        for extra in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}):
            image = encode(picture, "JPEG", quality=quality, **options, **extra)
            np.testing.assert_array_equal(decode_image(image, channels), pillow(image, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_in_cmyk_or_with_any_segments_has_pillows_pixels(channels: int) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("CMYK", {}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"comment": b"a comment"}),
        ("RGB", {"icc_profile": bytes(200)}),
        ("RGB", {"xmp": b"<x:xmpmeta/>"}),
    ]
    for mode, extra in options:
        image = encode(photo(19, 23).convert(mode), "JPEG", **extra)
        np.testing.assert_array_equal(decode_image(image, channels), pillow(image, channels))


@pytest.mark.parametrize("late", [False, True], ids=["before the frame", "after the frame"])
def test_exif_turns_a_jpeg(late: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    straight, turned = encode(photo(16, 24), "JPEG"), encode(photo(16, 24), "JPEG", exif=exif)
    if late:
        start = turned.index(b"\xff\xe1")
        segment = turned[start : start + 2 + int.from_bytes(turned[start + 2 : start + 4], "big")]
        scan = straight.index(b"\xff\xda")
        turned = straight[:scan] + segment + straight[scan:]
    np.testing.assert_array_equal(decode_image(turned, 3), np.rot90(pillow(straight, 3), -1))


def test_exif_turns_a_png() -> None:
    pixels = noise(6, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode_image(encode(pixels, exif=exif), 3), np.rot90(pixels, -1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 17), (300, 200)], ids=str)
def test_a_png_or_webp_has_the_pixels_of_pillow(size: tuple[int, int], channels: int) -> None:
    colors = Image.fromarray(noise(*size))
    files = [encode(colors.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    files += [encode(colors, compress_level=0), encode(colors, dpi=(72, 72))]
    files += [encode(colors, "WEBP", lossless=True), encode(photo(*size), "WEBP", quality=60)]
    for image in files:
        np.testing.assert_array_equal(decode_image(image, channels), pillow(image, channels))


def test_lossless_files_give_back_what_was_encoded() -> None:
    pixels = noise(300, 200)  # its PNG has several data chunks
    assert encode(pixels).count(b"IDAT") > 1
    for image in (encode(pixels), encode(pixels, "WEBP", lossless=True), encode(pixels, "BMP")):
        np.testing.assert_array_equal(decode_image(image, 3), pixels)


def test_palette_cmyk_and_bilevel_become_rgb() -> None:
    pixels = np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8)
    picture = Image.fromarray(pixels)
    for image in (encode(picture.quantize(2)), encode(picture.convert("CMYK"), "TIFF")):
        np.testing.assert_array_equal(decode_image(image, 3), pixels)
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert decode_image(encode(bilevel), 3).tolist() == [[[255] * 3, [0] * 3]]


def test_16_bits_keep_the_upper_8() -> None:
    deep = encode(Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)))
    for channels in (1, 3):
        decoded = decode_image(deep, channels)
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 255]
        assert decoded.shape == (1, 4, channels)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP"])
def test_the_decoded_array_is_writable_and_has_its_channels(image_format: str) -> None:
    gray = encode(noise(2, 3)[..., 0], image_format)
    for channels in (1, 3):
        decoded = decode_image(gray, channels)
        assert decoded.shape == (2, 3, channels)
        decoded[...] = 7


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_may_lie_in_any_buffer(image_format: str) -> None:
    image = encode(photo(9, 7), image_format)
    inside = memoryview(b"before" + image + b"after")[6:-5]
    for same in (bytearray(image), memoryview(image), memoryview(bytearray(image)), inside):
        np.testing.assert_array_equal(decode_image(same, 3), pillow(image, 3))


# --- Damage -----------------------------------------------------------------------------------------


def sound_files() -> dict[str, bytes]:
    return {
        "4:4:4": encode(photo(23, 29), "JPEG", subsampling="4:4:4", quality=90),
        "4:2:0": encode(photo(23, 29), "JPEG", subsampling="4:2:0"),
        "gray": encode(photo(23, 29, "L"), "JPEG"),
        "progressive": encode(photo(23, 29), "JPEG", progressive=True),
        "restarts": encode(photo(23, 29), "JPEG", restart_marker_blocks=2),
        "png": encode(photo(23, 29)),
        "png of two chunks": encode(noise(150, 150)),
    }


@pytest.mark.integration
@pytest.mark.parametrize("name", sound_files())
def test_a_file_cut_off_anywhere_is_refused_where_pillow_refuses_it(name: str) -> None:
    image = sound_files()[name]
    for end in range(0, len(image), 1 + len(image) // 5000):
        assert_same_verdict(image[:end], 3)
    assert decoded_or_none(image[: len(image) * 3 // 4], 3) is None


@pytest.mark.integration
@pytest.mark.parametrize("name", sound_files())
def test_a_damaged_file_is_refused_where_pillow_refuses_it(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    sound = sound_files()[name]
    for channels in (1, 3) * 100:
        flipped, removed, inserted = bytearray(sound), bytearray(sound), bytearray(sound)
        for _ in range(rng.integers(1, 4)):
            flipped[rng.integers(len(sound))] ^= 1 << rng.integers(8)
        del removed[(start := rng.integers(2, len(sound))) : start + rng.integers(1, 5)]
        marker = rng.choice([0xC0, 0xC4, 0xD0, 0xD9, 0xDA, 0xDB, 0xE1, 0xFE])
        inserted[(start := rng.integers(2, len(sound))) : start] = bytes([0xFF, int(marker)])
        for image in (flipped, removed, inserted):
            assert_same_verdict(bytes(image), channels)
    capfd.readouterr()  # torchvision's libjpeg prints its warnings


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize("data", [b"", b"hello", encode(noise(6, 5))[:50], POSTSCRIPT])
def test_what_is_no_sound_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged, or not an image|truncated"):
        decode_image(data, 3)


# --- Huge pictures ----------------------------------------------------------------------------------


def test_a_huge_picture_is_refused_by_its_header() -> None:
    bomb = encode(Image.new("1", (8193, 8192)))
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="8193x8192 pixels are over the limit"):
        decode_image(bomb, 3)
    with pytest.raises(ValueError, match="8193x8192 pixels are over the limit"):
        open_image(io.BytesIO(bomb))


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9000))) + chunk(b"IEND", b"")


def patched(image: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(image)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def bombs() -> dict[str, bytes]:
    """Small files that claim a huge picture, by name."""
    picture = photo(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, turned = encode(picture, "JPEG"), encode(picture, "JPEG", exif=exif)
    alpha = encode(picture.convert("RGBA"), "WEBP", exif=exif)
    lossless = encode(picture, "WEBP", lossless=True)
    assert alpha[12:16] == b"VP8X"
    return {
        "png": png_of(9000, 9000),
        "jpeg": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65535, 65535),
        "jpeg with exif": patched(turned, turned.index(b"\xff\xc0") + 5, ">HH", 65535, 65535),
        "webp": patched(encode(picture, "WEBP"), 26, "<HH", 16383, 16383),
        "lossless webp": patched(lossless, 21, "<I", 16382 | 16382 << 14),
        "extended webp": patched(alpha, 24, "<6B", *(0xFE, 0x3F, 0) * 2),
        "gif": patched(encode(picture, "GIF"), 6, "<HH", 65535, 65535),
        "bmp": patched(encode(picture, "BMP"), 18, "<ii", 30_000, 30_000),
        "ppm": b"P6 30000 30000 255\n" + bytes(100),
    }


def test_bombs_are_refused_at_once_and_take_no_memory(tmp_path: Path) -> None:
    for name, bomb in bombs().items():
        assert len(bomb) < 10_000
        (tmp_path / name).write_bytes(bomb)
    code = """if True:
        import json, resource, sys, time
        from pathlib import Path
        from PIL import Image
        from disttrain.shards.images import decode_image, open_image
        Image.init()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before_mib, start_s, reasons = peak(), time.perf_counter(), {}
        for path in Path(sys.argv[1]).iterdir():
            for read in (lambda: decode_image(path.read_bytes(), 3), lambda: open_image(path.open("rb"))):
                try:
                    read()
                except ValueError as error:
                    reasons.setdefault(path.name, []).append(str(error))
        print(json.dumps([peak() - before_mib, time.perf_counter() - start_s, reasons]))
    """
    command = [
        sys.executable,
        "-W",
        "error::Warning",
        "-W",
        "ignore::ResourceWarning",
        "-c",
        code,
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    grown_mib, took_s, reasons = json.loads(run.stdout)
    assert {name: len(given) for name, given in reasons.items()} == dict.fromkeys(bombs(), 2)
    known = ("limit of", "could not create decoder")  # the second is what Pillow below 13 says of a WebP
    assert all(any(words in reason for words in known) for given in reasons.values() for reason in given)
    assert grown_mib < 64
    assert took_s < 5


# --- Batches ----------------------------------------------------------------------------------------


def test_decode_into_writes_what_decode_image_returns() -> None:
    picture = photo(24, 32)
    same = [encode(photo(24, 32), "JPEG", quality=quality) for quality in range(20, 100)]
    mixed = [encode(picture), *same[:3], encode(picture, "WEBP"), encode(picture.convert("L"), "JPEG")]
    mixed += [encode(picture.convert("P")), encode(picture, "JPEG", progressive=True)]
    for files in (same, mixed, []):
        for channels in (1, 3):
            out = np.full((len(files) + 2, 24, 32, channels), 99, np.uint8)
            decode_into([memoryview(file) for file in files], out[1:-1])
            for place, file in enumerate(files, start=1):
                np.testing.assert_array_equal(out[place], decode_image(file, channels))
            assert (out[[0, -1]] == 99).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_decode_into_says_which_image_is_refused_and_why(image_format: str) -> None:
    good = encode(photo(32, 32), image_format)
    out = np.empty((3, 32, 32, 3), np.uint8)
    with pytest.raises(ImageError, match=r"^32x30 pixels$") as caught:
        decode_into([good, good, encode(photo(30, 32), image_format)], out)
    assert caught.value.place == 2
    with pytest.raises(ImageError, match=r"truncated|damaged, or not an image|decode") as caught:
        decode_into([good, good[:-60], good], out)
    assert caught.value.place == 1


def test_threads_decode_batches_of_the_same_pixels() -> None:
    files = [encode(noise(16, 16, seed=i), "JPEG") for i in range(600)]
    out = np.zeros((600, 16, 16, 3), np.uint8)

    def decode(start: int) -> int:
        decode_into(files[start : start + 40], out[start : start + 40])
        return start

    assert list(ordered_map(decode, range(0, 600, 40), threads=8)) == list(range(0, 600, 40))
    np.testing.assert_array_equal(out, np.stack([pillow(file, 3) for file in files]))


def test_decoding_imports_no_torch(tmp_path: Path) -> None:
    for image_format in ("PNG", "JPEG", "WEBP"):
        (tmp_path / image_format).write_bytes(encode(photo(8, 8), image_format))
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from disttrain.shards.images import decode_image, decode_into
        for path in Path(sys.argv[1]).iterdir():
            decode_image(path.read_bytes(), 3)
            decode_into([path.read_bytes()], np.empty((1, 8, 8, 3), np.uint8))
        print({"torch", "torchvision"} & set(sys.modules))
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert run.stdout.strip() == "set()"
