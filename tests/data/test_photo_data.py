"""Data sets of images of several sizes, as the loaders serve them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import disttrain as library
from disttrain.data.batches import Batch, choose_cache, streaming_reason
from disttrain.data.epoch_plan import Ids, Plan, rank_slice
from disttrain.data.stages import open_stream
from disttrain.data.streamed import Streamed
from disttrain.errors import DataError, UsageError
from disttrain.shards.crops import CenterCrops, RandomCrops
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import Index, load_index
from disttrain.shards.pack import Options
from disttrain.shards.photos import decode_crop
from disttrain.shards.verify import verify
from kit.photos import SIZES, pack_photos, photo
from kit.shards import read_split, write_members

CPU = torch.device("cpu")
SIDE = 24


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Photos of five sizes, cropped to 24 x 24 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    return pack_photos(folder / "files", folder / "root").cropped(SIDE, 0.875)


def stream(index: Index, workers: int = 2) -> Streamed:
    """Returns a loader of the train split."""
    return Streamed(index, "train", CPU, batch_size=8, workers=workers, say=print)


def plan_of(index: Index) -> Plan:
    """Returns a plan with a global batch of 8."""
    return Plan(0, tuple(shard.samples for shard in index.splits["train"].shards), 8)


def epoch(index: Index, rank: int, world_size: int, workers: int = 2, first: int = 0) -> list[Batch]:
    """Returns a rank's batches of epoch 3, from step `first`."""
    plan = plan_of(index)
    shares = [rank_slice(plan.batch(step), rank, world_size) for step in range(first, plan.steps_per_epoch)]
    windows = [slice(share.start, share.stop) for share in shares]
    return list(stream(index, workers).batches(plan.order(3), windows, RandomCrops(0, 3, 0.1)))


def test_the_data_set_has_shards_of_several_sizes(packed: Index) -> None:
    assert packed.version == 2
    assert 5 <= len(packed.splits["train"].shards) <= 12
    assert packed.sizes_text() == "40x37 to 130x128"
    assert (packed.height, packed.width) == (SIDE, SIDE)
    assert verify(packed) == []


