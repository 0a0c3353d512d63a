"""Labels of tars of other tools: numbers, names and fields of JSON."""

import json

import numpy as np
import pytest

from disttrain.errors import DataError, UsageError
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.label_format import LabelPlace, parse_place
from disttrain.shards.pack import Options
from disttrain.shards.verify import verify
from kit.shards import read_split, write_members
from kit.toy import encode, images


@pytest.fixture
def tars(tmp_path):
    """Writes a train tar with these labels, and the same as val."""

    def write(labels, member="cls"):
        for seed, split in enumerate(("train", "val")):
            members = {}
            for number, (image, label) in enumerate(zip(images(len(labels), seed), labels, strict=True)):
                members |= {f"{number:03}.png": encode(image), f"{number:03}.{member}": label.encode()}
            write_members(tmp_path / "set" / f"{split}.tar", {"README.txt": b"flowers\n of 2020", **members})
        return tmp_path / "set"

    return write


def index_it(folder, *, force=False, said=None, **options):
    say = said.append if said is not None else lambda line: None
    return index_folder(folder, {"train": (), "val": ()}, Options(force, say=say), **options)


def labels_of(index, split="train"):
    return [label for _, _, label in read_split(index, split)]


@pytest.mark.parametrize("member", ["cls", "txt"])
def test_labels_may_be_names_which_are_sorted_to_classes(tars, member, said):
    index = index_it(tars(["cat\n", "ant", "dog", "cat"], member), said=said)
    assert index.classes == ("ant", "cat", "dog")
    assert labels_of(index) == [1, 0, 2, 1]
    assert index.splits["val"].class_counts == (1, 2, 1)
    assert verify(index) == []
    assert said == ["no sample has KEY.cls, so the labels are those in KEY.txt"] * (member == "txt")


def test_a_label_may_be_a_field_of_json(tars):
    texts = [json.dumps({"width": 8, "info": {"label": label}, "x": "y" * 600}) for label in ("b", "a", "b")]
    folder = tars(texts, "json")
    with pytest.raises(DataError, match=r"no label \(member cls\).*--label: txt or json:FIELD"):
        index_it(folder)
    with pytest.raises(DataError, match=r"sample 000: KEY\.json has no field class, but width, info, x"):
        index_it(folder, label=parse_place("json:class"))
    index = index_it(folder, label=parse_place("json:info.label"))
    assert (index.classes, labels_of(index)) == (("a", "b"), [1, 0, 1])
    numbers = [json.dumps({"label": label}) for label in (1, 0.0, "2")]
    index = index_it(tars(numbers, "json"), force=True, label=LabelPlace("json", "label"))
    assert (index.classes, labels_of(index)) == (("0", "1", "2"), [1, 0, 2])


@pytest.mark.parametrize("label", ["true", "null", '{"label": [1]}', '{"label": ""}', "[", "[" * 10**5])
def test_json_that_has_no_label_is_a_bad_sample(tars, label):
    with pytest.raises(
        DataError, match=r"train\.tar: sample 001: .*(no field|damaged|not a label|several labels)"
    ):
        index_it(tars(['{"label": 0}', label, '{"label": 0}'], "json"), label=LabelPlace("json", "label"))


def test_whole_numbers_may_be_written_as_floats(tars):
    index = index_it(tars(["1.0", "0.", "2.00", "1"]))
    assert (index.classes, labels_of(index)) == (("0", "1", "2"), [1, 0, 2, 1])
    assert index.label is None


def test_a_word_among_numbers_is_a_mistake_unless_it_names_a_class(tars):
    folder = tars(["0", "1", "x", "1"])
    with pytest.raises(DataError, match=r"train\.tar: sample 002: b'x' is not a label"):
        index_it(folder)
    index = index_it(folder, classes=["x", "1", "0"])
    assert labels_of(index) == [2, 1, 0, 1]


def test_names_that_are_not_among_the_classes_are_told(tars):
    with pytest.raises(DataError, match=r"2 samples have the label 'cat', which is not one of the 2 names"):
        index_it(tars(["cat", "dog"]), classes=["dog", "cow"])
    assert index_it(tars(["cat", "dog"]), classes=["dog", "cow", "cat"]).splits["train"].class_counts == (
        1,
        0,
        1,
    )


def test_captions_are_no_classes(tars, monkeypatch):
    folder = tars([f"a photo of {number}" for number in range(5)], "txt")
    monkeypatch.setattr("disttrain.shards.labels._MANY_NAMES", 4)
    with pytest.raises(DataError, match=r"5 different labels in KEY\.txt for 10 samples.* with --label"):
        index_it(folder)


def test_an_index_that_is_replaced_keeps_the_names_of_its_classes(tars):
    folder = tars(["0", "1", "1"])
    index = index_it(folder, classes=["rose", "tulip"])
    assert index_it(folder, force=True).digest == index.digest
    (folder / "index.json").write_text("{")
    assert index_it(folder, force=True).classes == ("0", "1")
    named = index_it(tars(["b", "a"]), force=True, classes=["b", "a"])
    assert index_it(folder, force=True).digest == named.digest
    assert index_it(tars(["c", "a"]), force=True).classes == ("a", "c")


@pytest.mark.parametrize("text", ["json", "json:", "png", "cls:x", ""])
def test_other_places_of_labels_are_refused(text):
    with pytest.raises(UsageError, match="expected cls, txt or json:FIELD"):
        parse_place(text)


def test_the_cached_labels_depend_on_the_names(tars):
    folder = tars(["a", "b", "b"])
    assert labels_of(index_it(folder)) == [0, 1, 1]
    assert labels_of(index_it(folder, force=True, classes=["b", "a"])) == [1, 0, 0]
    assert np.array_equal(labels_of(index_it(folder, force=True, classes=["b", "a"]), "val"), [1, 0, 0])
