"""Damaged and hostile data sets in both ways of serving: what is refused, how, and what is left out."""

import io
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disttrain.data.streamed import Streamed
from disttrain.errors import DataError
from disttrain.shards.verify import verify
from kit.faults import (
    BAD,
    CPU,
    Way,
    both_ways,
    edit,
    good,
    index_it,
    load,
    look,
    make,
    put,
    serve,
    tar_of,
    told,
    with_bad,
)
from kit.shards import read_split


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path_factory.mktemp("own-cache")))


# --- Cuts and flipped bits ------------------------------------------------------------------------


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
                assert problems == ["class_counts of train do not match the shards"]
            else:
                assert extension in {"png", "jpg", "webp"}
                assert found[sample][0] == samples[sample][0]
    assert refused > 0


# --- Whole shards ---------------------------------------------------------------------------------


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
        r"train-9\.tar: this shard is not in index\.json",
        [],
    ),
    "named twice": (name_twice, r"train-1\.tar is listed twice \(same file\)", None),
    "a copy": (copy_shard, r"train-2\.tar is listed twice \(same sha256\)", None),
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


# --- Samples --------------------------------------------------------------------------------------


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
    with pytest.raises(DataError, match=r"set/train-\d\.tar: sample \w+: label \d is not in 0 to"):
        serve(load(folder), way)