@pytest.mark.parametrize("workers", [0, 3])
def test_ranks_see_the_same_pixels_as_one(packed: Index, workers: int) -> None:
    whole = epoch(packed, 0, 1)
    for world_size in (2, 3):
        ranks = [epoch(packed, rank, world_size, workers) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            parts = [own[step] for own in ranks if step < len(own)]
            assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
            assert np.array_equal(batch.ids, np.concatenate([part.ids for part in parts]))
    assert sorted(np.concatenate([batch.ids for batch in whole]).tolist()) == list(range(45))


def test_a_resumed_epoch_goes_on_with_the_same_pixels(packed: Index) -> None:
    for batch, other in zip(epoch(packed, 0, 1)[4:], epoch(packed, 0, 1, first=4), strict=True):
        assert torch.equal(batch.images, other.images)


def test_a_sample_that_comes_several_times_has_a_crop_for_each(packed: Index) -> None:
    order, crops = np.array([5, 7, 5, 5]), RandomCrops(0, 3, 0.1)
    (whole,) = stream(packed).batches(order, [slice(0, 4)], crops)
    parts = list(stream(packed).batches(order, [slice(0, 1), np.array([1, 2, 2]), slice(3, 4)], crops))
    found = torch.cat([part.images for part in parts])[[0, 1, 2, 4]]
    assert torch.equal(whole.images, found)
    assert not torch.equal(whole.images[0], whole.images[2])
    assert whole.labels.tolist() == [whole.labels[0], whole.labels[1], *[whole.labels[0]] * 2]


def test_the_pixels_are_the_drawn_crop_of_the_file(packed: Index) -> None:
    files = [image for _, image, _ in read_split(packed, "train")]
    order, crops = plan_of(packed).order(3), RandomCrops(0, 3, 0.1)

    class At:
        """The crop of one position."""

        def __init__(self, position: int) -> None:
            self.position = position

        def __call__(self, positions: Ids, sizes: Ids) -> Ids:
            return crops(np.array([self.position]), sizes)

    images = torch.cat([batch.images for batch in epoch(packed, 0, 1)]).numpy()
    for position in range(0, 45, 7):
        expected = decode_crop(files[order[position]], At(position), SIDE, 3)
        assert (images[position] == expected).all()


def test_without_crops_the_center_is_served(packed: Index) -> None:
    ids = np.array([3, 44, 3, 7])  # twice the same sample
    (batch,) = stream(packed).batches(ids, [slice(None)])
    files = [image for _, image, _ in read_split(packed, "train")]
    for found, id_ in zip(batch.images.numpy(), ids, strict=True):
        assert (found == decode_crop(files[id_], CenterCrops(0.875), SIDE, 3)).all()


def test_user_stages_have_the_same_pixels(packed: Index) -> None:
    order, windows = plan_of(packed).order(3), [slice(0, 20), slice(20, 45)]
    crops = RandomCrops(0, 3, 0.1)
    staged = open_stream(
        packed, "train", CPU, batch_size=8, workers=2,
        pipeline=lambda stages: [stages.source, stages.decode, stages.batch],
    )  # fmt: skip
    for ours, theirs in zip(
        staged.batches(order, windows, crops), stream(packed).batches(order, windows, crops), strict=True
    ):
        assert torch.equal(ours.images, theirs.images)


def test_open_data_crops_in_a_users_own_loop(packed: Index) -> None:
    place = {"root": str(packed.folder.parent), "batch_size": 9, "image_size": SIDE}
    train = library.open_data("photos", resized_crop=0.1, seed=4, **place)
    first, second = (list(train.epoch(number)) for number in (0, 1))
    assert first[0].images.shape == (9, SIDE, SIDE, 3)
    assert not torch.equal(first[0].images, second[0].images)
    again = library.open_data("photos", resized_crop=0.1, seed=4, **place)
    assert torch.equal(next(again.epoch(0, first=3)).images, first[3].images)
    val = library.open_data("photos", "val", **place)
    assert sum(len(batch.labels) for batch in val) == 12
    with pytest.raises(UsageError, match=r"several sizes, 40x37 to 130x128; set data\.image_size"):
        library.open_data("photos", **(place | {"image_size": None}))


def test_images_of_any_size_are_never_cached(packed: Index) -> None:
    reason = streaming_reason(packed, None)
    assert choose_cache("auto", 1, CPU, streamed=reason) == ("none", f"{reason} in every epoch")
    with pytest.raises(UsageError, match=r"data\.cache = host, but images of any size .* set it to auto"):
        choose_cache("host", 1, CPU, streamed=reason)
    assert streaming_reason(packed.cropped(None, 0.875), None) is None


def write_tars(folder: Path, *, bad: bytes | None = None) -> None:
    """Writes ImageNet-like tars: KEY.jpg or KEY.JPEG with KEY.cls and more members."""
    for split, count in (("train", 20), ("val", 6)):
        members: dict[str, bytes] = {}
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            image = photo(number + (100 if split == "val" else 0), height, width)
            members[f"n{number:04d}.{'JPEG' if number % 2 else 'jpg'}"] = (
                bad if bad is not None and number == 7 else image
            )
            members[f"n{number:04d}.cls"] = str(number % 3).encode()
            members[f"n{number:04d}.json"] = b'{"width": 1}'
        folder.mkdir(exist_ok=True)
        write_members(folder / f"{split}-000.tar", members)


def test_tars_of_other_tools_are_indexed_with_their_sizes(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs")
    index = index_folder(tmp_path / "theirs", {"train": [], "val": []}, Options())
    assert (index.version, index.sizes_text()) == (2, "40x37 to 130x128")
    again = load_index("theirs", str(tmp_path)).cropped(SIDE, 0.875)
    assert again.splits["train"].sizes == index.splits["train"].sizes
    (batch,) = stream(again).batches(np.arange(20), [slice(None)])
    assert batch.labels.tolist() == [number % 3 for number in range(20)]


def test_a_broken_photo_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", bad=photo(7, 64, 64)[:700])
    with pytest.raises(DataError, match=r"train-000\.tar: sample n0007: .*--skip"):
        index_folder(tmp_path / "theirs", {"train": [], "val": []}, Options())
    said: list[str] = []
    index = index_folder(
        tmp_path / "theirs", {"train": [], "val": []}, Options(say=said.append), skip_unusable=True
    )
    assert "n0007" in said[0]
    loader = stream(index.cropped(SIDE, 0.875))
    with pytest.raises(DataError, match=r"train-000\.tar: sample n0007: "):
        list(loader.batches(np.arange(20), [slice(None)]))
    assert list(loader.batches(np.delete(np.arange(20), 7), [slice(None)]))


@pytest.mark.parametrize("side", [None, SIDE])
def test_the_first_bad_photo_of_a_damaged_shard_is_named(tmp_path: Path, side: int | None) -> None:
    write_tars(tmp_path / "theirs")
    index_folder(tmp_path / "theirs", {"train": [], "val": []}, Options())
    path = tmp_path / "theirs/train-000.tar"
    with tarfile.open(path) as tar:
        begin = tar.getmember("n0004.jpg").offset_data
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(10))
    problems = verify(load_index("theirs", str(tmp_path)).cropped(side, 0.875))
    assert [problem.place for problem in problems] == [str(path)]
    assert "its SHA-256 does not match the index (first bad sample n0004: " in problems[0].text


def test_a_shard_that_changes_while_it_is_read(packed: Index, tmp_path: Path) -> None:
    index = pack_photos(tmp_path / "files", tmp_path / "root").cropped(SIDE, 0.875)
    loader = stream(index, 0)
    next(iter(loader.batches(np.arange(45), [slice(0, 2)])))  # the first shard is checked and open
    shard = index.folder / index.splits["train"].shards[0].file
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.truncate(900)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 0+\d*: the shard was truncated"):
        list(loader.batches(np.arange(45), [slice(0, 6)]))
