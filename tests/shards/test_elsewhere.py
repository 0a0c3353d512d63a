"""Tars that are indexed in another folder, and labels that do not fit the names."""

import os

import pytest

from disttrain.errors import DataError, StorageError
from disttrain.shards.elsewhere import index_tars
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import verify
from kit.faults import tar_of
from kit.shards import write_tar
from kit.toy import encode, images, pack

USUAL = {"train": (), "val": ()}


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "cluster" / "train-0.tar", 6, seed=0)
    write_tar(tmp_path / "cluster" / "more" / "train-1.tar", 5, seed=2)
    write_tar(tmp_path / "cluster" / "val-0.tar", 4, seed=1)
    return tmp_path / "cluster"


PATTERNS = {"train": ("train-*.tar", "more/*.tar"), "val": ()}


def test_an_index_elsewhere_leads_to_the_tars(root, tars):
    before = sorted(tars.rglob("*"))
    index = index_tars(tars, "mine", None, PATTERNS, Options())
    assert sorted(tars.rglob("*")) == before
    assert (index.folder, index.name) == (root / "mine", "mine")
    assert verify(load_index("mine", None)) == []
    assert index.splits == index_folder(tars, PATTERNS, Options()).splits
    with pytest.raises(DataError, match="already exists; replace it with --force"):
        index_tars(tars, "mine", None, PATTERNS, Options())
    write_tar(tars / "train-2.tar", 3, seed=3)
    (tars / "train-0.tar").unlink()
    again = index_tars(tars, "mine", None, PATTERNS, Options(force=True))
    assert again.splits["train"].samples == 8
    assert verify(load_index("mine", None)) == []


def test_a_refused_index_elsewhere_leaves_nothing(root, tars):
    (tars / "train-0.tar").write_bytes(b"x" * 2048)
    with pytest.raises(DataError, match=r"mine/train-0\.tar: .*"):
        index_tars(tars, "mine", None, PATTERNS, Options())
    assert list(root.iterdir()) == []
    assert len(list(tars.rglob("*.tar"))) == 3


def test_force_replaces_no_packed_data_set(root, tars):
    index = pack()
    with pytest.raises(DataError, match=r"toy/train-000000\.tar: is not a link to a tar"):
        index_tars(tars, "toy", None, PATTERNS, Options(force=True))
    assert verify(load_index("toy", None)) == []
    assert load_index("toy", None) == index


def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(root, tars, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.raises(StorageError, match="put the index elsewhere with --name NAME and --root FOLDER"):
        index_tars(tars, None, None, PATTERNS, Options())
    assert index_tars(tars, None, str(root), PATTERNS, Options()).folder == root / "cluster"


def labelled(folder, labels, broken=None):
    folder.mkdir()
    members = []
    for number, label in enumerate(labels):
        image = b"broken" if label == broken else encode(images(1, seed=number)[0])
        members += [(f"{number}.png", image), (f"{number}.cls", b"%d" % label)]
    (folder / "train.tar").write_bytes(tar_of(*members))
    (folder / "val.tar").write_bytes(tar_of(*members, (f"{len(labels) - 1}.json", b"{}")))
    return folder


@pytest.mark.parametrize("skip", [False, True])
def test_labels_that_begin_at_1_are_told(tmp_path, skip):
    folder = labelled(tmp_path / "set", [1, 2, 1, 2])
    with pytest.raises(DataError, match=r"set: the labels begin at 1 and end at 2, but there are 2 names"):
        index_folder(folder, USUAL, Options(), classes=["cat", "dog"], skip_unusable=skip)
    index = index_folder(folder, USUAL, Options(), classes=["unused", "cat", "dog"])
    assert index.splits["train"].class_counts == (0, 2, 2)


def test_a_class_without_a_name_is_not_left_out(tmp_path):
    folder = labelled(tmp_path / "set", [0, 1, 2, 2])
    with pytest.raises(DataError, match=r"set: 4 samples have the label 2, but there are 2 names, .* add"):
        index_folder(folder, USUAL, Options(), classes=["cat", "dog"], skip_unusable=True)


def test_a_class_of_bad_samples_is_not_left_out(tmp_path):
    folder = labelled(tmp_path / "set", [0, 1, 1, 2], broken=1)
    with pytest.raises(DataError, match="all 2 samples of the class dog in train are bad"):
        index_folder(folder, USUAL, Options(), classes=["cat", "dog", "emu"], skip_unusable=True)
    assert not (folder / "index.json").exists()


def test_through_the_command_line(disttrain, tars, tmp_path):
    named = ("data", "index", tars, "--train", "train-*.tar", "--train", "more/*.tar")
    (tmp_path / "names").write_text("a\nb\nc\n")
    refused = disttrain(*named, "--classes", tmp_path / "names", "--skip", "--root", tmp_path / "sets")
    assert (refused.returncode, "samples have the label 3, but" in refused.stderr) == (65, True)
    result = disttrain(*named, "--name", "mine", "--root", tmp_path / "sets")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"train on it with data.name=mine data.root={tmp_path}/sets"
    assert disttrain("data", "verify", "mine", "--root", tmp_path / "sets").returncode == 0
