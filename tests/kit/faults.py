"""Data sets of raw tar members that tests can damage."""

import hashlib
import io
import json
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import open_split
from disttrain.data.epoch_plan import Ids, usable_ids
from disttrain.data.streamed import Streamed
from disttrain.errors import DataError, DisttrainError, UnsafeError
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import Index, load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import find_bad_samples

Way = Literal["host", "none"]

Member = tuple[str, bytes]

Samples = dict[int, tuple[int, bytes]]

CLASSES = ("a", "b", "c", "d")

CPU = torch.device("cpu")

NOTHING = np.empty(0, np.int64)

both_ways = pytest.mark.parametrize("way", ["host", "none"])


def image(seed: int, image_format: str = "PNG", size: int = 8, **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def good(prefix: str, count: int) -> list[Member]:
    """Members of samples PREFIX0, PREFIX1, ... in the three formats, with a member that is not used."""
    members = []
    for number in range(count):
        extension, image_format = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[number % 3]
        seed = zlib.crc32(f"{prefix}{number}".encode())
        members += [
            (f"{prefix}{number}.{extension}", image(seed, image_format)),
            (f"{prefix}{number}.cls", b"%d\n" % (seed % len(CLASSES))),
            (f"{prefix}{number}.json", b"{}"),
        ]
    return members


def tar_of(*members: Member | tarfile.TarInfo, form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return file.getvalue()


def index_it(folder: Path, *, skip: bool = True, force: bool = False) -> Index:
    usual: dict[str, Sequence[str]] = {"train": (), "val": ()}
    return index_folder(folder, usual, Options(force), classes=CLASSES, skip_unusable=skip)


def make(root: Path, **shards: bytes) -> Path:
    """Lays and indexes root/set: train-0.tar with 3 samples, train-1.tar with 4, val-0.tar with 3.

    Args:
        root: the data root.
        shards: replacements and additions, `train_1` for train-1.tar.
    """
    usual = {"train_0": good("x", 3), "train_1": good("y", 4), "val_0": good("v", 3)}
    folder = root / "set"
    folder.mkdir(parents=True)
    for name, content in ({name: tar_of(*members) for name, members in usual.items()} | shards).items():
        (folder / f"{name.replace('_', '-')}.tar").write_bytes(content)
    index_it(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_entry(content: dict[str, Any], file: str) -> dict[str, Any]:
    shards = [shard for split in content["splits"].values() for shard in split["shards"]]
    entry: dict[str, Any] = next(shard for shard in shards if shard["file"] == file)
    return entry


def put(folder: Path, file: str, content: bytes) -> None:
    """Replaces a shard and its size and hash in the index, so that only its structure reveals the change."""
    (folder / file).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(folder, lambda index: shard_entry(index, file).update(bytes=len(content), sha256=digest))


def load(folder: Path, *, strict: bool = True) -> Index:
    return load_index(folder.name, str(folder.parent), strict=strict)


def serve(index: Index, way: Way, skipped: Ids = NOTHING, split: str = "train") -> Samples:
    """Returns id -> label and pixels of all samples as training gets them."""
    ids = usable_ids(index.splits[split].samples, skipped)
    loader: Cached | Streamed
    if way == "host":
        loader = Cached(open_split(index, split, skipped, lambda text: None), CPU, "host")
    else:
        loader = Streamed(index, split, CPU, batch_size=4, workers=0, say=lambda text: None)
    windows = [slice(begin, begin + 4) for begin in range(0, len(ids), 4)]
    return {
        sample: (label, pixels.tobytes())
        for batch in loader.batches(ids, windows)
        for sample, label, pixels in zip(
            batch.ids.tolist(), batch.labels.tolist(), batch.images.numpy(), strict=True
        )
    }


def look(index: Index, split: str = "train") -> list[int]:
    unusable: list[int] = find_bad_samples(index, split, lambda text: None).tolist()
    return unusable


def png(width: int, height: int, *chunks: tuple[bytes, bytes], color: int = 2, rows: bytes = b"") -> bytes:
    """Returns a PNG of 8 bits whose pixels are not there unless `rows` is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    body = b"".join(chunk(*each) for each in chunks) + chunk(b"IDAT", rows or zlib.compress(bytes(9000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def patched(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def huge_jpeg() -> bytes:
    content = image(0, "JPEG")
    return patched(content, content.index(b"\xff\xc0") + 5, ">HH", 65535, 65535)


HUGE = {
    "png": png(9000, 9000),
    "jpg": huge_jpeg(),
    "webp": patched(image(0, "WEBP"), 26, "<HH", 16383, 16383),
}


def sample(key: str = "bad", label: bytes = b"1", **images: bytes) -> list[Member]:
    members = [(f"{key}.{extension}", content) for extension, content in images.items()]
    return [*members, (f"{key}.cls", label)]


BAD: dict[str, tuple[list[Member], list[int], str]] = {
    "interleaved": (
        [("bad.png", image(0)), ("other.png", image(1)), ("bad.cls", b"0"), ("other.cls", b"1")],
        [0, 1, 2, 3],
        r"no label",
    ),
    "duplicated": (
        sample("twin", png=image(0)) + sample("other", png=image(1)) + sample("twin", png=image(2)),
        [2],
        r"key twin occurs twice",
    ),
    "one image, two labels": ([*sample(png=image(0)), ("bad.cls", b"2")], [0], r"two members named bad\.cls"),
    "no label": ([("bad.png", image(0))], [0], r"no label"),
    "no image": ([("bad.cls", b"1")], [0], r"no image"),
    "label x": (sample(label=b"x", png=image(0)), [0], r"b'x' is not a label"),
    "label -1": (sample(label=b"-1", png=image(0)), [0], r"b'-1' is not a label"),
    "label 1.5": (sample(label=b"1.5", png=image(0)), [0], r"b'1\.5' is not a label"),
    "label in other digits": (sample(label="\u0661".encode(), png=image(0)), [0], r"is not a label"),
    "empty label": (sample(label=b"", png=image(0)), [0], r"b'' is not a label"),
    "label 99": (sample(label=b"99", png=image(0)), [0], r"label 99 is not in 0 to 3"),
    "long label": (sample(label=b"0" * 600, png=image(0)), [0], r"is not a label"),
    "two images": (sample(png=image(0), jpg=image(1, "JPEG")), [0], r"two images"),
    "empty image": (sample(png=b""), [0], r"the image is empty"),
    "huge PNG": (sample(png=HUGE["png"]), [0], r"9000x9000 pixels"),
    "huge JPEG": (sample(jpg=HUGE["jpg"]), [0], r"4294836225 pixels"),
    "huge WebP": (sample(webp=HUGE["webp"]), [0], r"16383x16383 pixels"),
    "cut PNG": (sample(png=image(0)[:120]), [0], r"."),
    "cut JPEG": (sample(jpg=image(0, "JPEG")[:-40]), [0], r"."),
    "cut WebP": (sample(webp=image(0, "WEBP")[:-20]), [0], r"."),
    "text": (sample(png=b"a photograph"), [0], r"damaged, or not an image"),
    "a program": (sample(png=b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run"), [0], r"damaged, or not an image"),
}
"""Members, which of their samples are bad, and what is said of the first of those."""


def with_bad(root: Path, kind: str) -> tuple[Path, list[int]]:
    """Makes a data set with bad samples after the second of train-1.tar; returns it and their ids."""
    members, positions, _ = BAD[kind]
    content = tar_of(*good("y", 2), *members, *good("z", 2))
    return make(root, train_1=content), [3 + 2 + position for position in positions]


def told(kind: str, folder: Path) -> str:
    """Returns a pattern of what names the shard, the key and the problem."""
    key = "twin" if kind == "duplicated" else "bad"
    return rf"{re.escape(str(folder))}/train-1\.tar: sample {key}: .*{BAD[kind][2]}"


CONFIG = """
name: faults
data: {name: set, streams: 2}
model: {name: cnn_mnist}
train: {epochs: 2, batch_size: 4, trace_samples: true}
optim: {name: sgd, lr: 0.01}
checkpoint: {keep: 9}
monitor: {log_every_steps: 1}
"""


def memory_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def refused(call: Callable[[], object]) -> DisttrainError:
    """Returns how a call is refused: with 77 or 65, in a few processor seconds and under 64 MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = memory_kib("VmRSS")
    start_s = time.process_time()
    with pytest.raises((DataError, UnsafeError)) as caught:
        call()
    assert time.process_time() - start_s < 3, caught.value
    grown_mib = (memory_kib("VmHWM") - before) / 1024
    assert grown_mib < 64, f"{grown_mib:.0f} MiB: {caught.value}"
    return caught.value
