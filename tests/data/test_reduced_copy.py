"""Decoded copies of photos, reduced to `data.decoded_side`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import disttrain as library
from disttrain.data.batches import choose_cache, streaming_reason
from disttrain.data.decoded_copy import open_reduced
from disttrain.errors import DataError, UsageError
from disttrain.shards.crops import RandomCrops
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import Index, load_index
from disttrain.shards.pack import Options
from kit.photos import pack_photos, photo
from kit.shards import read_split, write_members

SIDE, DECODED = 24, 45  # three of the five sizes are larger
NONE = np.empty(0, np.int64)
ALL = np.arange(45)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("photos")
    return pack_photos(folder / "files", folder / "root").cropped(SIDE, 0.875, DECODED)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def crops_of(index: Index, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the crops and labels of all samples from the decoded copy; sample i is at `positions`[i]."""
    images, labels = np.empty((45, SIDE, SIDE, 3), np.uint8), np.empty(45, np.int64)
    open_reduced(index, NONE, print).decode(ALL, images, labels, positions, RandomCrops(0, 3, 0.1))
    return images, labels


@pytest.mark.parametrize("ranks", [1, 3])
def test_cached_and_streamed_batches_are_the_same(packed: Index, ranks: int) -> None:
    place = {"root": str(packed.folder.parent), "batch_size": 9, "image_size": SIDE, "world_size": ranks}
    for rank in range(ranks):
        cached, streamed, whole = (
            list(library.open_data("photos", rank=rank, resized_crop=0.1, **place, **how).epoch(1, first=2))
            for how in (
                {"decoded_side": DECODED, "cache": "host"},
                {"decoded_side": DECODED, "cache": "none"},
                {},
            )
        )
        for ours, theirs in zip(cached, streamed, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        assert [batch.ids.tolist() for batch in cached] == [batch.ids.tolist() for batch in whole]
        pairs = zip(cached, whole, strict=True)
        assert any(not torch.equal(ours.images, theirs.images) for ours, theirs in pairs)


def test_crops_are_cut_out_of_the_reduced_image(packed: Index) -> None:
    images, labels = crops_of(packed, ALL)
    crops = RandomCrops(0, 3, 0.1)
    for position, (_, file, label) in enumerate(read_split(packed, "train")):
        picture = Image.open(io.BytesIO(file)).convert("RGB")
        if min(picture.size) > DECODED:
            scale = DECODED / min(picture.size)
            picture = picture.resize([round(scale * n) for n in picture.size], Image.Resampling.BILINEAR)
        ((top, left, height, width),) = crops(np.array([position]), np.array([picture.size[::-1]]))
        box = (left, top, left + width, top + height)
        expected = picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        assert np.abs(images[position].astype(int) - np.asarray(expected)).max() <= 3
        assert labels[position] == int(label)


def test_the_copy_is_made_once_and_again_if_it_is_damaged(packed: Index, cache: Path) -> None:
    first, _ = crops_of(packed, ALL)
    said: list[str] = []
    open_reduced(packed, NONE, said.append)
    assert said == []
    (pixels,) = (cache / "decoded").glob("*/pixels.bin")
    with pixels.open("r+b") as file:
        file.seek(1000)
        file.write(bytes(64))
    open_reduced(packed, NONE, said.append)
    assert said[0].startswith("decoding photos/train once: 45 images, ")
    assert (crops_of(packed, ALL)[0] == first).all()
    open_reduced(packed.cropped(SIDE, 0.875, 30), NONE, said.append)
    assert len(said) == 2
    assert len(list((cache / "decoded").glob("*/pixels.bin"))) == 2


def test_a_broken_photo_is_named_or_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    members: dict[str, bytes] = {}
    for number in range(5):
        image = photo(number, 64, 50 + number)
        members |= {f"n{number}.jpg": image[:700] if number == 3 else image, f"n{number}.cls": b"1"}
    for split in ("train", "val"):
        write_members(folder / f"{split}-000.tar", members)
        members = {f"v{name}": content for name, content in members.items()}
    index_folder(folder, {"train": [], "val": []}, Options(), skip_unusable=True)
    index = load_index("theirs", str(tmp_path)).cropped(SIDE, 0.875, DECODED)
    with pytest.raises(DataError, match=r"train-000\.tar: sample n3: .*data\.on_error=skip"):
        open_reduced(index, NONE, print)
    copy = open_reduced(index, np.array([3]), print)
    assert copy.sizes.tolist() == [[58, 45], [56, 45], [55, 45], [0, 0], [53, 45]]


def test_what_goes_with_decoded_side(packed: Index) -> None:
    cpu = torch.device("cpu")
    assert streaming_reason(packed, None) is None
    place, reason = choose_cache("auto", 1000, cpu, reduced=True)
    assert (place, "train images reduced to data.decoded_side" in reason) == ("host", True)
    with pytest.raises(UsageError, match="set it to host or auto"):
        choose_cache("device", 1000, cpu, reduced=True)
    root = str(packed.folder.parent)
    with pytest.raises(UsageError, match=r"needs data\.image_size and augment\.resized_crop"):
        library.open_data("photos", batch_size=8, root=root, image_size=SIDE, decoded_side=DECODED)
