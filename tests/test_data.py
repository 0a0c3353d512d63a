"""The plan of an epoch, the shares of the ranks, and the decoded copy of a data set."""

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
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain import data
from disttrain.data import DecodedSplit, Plan, Served, choose_place, open_split, share
from disttrain.errors import DataError, StorageError, UsageError
from disttrain.shards import Index, decode_image, load_index, read_split

WORLDS = [1, 2, 3, 4, 8]
CPU = torch.device("cpu")


def plan(seed: int = 0, samples: int = 1000, batch_size: int = 64, drop_remainder: bool = False) -> Plan:
    return Plan(seed, samples, batch_size, drop_remainder)


# --- The plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop", "steps", "trained", "last"),
    [
        (1000, 100, False, 10, 1000, 100),
        (1000, 100, True, 10, 1000, 100),
        (1001, 100, False, 11, 1001, 1),
        (1001, 100, True, 10, 1000, 100),
        (5, 8, False, 1, 5, 5),
        (8, 8, True, 1, 8, 8),
        (1, 1, True, 1, 1, 1),
    ],
)
def test_steps_of_an_epoch(
    samples: int, batch_size: int, drop: bool, steps: int, trained: int, last: int
) -> None:
    epoch = plan(0, samples, batch_size, drop)
    assert epoch.steps_per_epoch == steps
    assert epoch.samples_per_epoch == trained
    sizes = [len(epoch.batch(step)) for step in range(steps)]
    assert sizes == [batch_size] * (steps - 1) + [last]


def test_dropping_the_remainder_must_leave_a_batch() -> None:
    with pytest.raises(UsageError, match=r"batch_size = 8 is more than the 5 training samples.*keep"):
        plan(samples=5, batch_size=8, drop_remainder=True)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): plan(seed).order(epoch).tolist() for seed in range(3) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 12
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(1000))
        other_batch = plan(seed, batch_size=7, drop_remainder=True)
        assert other_batch.order(epoch).tolist() == order


def test_the_order_does_not_change_between_versions() -> None:
    assert plan(samples=10).order(0).tolist() == [8, 5, 6, 3, 4, 7, 9, 0, 1, 2]
    assert plan(seed=1, samples=10).order(3).tolist() == [2, 9, 6, 3, 4, 7, 0, 8, 5, 1]


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_of_the_split_share_a_batch_no_more_often_than_by_chance(seed: int) -> None:
    epoch = plan(seed, samples=10_000, batch_size=100)
    batch_of = np.empty(10_000, np.int64)
    batch_of[epoch.order(0)] = np.arange(10_000) // 100
    for distance in (1, 2, 100):
        together = int((batch_of[distance:] == batch_of[:-distance]).sum())
        assert abs(together - 99) < 50  # five standard deviations
    again = np.empty(10_000, np.int64)
    again[epoch.order(1)] = np.arange(10_000) // 100
    assert abs(int((batch_of == again).sum()) - 100) < 50  # epochs are independent


# --- Shares -----------------------------------------------------------------------------------------


