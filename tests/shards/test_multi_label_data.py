"""Multi-label data: how they are packed, indexed and read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards.test_label_format import index_it, tars  # noqa: F401  a fixture

from disttrain.data.loader import open_data
from disttrain.errors import DataError, UsageError
from disttrain.shards.imagefolder import pack_folder
from disttrain.shards.index import Index, load_index
from disttrain.shards.label_format import LabelPlace
from disttrain.shards.pack import Options
from disttrain.shards.reader import Reader
from disttrain.shards.verify import find_bad_samples, verify
from kit.shards import write_members
from kit.toy import encode, images

SETS = [(0, 2), (), (1,), (0, 1, 2), (2,), (1, 2)]
NAMES = ("ant", "bee", "cat")


def packed(folder: Path, *, sets: Any = SETS, several_sizes: bool = False, **options: Any) -> Index:
    """Packs an image for each set of labels, twice: as train and as val."""
    lines = ["file,split," + ",".join(NAMES)]
    for seed, split in enumerate(("train", "val")):
        for number, labels in enumerate(sets):
            shape = (6 + number * several_sizes, 5, 3)
            path = folder / "photos" / f"{split}{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(images(1, 10 * number + seed, shape)[0]))
            lines.append(f"{path.name},{split}," + ",".join(str(int(n in labels)) for n in range(3)))
    (folder / "labels.csv").write_text("\n".join(lines))
    how = Options(**options)
    return pack_folder(
        folder / "photos", "set", str(folder), how, labels=folder / "labels.csv", multi_label=True
    )


def sets_of(index: Index, split: str = "train") -> list[tuple[int, ...]]:
    """Returns the labels of each sample of a split, as the loader of a run gets them."""
    (batch,) = open_data(index.name, split, batch_size=100, root=str(index.folder.parent), shuffle=False)
    assert batch.labels.shape == (len(batch.ids), len(index.classes))
    return [tuple(row.nonzero().flatten().tolist()) for row in batch.labels]


@pytest.mark.parametrize("several_sizes", [False, True])
def test_labels_come_back_as_they_were_packed(tmp_path: Path, several_sizes: bool) -> None:
    index = packed(tmp_path, several_sizes=several_sizes)
    assert (index.version, index.multi_label, index.label) == (3, True, LabelPlace("json", "labels"))
    assert (index.stored_height is None) is several_sizes
    assert index.splits["train"].class_counts == (2, 3, 4)
    assert verify(index) == []
    if not several_sizes:
        assert sorted(sets_of(index)) == sorted(sets_of(index, "val")) == sorted(SETS)
    samples = Reader(index, "train").samples(np.arange(len(SETS)))
    assert sorted(tuple(json.loads(sample["cls"])) for sample in samples) == sorted(SETS)


def test_a_decoded_copy_and_the_shards_have_the_same_labels(tmp_path: Path) -> None:
    index = packed(tmp_path)
    found = []
    for cache in ("host", "none"):
        data = open_data("set", batch_size=4, root=str(tmp_path), cache=cache)  # type: ignore[arg-type]
        found.append([(batch.ids.tolist(), batch.labels.tolist()) for batch in data])
    assert found[0] == found[1]
    assert index.empty_labels(2).dtype == np.uint8


def test_a_class_may_be_without_train_samples_but_not_lost(tmp_path: Path) -> None:
    index = packed(tmp_path, sets=[(0,), (0, 2), ()])
    assert index.splits["train"].class_counts == (2, 0, 1)
    bad = tmp_path / "photos/train1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match="every image of the class cat is bad"):
        packed_again(tmp_path)


def packed_again(folder: Path) -> Index:
    how = Options(force=True, skip=True)
    return pack_folder(
        folder / "photos", "set", str(folder), how, labels=folder / "labels.csv", multi_label=True
    )


@pytest.mark.parametrize(
    ("member", "texts", "classes"),
    [
        ("cls", ["0 2", "", "1", "0,1, 2", "[2]", "2\n1\n"], ("0", "1", "2")),
        ("txt", ["ant, cat", "", "bee", "cat\nbee\nant", '["cat"]', "bee,cat,bee"], NAMES),
        ("json", ["[0, 2]", "[]", "1", "[0, 1, 2]", "[2.0]", '["2", 1]'], ("0", "1", "2")),
        ("json", ['["ant", "cat"]', "null", '"bee"', '["cat","bee","ant"]', '"cat"', '["bee","cat"]'], NAMES),
    ],
)  # fmt: skip
def test_tars_of_other_tools(tars: Any, member: str, texts: list[str], classes: tuple[str, ...]) -> None:  # noqa: F811
    place = {"cls": None, "txt": LabelPlace("txt"), "json": LabelPlace("json", "a.b")}[member]
    if member == "json":
        texts = [f'{{"a": {{"b": {text}}}}}' for text in texts]
    index = index_it(tars(texts, member), label=place, multi_label=True)
    assert (index.classes, index.version) == (classes, 3)
    assert sets_of(index) == SETS
    assert index.splits["val"].class_counts == (2, 3, 4)
    assert verify(load_index("set", str(index.folder.parent))) == []


@pytest.mark.parametrize(
    ("member", "text", "problem"),
    [
        ("cls", "0 x", "b'0 x' is not a label"),
        ("json", '{"labels": [true]}', "'True' in the field labels is not a label"),
        ("json", '{"labels": [[0]]}', r"'\[0\]' in the field labels is not a label"),
        ("json", '{"labels": ""}', "'' in the field labels is not a label"),
    ],
)
def test_a_set_that_cannot_be_read_is_a_bad_sample(
    tars: Any,  # noqa: F811
    member: str,
    text: str,
    problem: str,
) -> None:
    good = "0 1" if member == "cls" else '{"labels": [0, 1]}'
    place = None if member == "cls" else LabelPlace("json", "labels")
    folder = tars([good, text, good], member)
    with pytest.raises(DataError, match=f"sample 001: {problem}"):
        index_it(folder, label=place, multi_label=True)
    index = index_it(folder, label=place, multi_label=True, skip_unusable=True)
    assert find_bad_samples(index, "train", print).tolist() == [1]
    assert index.splits["train"].class_counts == (2, 2)


def test_several_labels_need_the_option(tars: Any) -> None:  # noqa: F811
    with pytest.raises(DataError, match="has several labels; index the tars with --multi-label"):
        index_it(tars(["0 2", "1"]))


def test_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    for split, label in {"train": b"0 7", "val": b"1"}.items():
        members = {}
        for number, image in enumerate(images(3, len(split))):
            members |= {f"{number}.png": encode(image), f"{number}.cls": label if number == 1 else b"0 1"}
        write_members(tmp_path / "set" / f"{split}.tar", members)
    with pytest.raises(DataError, match=r"sample 1: label 7 is not in 0 to 1"):
        index_it(tmp_path / "set", multi_label=True, classes=["a", "b"])


def pipeline(stages: Any) -> list[Any]:
    """Gives every sample the label 1, too."""
    return [stages.source, stages.decode, stages.threaded(add), stages.batch]


def add(sample: dict[str, Any]) -> dict[str, Any]:
    sample["cls"] = [*sample["cls"], 1]
    return sample


def wrong(stages: Any) -> list[Any]:
    return [stages.source, stages.decode, stages.threaded(beyond), stages.batch]


def beyond(sample: dict[str, Any]) -> dict[str, Any]:
    sample["cls"] = [3]
    return sample


def test_stages_of_users_get_a_list_of_labels(tmp_path: Path) -> None:
    packed(tmp_path)
    how: Any = {"batch_size": 100, "root": str(tmp_path), "shuffle": False}
    (plain,), (batch,) = open_data("set", **how), open_data("set", pipeline=pipeline, **how)
    assert (batch.labels[:, 1] == 1).all()
    assert batch.labels[:, [0, 2]].tolist() == plain.labels[:, [0, 2]].tolist()
    with pytest.raises(UsageError, match=r"returns a `cls` outside 0\.\.2"):
        next(iter(open_data("set", pipeline=wrong, **how)))
