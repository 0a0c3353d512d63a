"""Damaged and hostile data sets in both ways of serving: what is refused, how, and what is left out."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from disttrain.data.cached import Cached, open_split
from disttrain.data.epoch_plan import Ids, usable_ids
from disttrain.data.streamed import Streamed
from disttrain.errors import DataError, DisttrainError, UnsafeError
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import Index, load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import find_bad_samples, verify
from kit.run_results import ids_per_step
from kit.shards import read_split

Run = Callable[..., subprocess.CompletedProcess[str]]
Way = Literal["host", "none"]
Member = tuple[str, bytes]
Samples = dict[int, tuple[int, bytes]]

CLASSES = ("a", "b", "c", "d")
CPU = torch.device("cpu")
NOTHING = np.empty(0, np.int64)

both_ways = pytest.mark.parametrize("way", ["host", "none"])


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path_factory.mktemp("own-cache")))


# --- Making data sets -------------------------------------------------------------------------------


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
    """Replaces a shard and its size and hash in the index, so that no more than its structure can tell."""
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


# --- Cuts and flipped bits --------------------------------------------------------------------------


def cuts_at_blocks(content: bytes) -> Iterator[bytes]:
    for end in range(0, len(content), 512):
        yield content[:end]


def cuts_anywhere(content: bytes) -> Iterator[bytes]:
    for end in np.random.default_rng(1).integers(1, len(content), 200):
        yield content[:end]


def flips(content: bytes) -> Iterator[bytes]:
    """Flips 300 single bits: anywhere, in the images, and in the labels."""
    random = np.random.default_rng(2)
    used: dict[bool, list[int]] = {True: [], False: []}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for m in tar:
            used[m.name.endswith("cls")] += range(m.offset_data, m.offset_data + m.size)
    places = (
        random.integers(0, len(content), 120),
        random.choice(used[False], 130),
        random.choice(used[True], 50),
    )
    for place in np.concatenate(places):
        changed = bytearray(content)
        changed[place] ^= 1 << random.integers(8)
        yield bytes(changed)


DAMAGE = {"cut at a block": cuts_at_blocks, "cut anywhere": cuts_anywhere, "bit flipped": flips}


@both_ways
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_cut_or_flipped_anywhere_is_refused_by_its_name(
    tmp_path: Path, damage: str, way: Way
) -> None:
    folder = make(tmp_path)
    index = load(folder)
    path = folder / "train-1.tar"
    for content in DAMAGE[damage](path.read_bytes()):
        path.write_bytes(content)
        if len(content) != index.splits["train"].shards[1].bytes:
            with pytest.raises(DataError, match=r"train-1\.tar: \d+ bytes, but the index says"):
                load(folder)
        with pytest.raises(DataError, match=r"set/train-1\.tar: "):
            serve(index, way)


@both_ways
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard_without_hash_check_gives_no_wrong_sample(
    tmp_path: Path, damage: str, way: Way
) -> None:
    """Only what a file cannot tell of itself may pass: other pixels of the damaged image, or its label."""
    folder = make(tmp_path)
    intact = (folder / "train-1.tar").read_bytes()
    samples, keys = serve(load(folder), way), [key for key, _, _ in read_split(load(folder), "train")]
    with tarfile.open(fileobj=io.BytesIO(intact)) as tar:
        places = [(range(m.offset_data, m.offset_data + m.size), m.name) for m in tar]
    refused = 0
    for content in DAMAGE[damage](intact):
        put(folder, "train-1.tar", content or b"\0" * 512)
        same_size = len(content) == len(intact)
        flipped = next(i for i, byte in enumerate(intact) if content[i : i + 1] != bytes([byte]))
        name = next((name for place, name in places if same_size and flipped in place), "")
        key, _, extension = name.partition(".")
        said = ""
        cut = len(content) < places[-1][0].start + 512 + 2 * 512 or len(content) % 512 > 0
        try:
            index = load(folder)
            found = serve(index, way)
        except DataError as error:
            said = str(error)
        if said:
            refused += 1
            assert re.match(rf"{folder}/(index\.json: )?train-1\.tar: ", said)  # too short for its samples
            assert not name or f"sample {key}: " in said
            continue
        assert not cut, "the end mark, two blocks of zeros, is not there"
        assert [key for key, _, _ in read_split(index, "train")] == keys
        assert found.keys() == samples.keys()
        for sample in (sample for sample in samples if found[sample] != samples[sample]):
            assert keys[sample] == key
            if extension == "cls":
                assert found[sample][1] == samples[sample][1]
                problems = [problem.text for problem in verify(index)]
                assert problems == ["class_counts of train are not those of the shards"]
            else:
                assert extension in {"png", "jpg", "webp"}
                assert found[sample][0] == samples[sample][0]
    assert refused > 0


# --- Whole shards -----------------------------------------------------------------------------------


def swap_shards(folder: Path) -> None:
    first, second = ((folder / f"train-{number}.tar").read_bytes() for number in (0, 1))
    assert len(first) == len(second), "or the size would tell"
    (folder / "train-0.tar").write_bytes(second)
    (folder / "train-1.tar").write_bytes(first)


def name_twice(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        train = content["splits"]["train"]
        train["shards"].append(train["shards"][1])
        train["samples"] += train["shards"][1]["samples"]

    edit(folder, change)


def copy_shard(folder: Path) -> None:
    name_twice(folder)
    shutil.copy(folder / "train-1.tar", folder / "train-2.tar")
    edit(folder, lambda content: content["splits"]["train"]["shards"][2].update(file="train-2.tar"))


def say_more_samples(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        train = content["splits"]["train"]
        train["shards"][1]["samples"] += 1
        train["samples"] += 1

    edit(folder, change)


def replace_by_folder(folder: Path) -> None:
    (folder / "train-1.tar").unlink()
    (folder / "train-1.tar").mkdir()


SHARD_FAULTS: dict[str, tuple[Callable[[Path], object], str, list[int] | None]] = {
    "missing": (
        lambda folder: (folder / "train-1.tar").unlink(),
        r"train-1\.tar: the shard cannot be read: No such file",
        [3, 4, 5, 6],
    ),
    "a folder": (replace_by_folder, r"train-1\.tar: \d+ bytes, but the index says", [3, 4, 5, 6]),
    "swapped": (swap_shards, r"train-0\.tar: damaged: its SHA-256", [0, 1, 2, 3, 4, 5, 6]),
    "fewer samples than the index says": (
        say_more_samples, r"train-1\.tar: 4 samples, but the index says 5", [3, 4, 5, 6, 7]
    ),
    "extra": (
        lambda folder: (folder / "train-9.tar").write_bytes(tar_of(*good("z", 2))),
        r"train-9\.tar: a shard that is not in index\.json",
        [],
    ),
    "named twice": (name_twice, r"train-1\.tar is there twice \(same file\)", None),
    "a copy": (copy_shard, r"train-2\.tar is there twice \(same sha256\)", None),
}  # fmt: skip
"""What is done, what is said of it, and the ids that are left out; None if nothing can be trusted."""


@both_ways
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_missing_extra_or_duplicated_shard_is_refused_by_its_name(
    tmp_path: Path, fault: str, way: Way
) -> None:
    break_it, message, _ = SHARD_FAULTS[fault]
    folder = make(tmp_path)
    break_it(folder)
    with pytest.raises(DataError, match=message):
        serve(load(folder), way)


@both_ways
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_skipping_leaves_out_all_samples_of_a_shard_that_cannot_be_used(
    tmp_path: Path, fault: str, way: Way
) -> None:
    break_it, message, left_out = SHARD_FAULTS[fault]
    folder = make(tmp_path)
    samples = serve(load(folder), way)
    break_it(folder)
    if left_out is None:
        with pytest.raises(DataError, match=message):
            load(folder, strict=False)
        return
    index = load(folder, strict=False)
    assert look(index) == left_out
    expected = {sample: served for sample, served in samples.items() if sample not in left_out}
    assert serve(index, way, np.array(left_out, np.int64)) == expected


def test_a_repaired_shard_is_used_again(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "train-1.tar").rename(tmp_path / "away.tar")
    assert look(load(folder, strict=False)) == [3, 4, 5, 6]
    (tmp_path / "away.tar").rename(folder / "train-1.tar")
    assert look(load(folder, strict=False)) == []


@pytest.mark.parametrize("fault", ["missing", "extra", "swapped", "fewer samples than the index says"])
def test_verify_tells_of_a_shard_that_is_not_what_the_index_says(tmp_path: Path, fault: str) -> None:
    break_it, _, left_out = SHARD_FAULTS[fault]
    folder = make(tmp_path)
    break_it(folder)
    number = 9 if fault == "extra" else 1
    problems = verify(load(folder, strict=False))
    assert f"{folder}/train-{number}.tar" in {problem.place for problem in problems}
    assert len(problems) == (2 if left_out and len(left_out) == 7 else 1)


def test_data_index_refuses_the_same_samples_in_two_shards(tmp_path: Path) -> None:
    again = tar_of(*good("y", 4)) + bytes(10240)  # other bytes, same samples
    with pytest.raises(DataError, match=r"train-2\.tar: sample y0: .*in another shard"):
        make(tmp_path, train_2=again)


@both_ways
@pytest.mark.parametrize("change", ["flip", "remove"])
def test_a_shard_that_is_damaged_between_two_epochs_is_refused(tmp_path: Path, way: Way, change: str) -> None:
    folder = make(tmp_path)
    index = load(folder)
    samples = serve(index, way)
    time.sleep(0.02)  # more than a tick of the file system's clock
    path = folder / "train-1.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.unlink()
    if change == "flip":
        path.write_bytes(content)
    if way == "host":  # has its own copy, which is sealed
        assert serve(index, way) == samples
    else:
        with pytest.raises(DataError, match=r"train-1\.tar: "):
            serve(index, way)


# --- Samples ----------------------------------------------------------------------------------------


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
        r"key twin is there twice",
    ),
    "one image, two labels": ([*sample(png=image(0)), ("bad.cls", b"2")], [0], r"two members bad\.cls"),
    "no label": ([("bad.png", image(0))], [0], r"no label"),
    "no image": ([("bad.cls", b"1")], [0], r"no image"),
    "label x": (sample(label=b"x", png=image(0)), [0], r"b'x' is not a label"),
    "label -1": (sample(label=b"-1", png=image(0)), [0], r"b'-1' is not a label"),
    "label 1.0": (sample(label=b"1.0", png=image(0)), [0], r"b'1\.0' is not a label"),
    "label in other digits": (sample(label="\u0661".encode(), png=image(0)), [0], r"is not a label"),
    "empty label": (sample(label=b"", png=image(0)), [0], r"b'' is not a label"),
    "label 99": (sample(label=b"99", png=image(0)), [0], r"label 99 is not one from 0 to 3"),
    "long label": (sample(label=b"0" * 600, png=image(0)), [0], r"is not a label"),
    "two images": (sample(png=image(0), jpg=image(1, "JPEG")), [0], r"two images"),
    "empty image": (sample(png=b""), [0], r"the image is empty"),
    "huge PNG": (sample(png=HUGE["png"]), [0], r"9000x9000 pixels"),
    "huge JPEG": (sample(jpg=HUGE["jpg"]), [0], r"4294836225 pixels"),
    "huge WebP": (sample(webp=HUGE["webp"]), [0], r"16383x16383 pixels"),
    "mixed shapes, PNG": (sample(png=image(0, size=9)), [0], r"9x9 pixels"),
    "mixed shapes, JPEG": (sample(jpg=image(0, "JPEG", size=9)), [0], r"9x9 pixels"),
    "mixed shapes, WebP": (sample(webp=image(0, "WEBP", size=9)), [0], r"9x9 pixels"),
    "cut PNG": (sample(png=image(0)[:120]), [0], r"."),
    "cut JPEG": (sample(jpg=image(0, "JPEG")[:-40]), [0], r"."),
    "cut WebP": (sample(webp=image(0, "WEBP")[:-20]), [0], r"."),
    "text": (sample(png=b"a photograph"), [0], r"not a sound image file"),
    "a program": (sample(png=b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run"), [0], r"not a sound image file"),
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


@pytest.mark.parametrize("kind", BAD)
def test_data_index_refuses_a_bad_sample_by_shard_and_key(tmp_path: Path, kind: str) -> None:
    folder, _ = with_bad(tmp_path, kind)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=told(kind, folder)):
        index_it(folder, skip=False)
    assert not (folder / "index.json").exists()


@both_ways
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_stops_training_by_shard_and_key(tmp_path: Path, kind: str, way: Way) -> None:
    folder, _ = with_bad(tmp_path, kind)
    with pytest.raises(DataError, match=told(kind, folder)) as caught:
        serve(load(folder), way)
    assert "data.on_error=skip" in str(caught.value)


@both_ways
@pytest.mark.parametrize("kind", BAD)
def test_skipping_leaves_out_the_bad_sample_and_serves_all_others(
    tmp_path: Path, kind: str, way: Way
) -> None:
    folder, left_out = with_bad(tmp_path, kind)
    index = load(folder)
    assert look(index) == left_out
    found = serve(index, way, np.array(left_out, np.int64))
    sound = [m for m in BAD[kind][0] if kind == "duplicated" and m[0].startswith(("twin", "other"))][:4]
    clean = make(tmp_path / "clean", train_1=tar_of(*good("y", 2), *sound, *good("z", 2)))
    assert list(found.values()) == list(serve(load(clean), way).values())


@pytest.mark.parametrize("kind", BAD)
def test_verify_names_the_bad_sample(tmp_path: Path, kind: str) -> None:
    folder, left_out = with_bad(tmp_path, kind)
    problems = verify(load(folder))
    assert len(problems) == len(left_out)
    assert re.match(told(kind, folder), f"{problems[0].place}: sample {problems[0].key}: {problems[0].text}")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_a_bad_sample_are_served_and_that_with_it_is_not(tmp_path: Path, workers: int) -> None:
    folder, (bad,) = with_bad(tmp_path, "cut JPEG")
    order = np.array([7, 0, 6, 1, 2, bad, 3, 4])
    loader = Streamed(load(folder), "train", CPU, batch_size=2, workers=workers, say=lambda text: None)
    batches = loader.batches(order, [slice(begin, begin + 2) for begin in range(0, 8, 2)])
    assert [next(batches).ids.tolist() for _ in range(2)] == [[7, 0], [6, 1]]
    with pytest.raises(DataError, match="sample bad"):
        next(batches)


@pytest.mark.parametrize("names", [["a", "b"], ["a"]])
@both_ways
def test_a_label_is_checked_against_the_classes_of_this_index(
    tmp_path: Path, names: list[str], way: Way
) -> None:
    folder = make(tmp_path)
    assert serve(load(folder), way)  # with four classes

    def fewer(content: dict[str, Any]) -> None:
        content["classes"] = names
        for split in content["splits"].values():
            split["class_counts"] = split["class_counts"][: len(names)]

    edit(folder, fewer)
    with pytest.raises(DataError, match=r"set/train-\d\.tar: sample \w+: label \d is not one from 0 to"):
        serve(load(folder), way)


# --- Whole runs -------------------------------------------------------------------------------------

CONFIG = """
name: faults
data: {name: set, streams: 2}
model: {name: cnn_mnist}
train: {epochs: 2, batch_size: 4, trace_samples: true}
optim: {name: sgd, lr: 0.01}
checkpoint: {keep: 9}
monitor: {log_every_steps: 1}
"""


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


@pytest.fixture
def train(disttrain: Run, tmp_path: Path) -> Run:
    """Trains two epochs on tmp_path/set into the run folder that is named first."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "faults.yaml").write_text(CONFIG)
        return disttrain(
            "run", "faults.yaml", *arguments, "--run-dir", name,
            env={"DISTTRAIN_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


@both_ways
@pytest.mark.parametrize("kind", ["cut JPEG", "no label"])
def test_a_bad_sample_ends_the_run_with_65_before_training(
    tmp_path: Path, train: Run, kind: str, way: Way
) -> None:
    folder, _ = with_bad(tmp_path, kind)
    result = train("run", "--procs", "1", f"data.cache={way}", "train.batch_size=64")
    assert result.returncode == 65, result.stderr
    assert re.search(told(kind, folder), result.stderr)
    assert "Traceback" not in result.stderr
    assert records(tmp_path / "run") == []
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@both_ways
def test_a_run_on_a_damaged_shard_ends_with_65(tmp_path: Path, train: Run, way: Way) -> None:
    folder = make(tmp_path)
    content = bytearray((folder / "train-1.tar").read_bytes())
    content[600] ^= 2
    (folder / "train-1.tar").write_bytes(content)
    result = train("run", "--procs", "1", f"data.cache={way}", "train.batch_size=64")
    assert result.returncode == 65, result.stderr
    assert re.search(r"set/train-1\.tar: damaged: its SHA-256 .*first bad sample y0", result.stderr)
    assert records(tmp_path / "run") == []


def test_skip_trains_on_all_other_samples_and_counts_the_rest(tmp_path: Path, train: Run) -> None:
    bad = [member for kind in ("no label", "cut PNG") for member in BAD[kind][0]]
    bad[0] = ("first.png", bad[0][1])
    folder = make(
        tmp_path,
        train_1=tar_of(*good("y", 3), *bad, *good("z", 3)),  # ids 3 to 10, of which 6 and 7 are bad
        train_2=tar_of(*good("w", 3)),  # ids 11 to 13
        train_3=tar_of(*good("u", 4)),  # ids 14 to 17
        val_0=tar_of(*good("v", 4), *BAD["mixed shapes, PNG"][0], *good("t", 2)),
    )
    (folder / "train-2.tar").unlink()
    usable = {*range(18)} - {6, 7, 11, 12, 13}
    skip = "data.on_error=skip"
    one = train("one", "--procs", "1", skip, "data.cache=host")
    two = train("two", "--procs", "2", skip, "data.cache=none")
    for name, result in (("one", one), ("two", two)):
        assert result.returncode == 0, result.stderr
        steps = ids_per_step(tmp_path / name)
        for epoch in (1, 2):
            ids = [sample for place, batch in steps.items() if place[0] == epoch for sample in batch]
            assert sorted(ids) == sorted(usable)
        counts = {(r["kind"], r["skipped"]) for r in records(tmp_path / name)}
        assert counts == {("train", 5), ("eval", 1)}
        assert [r["total"] for r in records(tmp_path / name) if r["kind"] == "eval"] == [6, 6]
    assert ids_per_step(tmp_path / "one") == ids_per_step(tmp_path / "two")
    for line in ("train-1.tar: sample first: no label", "train-2.tar: all its samples: No such file"):
        assert f"left out: {folder}/{line}" in one.stdout
    after_one_epoch = tmp_path / "one" / "checkpoints" / "step_00000004"
    assert after_one_epoch.exists(), list(after_one_epoch.parent.iterdir())
    resumed = train("more", "--procs", "2", skip, "data.cache=none", "--resume", str(after_one_epoch))
    assert resumed.returncode == 0, resumed.stderr
    second = {place: ids for place, ids in ids_per_step(tmp_path / "one").items() if place[0] == 2}
    assert ids_per_step(tmp_path / "more") == second


def test_a_run_that_ends_at_a_bad_sample_goes_on_without_it(tmp_path: Path, train: Run) -> None:
    with_bad(tmp_path, "cut PNG")
    ended = train("run", "--procs", "1", "data.cache=none")
    assert ended.returncode == 65, ended.stderr
    assert "data.on_error=skip" in ended.stderr  # the remedy, and it works
    went_on = train("run", "--procs", "1", "data.cache=none", "data.on_error=skip")
    assert went_on.returncode == 0, went_on.stderr
    assert "going on with data.on_error: stop -> skip" in went_on.stdout
    assert records(tmp_path / "run")[-2]["skipped"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_usable_sample_is_a_data_error(tmp_path: Path, train: Run, split: str) -> None:
    folder = make(tmp_path)
    for path in folder.glob(f"{split}-*.tar"):
        path.unlink()
    result = train("run", "--procs", "1", "data.on_error=skip", "data.cache=none", "train.epochs=1")
    assert result.returncode == 65, result.stderr[-300:]


def test_verify_lists_what_is_bad_and_ends_with_65(disttrain: Run, tmp_path: Path) -> None:
    folder, _ = with_bad(tmp_path, "interleaved")
    (folder / "train-0.tar").unlink()
    result = disttrain("data", "verify", "set", "--root", tmp_path)
    assert result.returncode == 65
    assert result.stdout.splitlines() == [
        f"{folder}/train-0.tar: No such file or directory",
        f"{folder}/train-1.tar: sample bad: no label (member cls)",
        f"{folder}/train-1.tar: sample other: no label (member cls)",
        f"{folder}/train-1.tar: sample bad: key bad is there twice: interleaved or duplicated members",
        f"{folder}/train-1.tar: sample other: key other is there twice: interleaved or duplicated members",
    ]
    assert result.stderr.startswith("disttrain: set: 5 problems; ")


def test_data_index_ends_with_65_and_with_skip_writes_the_index(disttrain: Run, tmp_path: Path) -> None:
    folder, _ = with_bad(tmp_path, "two images")
    index = (folder / "index.json").read_bytes()
    (folder / "index.json").unlink()
    (tmp_path / "names").write_text("\n".join(CLASSES))
    command = ("data", "index", folder, "--classes", "names")
    result = disttrain(*command)
    assert result.returncode == 65
    assert re.search(told("two images", folder), result.stderr)
    assert not (folder / "index.json").exists()
    result = disttrain(*command, "--skip")
    assert result.returncode == 0, result.stderr
    assert "1 samples cannot be used, such as" in result.stdout
    assert (folder / "index.json").read_bytes() == index


# --- Hostile: little time, little memory, nothing executed, nothing touched ------------------------


def memory_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def refused(call: Callable[[], object]) -> DisttrainError:
    """Returns how a call is refused: with 77 or 65, in under a second, in under 64 MiB of extra memory.

    The second of two attempts may make up for another process that took the time of the first.
    """
    took_s = []
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = memory_kib("VmRSS")
        start_s = time.perf_counter()
        with pytest.raises((DataError, UnsafeError)) as caught:
            call()
        took_s.append(time.perf_counter() - start_s)
        grown_mib = (memory_kib("VmHWM") - before) / 1024
        assert grown_mib < 64, f"{grown_mib:.0f} MiB: {caught.value}"
        if took_s[-1] < 1:
            break
    assert min(took_s) < 1, caught.value
    return caught.value


def surroundings(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns path -> size and time of all that lies around a data set."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


class Bite:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (os.system, (f"touch {self.target}",))


COMMANDS = [
    "pipe:touch pwned",
    "pipe:touch pwned; cat train-1.tar",
    "../outside.tar",
    "sub/../../outside.tar",
    "./train-1.tar",
    "/etc/passwd",
    "file:///etc/passwd",
    "file:train-1.tar",
    "ftp://localhost/train-1.tar",
    "s3://bucket/train-1.tar",
    "train-1.tar | touch pwned",
    "train-1.tar; touch pwned",
    "$(touch pwned).tar",
    "`touch pwned`.tar",
    "-rf.tar",
    "train-1.tar\n",
    "train-1.tar\0",
    "~/train-1.tar",
    "",
]
NO_ADDRESSES = [
    "http://x;touch pwned",
    "http://x/$(touch pwned).tar",
    "https:///etc/passwd",
    "http://x/\n|touch pwned",
    "http://[x/a.tar",
]


def name_shard(folder: Path, file: str) -> None:
    edit(folder, lambda content: shard_entry(content, "train-1.tar").update(file=file))


@both_ways
@pytest.mark.parametrize("file", [*COMMANDS, *NO_ADDRESSES])
def test_an_index_that_names_a_command_or_leaves_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, way: Way
) -> None:
    folder = make(tmp_path / "inside")
    (tmp_path / "outside.tar").write_bytes((folder / "train-1.tar").read_bytes())
    (tmp_path / "inside" / "outside.tar").write_bytes((folder / "train-1.tar").read_bytes())
    name_shard(folder, file)
    if file in NO_ADDRESSES:
        (folder / "train-1.tar").unlink()  # or it would be refused as one too many
    monkeypatch.chdir(folder)
    before = surroundings(tmp_path)
    error = refused(lambda: serve(load(folder), way))
    if file in COMMANDS:
        assert isinstance(error, UnsafeError)
        assert f"{folder}/index.json: refused to open {file!r}" in str(error)
    assert surroundings(tmp_path) == before


def test_a_run_on_an_index_that_names_a_command_ends_with_77(tmp_path: Path, train: Run) -> None:
    name_shard(make(tmp_path), "pipe:touch pwned")
    for options in ((), ("data.on_error=skip",)):
        result = train("run", "--procs", "1", *options)
        assert result.returncode == 77, result.stderr
        assert "set/index.json: refused to open 'pipe:touch pwned'" in result.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_a_root_that_is_a_command_ends_with_77(disttrain: Run, tmp_path: Path) -> None:
    for root in ("pipe:touch pwned", "pipe:cat x | touch pwned", "file:///etc"):
        for command in (("data", "verify"), ("data", "inspect")):
            result = disttrain(*command, "set", "--root", root)
            assert result.returncode == 77, result.stderr
            assert "refused to open" in result.stderr
    assert not list(tmp_path.rglob("pwned"))


def special(name: str, kind: bytes, link: str = "", **pax: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.devmajor, member.devminor = 1, 3
    member.pax_headers = {key.replace("__", "."): value for key, value in pax.items()}
    return member


def claiming(size: int) -> bytes:
    member = tarfile.TarInfo("bad.png")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def open_ended(members: list[Member]) -> bytes:
    """Returns a tar without its end mark."""
    return tar_of(*members)[: sum(512 + -(-len(content) // 512) * 512 for _, content in members)]


def hostile_tar(kind: str, outside: Path) -> bytes:
    """Returns a shard of two good samples and something that does not belong there."""
    start = good("y", 2)
    payload = pickle.dumps(Bite(outside / "pwned"))
    pax = tarfile.PAX_FORMAT
    names = {
        "absolute name": str(outside / "pwned.png"),
        "name with ..": "../pwned.png",
        "name with .. inside": "a/../../pwned.png",
        "name with a drive": "c:/pwned.png",
        "name with a backslash": "..\\pwned.png",
        "gzip member": "bad.cls.gz",
        "xz member": "bad.json.XZ",
        "zip member": "bad.zip",
    }
    if kind in names:
        return tar_of(*start, (names[kind], image(0)), ("bad.cls", b"1"))
    pickles = {"pickle": "bad.pkl", "pickle of a label": "bad.cls.pyd", "weights": "bad.PTH"}
    if kind in pickles:
        return tar_of(*start, (pickles[kind], payload), ("bad.png", image(0)), ("bad.cls", b"1"))
    members = {
        "symbolic link": special("bad.png", tarfile.SYMTYPE, "/etc/passwd"),
        "symbolic link to a folder": special("bad", tarfile.SYMTYPE, str(outside)),
        "hard link": special("bad.png", tarfile.LNKTYPE, "y0.png"),
        "character device": special("bad.png", tarfile.CHRTYPE),
        "block device": special("bad.png", tarfile.BLKTYPE),
        "named pipe": special("bad.png", tarfile.FIFOTYPE),
        "GNU sparse": special("bad.png", tarfile.GNUTYPE_SPARSE),
        "contiguous": special("bad.png", tarfile.CONTTYPE),
        "unknown kind": special("bad.png", b"Z"),
    }
    if kind in members:
        return tar_of(*start, members[kind])
    if kind == "pax sparse":
        return tar_of(*start, special("bad.png", tarfile.REGTYPE, GNU__sparse__major="1"), form=pax)
    if kind == "pax name with ..":
        return tar_of(*start, ("../" * 60 + "pwned.png", image(0)), form=pax)
    if kind == "GNU name with ..":
        return tar_of(*start, ("../" * 60 + "pwned.png", image(0)), form=tarfile.GNU_FORMAT)
    if kind == "pax header of 1 GiB":
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 2**30
        return open_ended(start) + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    if kind == "gzip of the tar":
        return gzip.compress(tar_of(*start, ("bad.png", bytes(2**24))), mtime=0)
    sizes = {"claims 512 MiB": 2**29, "claims 8 EiB": 2**63, "claims to be negative": -1}
    return open_ended(start) + claiming(sizes[kind])


UNSAFE = [
    "absolute name", "name with ..", "name with .. inside", "name with a drive", "name with a backslash",
    "gzip member", "xz member", "zip member", "pickle", "pickle of a label", "weights",
    "symbolic link", "symbolic link to a folder", "hard link", "character device", "block device",
    "named pipe", "GNU sparse", "contiguous", "unknown kind", "pax sparse", "pax name with ..",
    "GNU name with ..",
]  # fmt: skip
DAMAGED = [
    "pax header of 1 GiB",
    "gzip of the tar",
    "claims 512 MiB",
    "claims 8 EiB",
    "claims to be negative",
]


@pytest.mark.parametrize("kind", [*UNSAFE, *DAMAGED])
def test_a_hostile_shard_is_refused_at_once_and_touches_nothing(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "inside")
    put(folder, "train-1.tar", hostile_tar(kind, tmp_path))
    index = load(folder)
    before = surroundings(tmp_path)
    expected = UnsafeError if kind in UNSAFE else DataError
    calls: dict[str, Callable[[], object]] = {
        "host": lambda: serve(index, "host"),
        "none": lambda: serve(index, "none"),
        "data index": lambda: index_it(folder, force=True),
    }
    if kind in UNSAFE:
        calls |= {"skip": lambda: look(index), "verify": lambda: verify(index)}
    else:
        assert look(index) == [3, 4, 5, 6]
        assert [problem.place for problem in verify(index)] == [f"{folder}/train-1.tar"]
    for name, call in calls.items():
        error = refused(call)
        assert type(error) is expected or (expected is DataError and isinstance(error, DataError)), name
        assert f"{folder}/train-1.tar: " in str(error)
    assert surroundings(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("data.on_error=skip", "data.cache=none")])
def test_a_run_on_a_pickle_ends_with_77_and_does_not_open_it(
    tmp_path: Path, train: Run, options: tuple[str, ...]
) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", hostile_tar("pickle", tmp_path))
    result = train("run", "--procs", "1", *options)
    assert result.returncode == 77, result.stderr
    assert "set/train-1.tar: member 'bad.pkl' is a pickle" in result.stderr
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("kind", "code"), [("name with ..", 77), ("symbolic link", 77), ("gzip of the tar", 65)]
)
def test_the_commands_end_with_the_code_of_what_they_refuse(
    disttrain: Run, tmp_path: Path, kind: str, code: int
) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", hostile_tar(kind, tmp_path))
    for command in (("verify", "set", "--root", tmp_path), ("index", folder, "--force")):
        result = disttrain("data", *command)
        assert result.returncode == code, result.stderr
        assert "set/train-1.tar: " in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_a_member_of_512_mib_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    size = 512 + 2**29 + 1024
    with (folder / "train-1.tar").open("wb") as file:  # a file with a hole: takes no room on the disk
        file.write(claiming(2**29)[:512])
        file.truncate(size)
    edit(folder, lambda content: shard_entry(content, "train-1.tar").update(bytes=size))
    before = surroundings(tmp_path)
    error = refused(lambda: serve(load(folder), "none"))
    assert "member bad.png has 536870912 bytes" in str(error)
    assert surroundings(tmp_path) == before


def test_a_member_of_200_mib_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    content = b"".join(
        [claiming(200 * 2**20)[:512], b"\x89PNG", bytes(200 * 2**20 - 4), tar_of(("bad.cls", b"1"))]
    )
    put(folder, "train-1.tar", content)
    edit(folder, lambda index: shard_entry(index, "train-1.tar").update(samples=1))
    edit(folder, lambda index: index["splits"]["train"].update(samples=4, class_counts=[0, 0, 0, 0]))
    del content
    index = load(folder)
    look(index)  # its hash takes longer than a second
    assert "sample bad" in str(refused(lambda: serve(index, "none")))


# --- Bombs ------------------------------------------------------------------------------------------


def zeros(mib: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(mib)), packer.flush()])


def black_webp(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


BOMBS: dict[str, Callable[[], list[Member]]] = {
    "PNG": lambda: sample(png=png(9000, 9000, rows=zeros(232))),
    "PNG of usual size": lambda: sample(png=png(6000, 6000, rows=zeros(103))),
    "PNG with a palette": lambda: sample(png=png(8000, 8000, (b"PLTE", bytes(768)), color=3, rows=zeros(62))),
    "PNG with alpha": lambda: sample(png=png(5000, 5000, color=6, rows=zeros(96))),
    "PNG text": lambda: sample(png=png(9, 8, (b"zTXt", b"Comment\0\0" + zeros(512)))),
    "PNG color profile": lambda: sample(png=png(9, 8, (b"iCCP", b"p\0\0" + zeros(512)))),
    "PNG with more than its pixels": lambda: sample(png=png(9, 8, (b"gAMA", bytes(4)), rows=zeros(512))),
    "JPEG": lambda: sample(jpg=HUGE["jpg"]),
    "WebP": lambda: sample(webp=HUGE["webp"]),
    "WebP of usual size": lambda: sample(webp=black_webp(5000)),
    "GIF": lambda: sample(png=patched(image(0, "GIF"), 6, "<HH", 65535, 65535)),
    "BMP": lambda: sample(png=patched(image(0, "BMP"), 18, "<ii", 30_000, 30_000)),
    "PPM": lambda: sample(png=b"P6 30000 30000 255\n" + bytes(100)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_of_an_image_is_refused_by_shard_and_key(tmp_path: Path, kind: str) -> None:
    members = BOMBS[kind]()
    assert len(members[0][1]) < 2**20
    folder = make(tmp_path)
    put(folder, "train-1.tar", tar_of(*good("y", 2), *members, *good("z", 1)))
    index = load(folder)
    for call in (
        lambda: serve(index, "none"),
        lambda: serve(index, "host"),
        lambda: index_it(folder, skip=False, force=True),
    ):
        error = refused(call)
        assert f"{folder}/train-1.tar: sample bad: " in str(error)


def test_a_bomb_that_is_the_first_image_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    put(folder, "train-0.tar", tar_of(*BOMBS["PNG of usual size"](), *good("w", 2)))
    error = refused(lambda: index_it(folder, skip=False, force=True))
    assert f"{folder}/train-0.tar: sample bad: " in str(error)


def test_a_label_of_ten_digits_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", tar_of(*good("y", 2), *sample(label=b"9999999999", png=image(0))))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from disttrain.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "data", "index", str(folder), "--force"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 65, result.stderr[-300:]
    assert "train-1.tar: sample bad: " in result.stderr


# --- Hostile index and files ------------------------------------------------------------------------


def grow(content: dict[str, Any], samples: int) -> None:
    train = content["splits"]["train"]
    train["shards"][0]["samples"] += samples
    train["samples"] += samples


CLAIMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "images of a terapixel": lambda content: content.update(height=10**6, width=10**6),
    "more samples than bytes": lambda content: grow(content, 10**13),
    "more samples than a number holds": lambda content: grow(content, 2**64),
}


@both_ways
@pytest.mark.parametrize("claim", CLAIMS)
def test_an_index_that_claims_the_impossible_is_refused(tmp_path: Path, claim: str, way: Way) -> None:
    folder = make(tmp_path)
    edit(folder, CLAIMS[claim])
    index_or_shard = rf"{re.escape(str(folder))}/(index\.json|train-0\.tar): "

    def serve_ten() -> None:
        index = load(folder)
        if way == "host":
            open_split(index, "train", NOTHING, lambda text: None)
        else:
            loader = Streamed(index, "train", CPU, batch_size=4, workers=0, say=lambda text: None)
            list(loader.batches(np.arange(7), [slice(0, 4)]))

    assert re.match(index_or_shard, str(refused(serve_ten)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 1000,
        b"[" * 200_000,
        b'{"version": 1e999}',
        b"\xff\xfe",
        b'{"version": 1, "classes": null}',
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = make(tmp_path)
    (folder / "index.json").write_bytes(text)
    assert f"{folder}/index.json: " in str(refused(lambda: load(folder)))


def test_an_index_of_200_mib_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    os.truncate(folder / "index.json", 200 * 2**20)
    assert f"{folder}/index.json: " in str(refused(lambda: load(folder)))


def test_a_named_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    cases = {"index": "train-1.tar", "verify": "train-1.tar", "inspect": "index.json"}
    processes = {}
    for command, file in cases.items():
        folder = make(tmp_path / command)
        (folder / file).unlink()
        os.mkfifo(folder / file)
        arguments = {"index": [str(folder), "--force"]}.get(command, ["set", "--root", str(folder.parent)])
        processes[command] = subprocess.Popen(
            [sys.executable, "-m", "disttrain", "data", command, *arguments], stderr=subprocess.DEVNULL
        )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(process.poll() is None for process in processes.values()):
        time.sleep(0.05)
    codes = {command: process.poll() for command, process in processes.items()}
    for process in processes.values():
        process.kill()
        process.wait()
    assert {code in {65, 77} for code in codes.values()} == {True}, codes
