"""Samples served from their shards, against the same samples from the decoded copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from disttrain.data.batches import Window
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import open_split
from disttrain.data.epoch_plan import Plan, rank_slice
from disttrain.data.streamed import Streamed
from disttrain.errors import DataError
from disttrain.shards import reader
from disttrain.shards.index import Index, load_index

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)


@pytest.fixture
def seven(seven_root: Path) -> Index:
    return load_index("seven", str(seven_root))


@pytest.fixture
def cached(seven: Index) -> Cached:
    return Cached(open_split(seven, "train", NONE, print), CPU, "host")


def stream(index: Index, workers: int = 2, batch_size: int = 64, split: str = "train") -> Streamed:
    return Streamed(index, split, CPU, batch_size=batch_size, workers=workers, say=print)


def plan_of(index: Index, batch_size: int = 64, **options: int) -> Plan:
    shards = tuple(shard.samples for shard in index.splits["train"].shards)
    return Plan(7, shards, batch_size, **options)


def windows_of(plan: Plan, rank: int, world_size: int, begin: int = 0) -> list[Window]:
    shares = [rank_slice(plan.batch(step), rank, world_size) for step in range(begin, plan.steps_per_epoch)]
    return [slice(own.start, own.stop) for own in shares if own]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_every_batch_is_that_of_the_decoded_copy(
    seven: Index, cached: Cached, workers: int, batch_size: int
) -> None:
    plan = plan_of(seven, batch_size)
    order = plan.order(1)
    windows = windows_of(plan, 0, 1)
    loader = stream(seven, workers, batch_size)
    for ours, theirs in zip(loader.batches(order, windows), cached.batches(order, windows), strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.images.dtype == torch.uint8
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_ranks_together_get_every_sample_once_and_the_batches_of_one(
    seven: Index, world_size: int, workers: int
) -> None:
    plan = plan_of(seven, 50, streams=4, shuffle_buffer=40)
    order = plan.order(0)
    batches: dict[int, list[int]] = {}
    for rank in range(world_size):
        windows = windows_of(plan, rank, world_size)
        for window, batch in zip(windows, stream(seven, workers, 50).batches(order, windows), strict=True):
            assert isinstance(window, slice)
            batches.setdefault(window.start // 50, []).extend(batch.ids.tolist())
    assert [batches[step] for step in range(plan.steps_per_epoch)] == [
        order[list(plan.batch(step))].tolist() for step in range(plan.steps_per_epoch)
    ]
    assert sorted(sample for batch in batches.values() for sample in batch) == list(range(720))


def ids_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list that takes every id which is read from now on."""
    read: list[int] = []
    places = reader.Reader._places
    monkeypatch.setattr(
        reader.Reader, "_places", lambda self, ids: (read.extend(ids.tolist()), places(self, ids))[1]
    )
    return read


@pytest.mark.parametrize("begin", [1, 7, 11])
def test_going_on_in_mid_epoch_reads_what_is_left_and_nothing_else(
    seven: Index, cached: Cached, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    plan = plan_of(seven)
    order = plan.order(0)
    windows = windows_of(plan, 0, 1, begin)
    read = ids_read(monkeypatch)
    found = [batch.ids for batch in stream(seven, 0).batches(order, windows)]
    assert np.concatenate(found).tolist() == read == order[begin * 64 :].tolist()


def test_partners_are_decoded_once(seven: Index, cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ids_read(monkeypatch)
    order = plan_of(seven).order(0)
    windows: list[Window] = [np.r_[3:40, 7:44], np.r_[60:90, 61:90, 60]]
    both = zip(stream(seven).batches(order, windows), cached.batches(order, windows), strict=True)
    for ours, theirs in both:
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert torch.equal(ours.images, theirs.images)
    assert len(read) == len(set(read)) == 41 + 30


def test_batches_are_loaded_ahead_and_no_more_than_promised(
    seven: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    loader = stream(seven, workers=2, batch_size=16)

    def windows() -> object:
        for place in range(40):
            taken.append(place)
            yield slice(16 * place, 16 * place + 16)

    with closing(loader.batches(np.arange(720), windows())) as batches:  # type: ignore[arg-type]
        next(batches)
        assert 4 <= len(taken) <= 6  # two pieces for each worker
        next(batches)
        assert len(taken) <= 7
    assert loader.most_bytes >= 6 * 16 * 8 * 8 * 3


def test_threads_end_when_the_epoch_is_left(seven: Index) -> None:
    before = set(threading.enumerate())
    with closing(stream(seven).batches(np.arange(720), windows_of(plan_of(seven), 0, 1))) as batches:
        next(batches)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_epoch(seven_root: Path) -> None:
    program = f"""
import resource, numpy as np, torch
from disttrain.data.streamed import Streamed
from disttrain.shards.index import load_index
index = load_index("seven", {str(seven_root)!r})
loader = Streamed(index, "train", torch.device("cpu"), batch_size=64, workers=2,
                  say=print)
def run(epochs):
    for epoch in range(epochs):
        windows = [slice(i, i + 64) for i in range(0, 704, 64)]
        for batch in loader.batches(np.random.permutation(720), windows):
            pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = run(3)
print(run(30) - first)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240
    )
    assert int(result.stdout) < 8 * 1024  # KiB; 30 epochs hold 4 MiB of pixels and 12 MiB of tensors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_the_epoch_with_its_key(
    seven_root: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(seven_root / "seven", tmp_path / "seven")
    index = load_index("seven", str(tmp_path))
    shard = tmp_path / "seven" / "train-4.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    order = np.arange(720)
    with pytest.raises(DataError, match=r"train-4\.tar: damaged: its SHA-256") as caught:
        for _ in stream(index, workers).batches(order, windows_of(plan_of(index), 0, 1)):
            pass
    assert caught.value.exit_code == 65
    good = [slice(0, 64), slice(64, 128)]
    assert len(list(stream(index, workers).batches(order, good))) == 2  # the other shards can be read


def test_a_shard_is_checked_once_and_again_when_the_file_has_changed(
    seven_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(seven_root / "seven", tmp_path / "seven")
    index = load_index("seven", str(tmp_path))
    time.sleep(0.2)  # what is known of a file is not kept while it is as new as a tick of its clock
    scans = []
    scan = reader.scan
    monkeypatch.setattr(reader, "scan", lambda *arguments: (scans.append(1), scan(*arguments))[1])
    windows = windows_of(plan_of(index), 0, 1)
    for _ in range(3):
        for _ in stream(index, 2).batches(np.arange(720), windows):
            pass
    assert len(scans) == 7
    path = tmp_path / "seven" / "train-1.tar"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-20000] ^= 4
    time.sleep(0.02)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and mtime as before
    with pytest.raises(DataError, match=r"train-1\.tar: damaged"):
        for _ in stream(index, 2).batches(np.arange(720), windows):
            pass


def test_open_shards_are_bounded(seven: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 2)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    order = plan_of(seven).order(0)
    with closing(stream(seven, 2).batches(order, windows_of(plan_of(seven), 0, 1))) as batches:
        most = max(len(list(descriptors.iterdir())) for _ in batches)
    assert most - before <= 2 + 2 * 7  # kept, and in use by two threads
