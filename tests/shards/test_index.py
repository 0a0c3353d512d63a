"""The index: where data sets lie, what index.json must say, and what is told when it does not."""

import os

import numpy as np
import pytest

from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards.index import data_root, load_index
from kit.shards import read_split
from kit.toy import PNG, edit_index, pack, rewrite_shard


def test_root_is_argument_then_variable_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_root(str(tmp_path / "argument")) == tmp_path / "argument"
    assert data_root("~/d") == tmp_path / "home" / "d"
    assert data_root(None) == tmp_path / "variable"
    monkeypatch.delenv("DISTTRAIN_DATA")
    assert data_root(None) == tmp_path / "xdg" / "disttrain" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert data_root(None) == tmp_path / "home" / ".cache" / "disttrain" / "data"


def test_relative_root_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = pack(root="here")
    monkeypatch.chdir("/")
    assert len(list(read_split(index, "val"))) == 4


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "a b"])
def test_name_must_be_plain(root, name):
    with pytest.raises(UsageError, match="is not a valid name of a data set"):
        load_index(name, None)
    with pytest.raises(UsageError, match="is not a valid name of a data set"):
        pack(name=name)


# --- Damage -----------------------------------------------------------------------------------------


def test_missing_data_set_names_path_remedy_and_what_is_there(root):
    pack(name="flowers")
    with pytest.raises(DataError) as caught:
        load_index("flower", None)
    text = str(caught.value)
    assert caught.value.exit_code == 65
    assert str(root / "flower" / "index.json") in text
    assert "did you mean flowers?" in text
    assert "`disttrain data pack DIR --name flower`" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "command"),
    [("mnist", "prepare mnist`"), ("cifar-10", "prepare cifar10`"), ("birds", "pack DIR --name birds`")],
)
def test_missing_data_set_names_the_command_that_makes_it(root, name, command):
    with pytest.raises(DataError, match="has no data sets yet") as caught:
        load_index(name, None)
    assert f"`disttrain data {command}" in str(caught.value)


def test_remedy_names_a_root_that_is_not_the_default(root, tmp_path):
    with pytest.raises(DataError) as caught:
        load_index("mnist", str(tmp_path / "my data"))
    assert f"`disttrain data prepare mnist --root '{tmp_path / 'my data'}'`" in str(caught.value)


def set_key(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop_key(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


TRAIN_SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_key("version", value=4), "format version 4, but this disttrain reads versions 1 to 3"),
        (set_key("version", value=2), "version 2 has no height and width"),
        (drop_key("version"), "version: field required"),
        (drop_key("mean"), "mean: field required"),
        (drop_key(*TRAIN_SHARD, "sha256"), r"splits\.train\.shards\.0\.sha256: field required"),
        (set_key(*TRAIN_SHARD, "samples", value="10"), r"splits\.train\.shards\.0\.samples"),
        (set_key(*TRAIN_SHARD, "samples", value=9), "10 samples, but 9 in shards and 10 in classes"),
        (set_key("splits", "train", "class_counts", value=[5, 5]), "2 for 3 classes"),
        (set_key("channels", value=4), "channels"),
        (set_key("std", value=[float("nan")] * 3), "std"),
        (set_key("mean", value=[0.5]), "mean and std must have 3 values"),
        (drop_key("splits", "train"), "train is missing"),
    ],
)
def test_wrong_index_is_named_with_reason_and_remedy(root, change, reason):
    pack()
    edit_index(root / "toy", change)
    with pytest.raises(DataError, match=reason) as caught:
        load_index("toy", None)
    assert str(root / "toy" / "index.json") in str(caught.value)
    assert "`disttrain data pack DIR --name toy --force`" in str(caught.value)


@pytest.mark.parametrize(
    "file",
    ["../other/train-000000.tar", "/etc/passwd", "pipe:touch x", "file:///x", "a b.tar", "x/../y.tar", ""],
)
def test_an_index_names_its_own_shards_only(root, file):
    pack()
    edit_index(root / "toy", set_key(*TRAIN_SHARD, "file", value=file))
    with pytest.raises(UnsafeError, match="refused to open") as caught:
        load_index("toy", None)
    assert caught.value.exit_code == 77


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]"])
def test_index_that_is_no_json_object(root, text):
    pack()
    (root / "toy" / "index.json").write_bytes(text)
    with pytest.raises(DataError, match=r"index\.json: .*; make the data set again"):
        load_index("toy", None)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 1024)])
def test_missing_or_short_shard_is_noticed_by_load_index(root, damage):
    pack()
    damage(root / "toy" / "val-000000.tar")
    with pytest.raises(DataError, match=r"val-000000\.tar: .*`disttrain data pack DIR --name toy --force`"):
        load_index("toy", None)


def test_any_flipped_bit_is_noticed_before_the_first_sample(root):
    index = pack()
    path = index.folder / "train-000000.tar"
    sound = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(sound), 40):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar: damaged: its SHA-256.*--force"):
            next(read_split(index, "train"))
    path.write_bytes(sound)
    assert len(list(read_split(index, "train"))) == 10


def test_shard_that_vanishes_or_shrinks_after_loading(root):
    index = pack()
    os.truncate(index.folder / "train-000000.tar", 2048)
    with pytest.raises(DataError, match=r"train-000000\.tar: 2048 bytes, but the index says"):
        next(read_split(index, "train"))
    (index.folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: No such file"):
        next(read_split(index, "train"))


GOOD = {"png": PNG, "cls": b"1"}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.png": PNG}, r"sample 0: no label \(member cls\)"),
        ({"0.cls": b"1"}, "sample 0: no image"),
        ({"0.png": PNG, "0.jpg": PNG, "0.cls": b"1"}, "sample 0: two images"),
        ({"0.png": PNG, "0.cls": b"cat"}, "sample 0: b'cat' is not a label"),
        ({"0.png": PNG, "0.cls": b"3"}, "sample 0: label 3 is not in 0 to 2"),
        ({"0.png": PNG, "0.cls": b"-1"}, "sample 0: b'-1' is not a label"),
        ({"0.png": PNG, "0.cls": b"1"}, "1 samples, but the index says 10"),
        ({"0.png": PNG, "0.PNG": PNG, "0.cls": b"1"}, "sample 0: two members named 0.PNG"),
    ],
)
def test_shard_with_wrong_members(root, members, reason):
    pack()
    if "index says" not in reason:
        members = members | {f"{i}.{name}": data for i in range(1, 10) for name, data in GOOD.items()}
    rewrite_shard(root / "toy", members)
    index = load_index("toy", None)
    with pytest.raises(DataError, match=rf"train-000000\.tar: .*{reason}.*make the data set again"):
        list(read_split(index, "train"))