@settings(database=None, deadline=None)
@given(begin=st.integers(0, 10**6), count=st.integers(0, 2000), world_size=st.integers(1, 64))
def test_shares_partition_a_batch(begin: int, count: int, world_size: int) -> None:
    places = range(begin, begin + count)
    shares = [share(places, rank, world_size) for rank in range(world_size)]
    assert [place for part in shares for place in part] == list(places)
    sizes = [len(part) for part in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("samples", [997, 64, 1000])
def test_every_world_trains_on_the_same_batches_and_on_each_sample_once(
    samples: int, batch_size: int, drop: bool
) -> None:
    epoch = plan(3, samples, batch_size, drop)
    order = epoch.order(2)
    batches = [order[list(epoch.batch(step))].tolist() for step in range(epoch.steps_per_epoch)]
    seen = [sample for batch in batches for sample in batch]
    assert seen == order[: epoch.samples_per_epoch].tolist()
    assert len(set(seen)) == len(seen) == (samples - samples % batch_size if drop else samples)
    for world_size in WORLDS:
        for step, batch in enumerate(batches):
            shares = [share(epoch.batch(step), rank, world_size) for rank in range(world_size)]
            assert [sample for part in shares for sample in order[list(part)].tolist()] == batch


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_split_smaller_than_the_world_is_seen_once(world_size: int) -> None:
    epoch = plan(samples=3, batch_size=64)
    seen = [place for rank in range(world_size) for place in share(epoch.batch(0), rank, world_size)]
    assert seen == [0, 1, 2]


# --- The decoded copy -------------------------------------------------------------------------------


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
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def assert_is_source(decoded: DecodedSplit, index: Index, split: str) -> None:
    images, labels = source(index, split)
    assert decoded.images.dtype == np.uint8
    assert decoded.labels.dtype == np.int64
    assert np.array_equal(decoded.images, images)
    assert np.array_equal(decoded.labels, labels)


def test_the_digits_come_back_as_they_were(cache: Path, digits: Index) -> None:
    train, val = (open_split(digits, split, lambda text: None) for split in ("train", "val"))
    assert_is_source(train, digits, "train")
    assert_is_source(val, digits, "val")
    assets = Path(data.__file__).with_name("assets") / "digits.npz"
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
    open_split(digits, "val", said.append)
    assert len(said) == 1
    assert "decoding digits/val" in said[0]
    monkeypatch.setattr(data, "read_split", None)
    assert_is_source(open_split(digits, "val", said.append), digits, "val")
    assert len(said) == 1


def test_writing_to_the_images_does_not_reach_the_cache(cache: Path, digits: Index) -> None:
    open_split(digits, "val", lambda text: None).images[:] = 0
    assert_is_source(open_split(digits, "val", lambda text: None), digits, "val")


def test_processes_that_open_at_once_decode_once(cache: Path, digits_root: Path, tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from disttrain import data
from disttrain.shards import load_index
root, ready, go = sys.argv[1:]
decode_image = data.decode_image
def slowly(*arguments):
    time.sleep(0.001)
    return decode_image(*arguments)
data.decode_image = slowly
index = load_index("digits", root)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.002)
decoded = data.open_split(index, "val", print)
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
    open_split(digits, "val", lambda text: None)
    folder = decoded_folder(cache)
    shutil.rmtree(folder)
    said: list[str] = []
    with another_process_holds(cache / f".{folder.name}.lock") as process:

        def say(text: str) -> None:
            said.append(text)
            if "waiting" in text and process.stdin is not None:
                process.stdin.close()  # lets it end

        assert_is_source(open_split(digits, "val", say), digits, "val")
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
    open_split(digits, "val", lambda text: None)
    damage(decoded_folder(cache) / file, how)
    said: list[str] = []
    assert_is_source(open_split(digits, "val", said.append), digits, "val")
    assert len(said) == 1


def test_what_a_killed_process_left_is_no_obstacle(cache: Path, digits: Index) -> None:
    open_split(digits, "val", lambda text: None)
    folder = decoded_folder(cache)
    folder.rename(cache / f".{folder.name}.partial")
    assert_is_source(open_split(digits, "val", lambda text: None), digits, "val")
    assert decoded_folder(cache) == folder


def test_a_flipped_byte_in_a_shard_is_a_data_error(cache: Path, digits_root: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_root / "digits", tmp_path / "digits")
    shard = tmp_path / "digits" / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"val-000000\.tar.*damaged") as caught:
        open_split(load_index("digits", str(tmp_path)), "val", lambda text: None)
    assert caught.value.exit_code == 65
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_images_of_another_size_than_the_index_says(cache: Path, digits: Index) -> None:
    wrong = Index(**(vars(digits) | {"height": 9, "digest": "f" * 64}))
    with pytest.raises(DataError, match=r"val image .*8x8 pixels; the index says 8x9"):
        open_split(wrong, "val", lambda text: None)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_a_full_disk_is_told_before_decoding(
    cache: Path, digits: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"MiB needed .*DISTTRAIN_CACHE") as caught:
        open_split(digits, "val", lambda text: None)
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
        open_split(digits, "val", lambda text: None)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []
    assert_is_source(open_split(digits, "val", lambda text: None), digits, "val")


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, digits: Index, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(StorageError, match="set DISTTRAIN_CACHE") as caught:
        open_split(digits, "val", lambda text: None)
    assert caught.value.exit_code == 74


# --- Serving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "host"])
def test_served_gathers_images_with_their_labels(place: Literal["device", "host"]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    served = Served(DecodedSplit(images, np.arange(20)), CPU, place)
    assert served.samples == 20
    ids = served.ids(np.array([7, 0, 19, 7]))
    batch, labels = served.fetch(ids)
    assert batch.dtype == torch.uint8
    assert labels.tolist() == [7, 0, 19, 7]
    assert np.array_equal(batch.numpy(), images[[7, 0, 19, 7]])
    batch.zero_()
    assert served.fetch(ids)[0].any()  # a copy


@pytest.mark.parametrize("cache", ["auto", "device", "host"])
def test_on_a_cpu_images_stay_in_the_shared_cache(cache: Literal["auto", "device", "host"]) -> None:
    place, reason = choose_place(cache, 10**15, CPU)
    assert place == "host"
    assert "CPU" in reason


@pytest.mark.parametrize(
    ("cache", "needed", "place"),
    [
        ("auto", 300 * 2**20, "device"),
        ("auto", 301 * 2**20, "host"),
        ("device", 10**15, "device"),
        ("host", 1, "host"),
    ],
)
def test_on_a_gpu_auto_takes_the_device_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, cache: Literal["auto", "device", "host"], needed: int, place: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * 2**20, 2000 * 2**20))
    assert choose_place(cache, needed, torch.device("cuda", 0))[0] == place
