"""The decoded copy of a data set."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

from disttrain.data import batches, decoded_copy
from disttrain.data.batches import choose_cache
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import DecodedSplit, open_split
from disttrain.errors import DataError, StorageError
from disttrain.shards.images import decode_image
from disttrain.shards.index import Index, load_index
from kit import REPOSITORY
from kit.shards import read_split

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for decoded data sets."""
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def digits(digits_root: Path) -> Index:
    return load_index("digits", str(digits_root))


def source(index: Index, split: str) -> tuple[np.ndarray, np.ndarray]:
    samples = list(read_split(index, split))
    images = np.stack([decode_image(image, index.channels) for _, image, _ in samples])
    return images, np.array([label for _, _, label in samples])


def decoded_folder(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "decoded").iterdir() if path.is_dir())
    return folder


def assert_is_source(decoded: DecodedSplit, index: Index, split: str) -> None:
    images, labels = source(index, split)
    assert decoded.images.dtype == np.uint8
    assert decoded.labels.dtype == np.int64
    assert np.array_equal(decoded.images, images)
    assert np.array_equal(decoded.labels, labels)


def test_the_digits_come_back_as_they_were(cache: Path, digits: Index) -> None:
    train, val = (open_split(digits, split, NONE, lambda text: None) for split in ("train", "val"))
    assert_is_source(train, digits, "train")
    assert_is_source(val, digits, "val")
    assets = REPOSITORY / "disttrain" / "assets" / "digits.npz"
    with np.load(assets) as original:
        pixels = np.rint(original["images"] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        labels = original["labels"]
    expected = Counter((image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True))
    found: Counter[tuple[bytes, int]] = Counter()
    for split in (train, val):
        found.update((image.tobytes(), int(n)) for image, n in zip(split.images, split.labels, strict=True))
    assert found == expected


def test_the_second_opening_does_not_decode(
    cache: Path, digits: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    open_split(digits, "val", NONE, said.append)
    assert len(said) == 1
    assert "decoding digits/val" in said[0]
    monkeypatch.setattr(decoded_copy, "decoded", None)
    assert_is_source(open_split(digits, "val", NONE, said.append), digits, "val")
    assert len(said) == 1


def test_writing_to_the_images_does_not_reach_the_cache(cache: Path, digits: Index) -> None:
    open_split(digits, "val", NONE, lambda text: None).images[:] = 0
    assert_is_source(open_split(digits, "val", NONE, lambda text: None), digits, "val")


@pytest.mark.integration
def test_processes_that_open_at_once_decode_once(cache: Path, digits_root: Path, tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
import numpy as np
from disttrain.data import batches, decoded_copy
from disttrain.shards import reader
from disttrain.shards.index import load_index
root, ready, go = sys.argv[1:]
decode_into = reader.decode_into
def slowly(*arguments):
    time.sleep(0.001)
    return decode_into(*arguments)
reader.decode_into = slowly
index = load_index("digits", root)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.002)
decoded = decoded_copy.open_split(index, "val", np.empty(0, np.int64), print)
print(decoded.images.sum(), decoded.labels.sum())
"""
    go = tmp_path / "go"
    command = [sys.executable, "-W", "error", "-c", program, str(digits_root)]
    flags = [tmp_path / f"ready_{i}" for i in range(2)]
    processes = [
        subprocess.Popen([*command, str(flag), str(go)], stdout=subprocess.PIPE, text=True) for flag in flags
    ]
    while not all(flag.exists() for flag in flags):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("decoding digits/val") for output in outputs) == 1
    images, labels = source(load_index("digits", str(digits_root)), "val")
    assert [output.splitlines()[-1] for output in outputs] == [f"{images.sum()} {labels.sum()}"] * 2


@contextmanager
def another_process_holds(lock: Path) -> Iterator[subprocess.Popen[str]]:
    program = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_who_waits_for_another_process_says_so(cache: Path, digits: Index) -> None:
    open_split(digits, "val", NONE, lambda text: None)
    folder = decoded_folder(cache)
    shutil.rmtree(folder)
    said: list[str] = []
    with another_process_holds(folder.parent / f".{folder.name}.lock") as process:

        def say(text: str) -> None:
            said.append(text)
            if "waiting" in text and process.stdin is not None:
                process.stdin.close()  # lets it end

        assert_is_source(open_split(digits, "val", NONE, say), digits, "val")
    assert ["waiting" in text for text in said] == [True, False]


@pytest.mark.integration
def test_a_process_that_is_killed_while_it_decodes_holds_nobody_up(
    cache: Path, digits: Index, digits_root: Path
) -> None:
    decodes_forever = (
        "import sys, time, numpy as np\n"
        "from disttrain.data.decoded_copy import open_split\n"
        "from disttrain.shards.index import load_index\n"
        "def say(text):\n"
        "    print(text, flush=True)\n"
        "    time.sleep(600)\n"
        "open_split(load_index('digits', sys.argv[1]), 'val', np.empty(0, np.int64), say)\n"
    )
    command = [sys.executable, "-c", decodes_forever, str(digits_root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "decoding" in process.stdout.readline()
            said: list[str] = []

            def say(text: str) -> None:
                said.append(text)
                process.kill()

            assert_is_source(open_split(digits, "val", NONE, say), digits, "val")
        finally:
            process.kill()
    assert ["waiting" in text for text in said] == [True, False]


def damage(path: Path, how: str) -> None:
    array = np.load(path)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "no array":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "missing":
        path.unlink()
    elif how == "shorter":
        np.save(path, array[:-1])
    elif how == "other dtype":
        np.save(path, array.astype(np.float32))


@pytest.mark.parametrize("how", ["empty", "truncated", "no array", "missing", "shorter", "other dtype"])
@pytest.mark.parametrize("file", ["images.npy", "labels.npy"])
def test_a_damaged_cache_is_made_again(cache: Path, digits: Index, file: str, how: str) -> None:
    open_split(digits, "val", NONE, lambda text: None)
    damage(decoded_folder(cache) / file, how)
    said: list[str] = []
    assert_is_source(open_split(digits, "val", NONE, said.append), digits, "val")
    assert len(said) == 1


def test_what_a_killed_process_left_is_no_obstacle(cache: Path, digits: Index) -> None:
    open_split(digits, "val", NONE, lambda text: None)
    folder = decoded_folder(cache)
    folder.rename(folder.parent / f".{folder.name}.partial")
    assert_is_source(open_split(digits, "val", NONE, lambda text: None), digits, "val")
    assert decoded_folder(cache) == folder


def test_a_flipped_byte_in_a_shard_is_a_data_error(cache: Path, digits_root: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_root / "digits", tmp_path / "digits")
    shard = tmp_path / "digits" / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"val-000000\.tar.*damaged") as caught:
        open_split(load_index("digits", str(tmp_path)), "val", NONE, lambda text: None)
    assert caught.value.exit_code == 65
    assert [path.name for path in (cache / "decoded").iterdir() if not path.name.endswith(".lock")] == []


def test_images_of_another_size_than_the_index_says(cache: Path, digits: Index) -> None:
    wrong = digits.model_copy(update={"stored_height": 9, "digest": "f" * 64})
    with pytest.raises(DataError, match=r"val-000000\.tar: sample 0+: .*8x8"):
        open_split(wrong, "val", NONE, lambda text: None)
    assert [path.name for path in (cache / "decoded").iterdir() if not path.name.endswith(".lock")] == []


def test_a_full_disk_is_told_before_decoding(
    cache: Path, digits: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(decoded_copy.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs \d+ MiB, .*DISTTRAIN_CACHE") as caught:
        open_split(digits, "val", NONE, lambda text: None)
    assert caught.value.exit_code == 74


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes every write of this process beyond `size` bytes of a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_write_is_a_storage_error_and_leaves_nothing(cache: Path, digits: Index) -> None:
    with largest_file(4096), pytest.raises(StorageError, match=r"File too large.*DISTTRAIN_CACHE"):
        open_split(digits, "val", NONE, lambda text: None)
    assert [path.name for path in (cache / "decoded").iterdir() if not path.name.endswith(".lock")] == []
    assert_is_source(open_split(digits, "val", NONE, lambda text: None), digits, "val")


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, digits: Index, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(StorageError, match="set DISTTRAIN_CACHE") as caught:
        open_split(digits, "val", NONE, lambda text: None)
    assert caught.value.exit_code == 74


# --- Serving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "host"])
def test_batches_are_copies_of_the_samples_at_the_places_of_the_order(
    place: Literal["device", "host"],
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    loader = Cached(DecodedSplit(images, np.arange(20)), CPU, place)
    order = np.random.default_rng(1).permutation(20)
    windows = [slice(3, 7), np.array([7, 0, 19, 7]), slice(18, 20)]
    for window, batch in zip(windows, loader.batches(order, windows), strict=True):
        assert batch.images.dtype == torch.uint8
        assert batch.ids.tolist() == batch.labels.tolist() == order[window].tolist()
        assert np.array_equal(batch.images.numpy(), images[order[window]])
        batch.images.zero_()
    assert all(batch.images.any() for batch in loader.batches(order, windows))


@pytest.mark.parametrize("cache", ["auto", "device", "host"])
def test_on_a_cpu_images_stay_in_the_shared_cache(cache: Literal["auto", "device", "host"]) -> None:
    place, reason = choose_cache(cache, 10**6, CPU)
    assert place == "host"
    assert "CPU" in reason


@pytest.mark.parametrize(
    ("cache", "needed", "place"),
    [
        ("auto", 300 * 2**20, "device"),
        ("auto", 301 * 2**20, "host"),
        ("device", 10**15, "device"),
        ("host", 1, "host"),
        ("none", 1, "none"),
    ],
)
def test_on_a_gpu_auto_takes_the_device_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
    cache: Literal["auto", "device", "host", "none"],
    needed: int,
    place: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * 2**20, 2000 * 2**20))
    assert choose_cache(cache, needed, torch.device("cuda", 0))[0] == place


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_auto_streams_what_fits_neither_memory_nor_disk(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "memory":
        monkeypatch.setattr(batches.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    else:
        usage = shutil.disk_usage("/")._replace(free=2**29)
        monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: usage)
    place, reason = choose_cache("auto", 2**29 + 1, CPU)
    assert place == "none"
    assert "512 MiB decoded, more than" in reason
    assert choose_cache("auto", 2**28, CPU)[0] == "host"
