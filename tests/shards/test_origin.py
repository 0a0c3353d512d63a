"""Tars of other tools are never replaced, and no remedy says to do so."""

import pytest

from disttrain.errors import DataError
from disttrain.shards.datasets import prepare
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import load_index
from disttrain.shards.origin import existing_tar
from disttrain.shards.pack import Options
from kit.shards import read_split, write_tar
from kit.toy import CLASSES, encode, images, pack


@pytest.fixture
def theirs(root):
    """An indexed data set of tars that another tool wrote."""
    write_tar(root / "theirs" / "train-000000.tar", 6, seed=0)
    write_tar(root / "theirs" / "val-000000.tar", 4, seed=1)
    index_folder(root / "theirs", {"train": (), "val": ()}, Options())
    return root / "theirs"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_tar_of_another_tool_is_to_be_fetched_and_indexed_again(theirs):
    flip(theirs / "train-000000.tar", 700)
    with pytest.raises(DataError) as caught:
        list(read_split(load_index("theirs", None), "train"))
    assert str(caught.value).endswith(
        f"; get the file again, then run `disttrain data index {theirs} --force` with the options of the "
        "first time"
    )
    (theirs / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="get the file again"):
        load_index("theirs", None)
    (theirs / "val-000000.tar").rename(theirs / "part.tar")
    (theirs / "index.json").unlink()
    with pytest.raises(DataError, match=rf"index its tars with `disttrain data index {theirs}`"):
        load_index("theirs", None)


def test_shards_of_other_names_are_those_of_another_tool(root):
    write_tar(root / "parts" / "train-0.tar", 6, seed=0)
    write_tar(root / "parts" / "val-0.tar", 4, seed=1)
    index = index_folder(root / "parts", {"train": (), "val": ()}, Options())
    for path in index.folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="get the file again"):
        load_index("parts", None)


def test_force_never_replaces_a_tar_of_another_tool(theirs):
    before = snapshot(theirs)
    with pytest.raises(DataError, match="disttrain did not write this tar, so it is not replaced"):
        pack("theirs", force=True)
    with pytest.raises(DataError, match=r"disttrain did not write train-000000\.tar, so choose another name"):
        pack("theirs")
    (theirs / "index.json").unlink()
    with pytest.raises(DataError, match="disttrain did not write this tar"):
        pack("theirs", force=True)
    assert snapshot(theirs).items() <= before.items()
    assert len(snapshot(theirs)) == 2


def test_links_to_tars_of_another_tool_are_not_replaced(root, theirs):
    (root / "linked").mkdir()
    (root / "linked" / "train.tar").symlink_to(theirs / "train-000000.tar")
    with pytest.raises(DataError, match="disttrain did not write this tar"):
        pack("linked", force=True)
    assert (root / "linked" / "train.tar").is_symlink()


def test_a_well_known_data_set_is_not_made_in_their_place(root, theirs):
    theirs.rename(root / "digits")
    flip(root / "digits" / "val-000000.tar", 700)
    before = snapshot(root / "digits")
    with pytest.raises(DataError, match="get the file again"):
        prepare("digits", None, None, Options())
    assert snapshot(root / "digits") == before


@pytest.mark.parametrize("position", [0, 265, 300, 512, 1536])
def test_a_damaged_tar_of_our_own_is_known_and_replaced(root, position):
    folder = pack().folder
    flip(folder / "train-000000.tar", position)
    assert existing_tar(folder) is None
    with pytest.raises(DataError, match="make the data set again with `disttrain data pack DIR --name toy"):
        list(read_split(load_index("toy", None), "train"))
    assert len(list(read_split(pack(force=True), "train"))) == 10


def test_through_the_command_line(disttrain, theirs, tmp_path):
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(encode(images(1, seed=len(split) + len(name))[0]))
    flip(theirs / "train-000000.tar", 700)
    before = snapshot(theirs)
    verified = disttrain("data", "verify", "theirs", "--root", theirs.parent)
    assert verified.returncode == 65
    assert "--name theirs" not in verified.stderr
    packed = disttrain(
        "data", "pack", tmp_path / "photos", "--name", "theirs", "--root", theirs.parent, "--force"
    )
    assert (packed.returncode, snapshot(theirs)) == (65, before)
    flip(theirs / "train-000000.tar", 700)
    assert disttrain("data", "index", theirs, "--force").returncode == 0
    assert disttrain("data", "verify", "theirs", "--root", theirs.parent).returncode == 0
