"""WebDataset tars that were made elsewhere, used where they lie."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import verify
from kit.shards import SEVEN, read_split, write_members, write_tar
from kit.toy import encode


def index_it(folder, train=(), val=(), force=False, **options):
    return index_folder(folder, {"train": train, "val": val}, Options(force), **options)


def write(path, images, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, content in ((f"{number}.png", encode(image)), (f"{number}.cls", str(label).encode())):
                member = tarfile.TarInfo(f"{path.stem}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pixels(count, seed, shape=(4, 5)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_the_index_says_what_the_tars_hold(seven_root):
    index = load_index("seven", str(seven_root))
    assert (index.channels, index.height, index.width) == (3, 8, 8)
    assert index.classes == ("0", "1", "2", "3")
    for split, shards in SEVEN.items():
        assert tuple(shard.samples for shard in index.splits[split].shards) == shards
        for shard in index.splits[split].shards:
            content = (index.folder / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    samples = list(read_split(index, "train"))
    images = np.stack([decode_image(image, 3) for _, image, _ in samples]) / 255
    np.testing.assert_allclose(index.mean, images.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(index.std, images.std(axis=(0, 1, 2)), rtol=1e-12)
    assert index.splits["train"].class_counts == tuple(np.bincount([label for _, _, label in samples]))


def test_shards_of_our_own_get_the_index_they_had(digits_root, tmp_path):
    original = load_index("digits", str(digits_root))
    shutil.copytree(digits_root / "digits", tmp_path / "digits")
    (tmp_path / "digits" / "index.json").unlink()
    (tmp_path / "classes").write_text("\n".join(original.classes) + "\n")
    index = index_it(tmp_path / "digits", classes=original.classes)
    assert index.digest == original.digest


def test_the_tars_stay_as_they_are(tmp_path):
    write_tar(tmp_path / "set" / "train-0.tar", 5, seed=0)
    write_tar(tmp_path / "set" / "val-0.tar", 3, seed=1)
    paths = sorted((tmp_path / "set").iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    index_it(tmp_path / "set")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "index.json",
        "train-0.tar",
        "val-0.tar",
    ]


@pytest.mark.parametrize("colour_at", [None, 0, 3])
def test_a_data_set_is_gray_if_every_image_is(tmp_path, colour_at):
    images = [*pixels(4, 0)]
    if colour_at is not None:
        images[colour_at] = pixels(1, 9, (4, 5, 3))[0]
    write(tmp_path / "set" / "train.tar", images, [0, 1, 0, 1])
    write(tmp_path / "set" / "val.tar", pixels(2, 1), [0, 1])
    assert index_it(tmp_path / "set").channels == (1 if colour_at is None else 3)


def test_the_same_tar_in_two_splits_is_named(tmp_path):
    members = {"a.png": encode(np.zeros((8, 8, 3), np.uint8)), "a.cls": b"0"}
    for split in ("train", "val"):
        write_members(tmp_path / f"{split}-0.tar", members)
    with pytest.raises(DataError, match=r"train-0\.tar and val-0\.tar are the same data; remove one of them"):
        index_folder(tmp_path, {"train": [], "val": []}, Options())


def test_patterns_name_the_splits(tmp_path):
    for name in ("part-0", "part-1", "check", "sub/more"):
        write(tmp_path / "set" / f"{name}.tar", pixels(2, len(name)), [0, 1])
    with pytest.raises(DataError, match=r"no tars match train\*\.tar, .*--train PATTERN"):
        index_it(tmp_path / "set")
    index = index_it(tmp_path / "set", train=["part-*.tar", "sub/*.tar"], val=["check.tar"])
    assert [shard.file for shard in index.splits["train"].shards] == [
        "part-0.tar",
        "part-1.tar",
        "sub/more.tar",
    ]
    assert [shard.file for shard in index.splits["val"].shards] == ["check.tar"]
    with pytest.raises(DataError, match=r"index\.json: already exists; replace it with --force"):
        index_it(tmp_path / "set", train=["*.tar"], val=["check.tar"])
    with pytest.raises(DataError, match=r"part-1\.tar: belongs to no split"):
        index_it(tmp_path / "set", train=["part-0.tar", "sub/*.tar"], val=["check.tar"], force=True)
    with pytest.raises(UsageError, match=r"check\.tar: belongs to both train and val"):
        index_it(tmp_path / "set", train=["*.tar"], val=["check.tar"], force=True)
    with pytest.raises(UnsafeError, match="leaves the folder"):
        index_it(tmp_path / "set", train=["../set/*.tar"], val=["check.tar"], force=True)
    assert len(load_index("set", str(tmp_path)).splits["train"].shards) == 3  # as it was


def test_braces_name_several_tars(tmp_path):
    for name in ("a-000", "a-001", "a-002", "val"):
        write(tmp_path / "set" / f"{name}.tar", pixels(2, len(name)), [0, 1])
    index = index_it(tmp_path / "set", train=["a-{000..002}.tar"], val=["val.tar"])
    assert [shard.file for shard in index.splits["train"].shards] == ["a-000.tar", "a-001.tar", "a-002.tar"]
    refused = {
        "a-{000..003}.tar": (DataError, r"a-003\.tar is missing"),
        "a-{000": (UsageError, "unbalanced braces"),
        "{..,.}/a-000.tar": (UnsafeError, "leaves the folder"),
        "a-{0..999999999}.tar": (UsageError, "more than 100,000 tars"),
    }
    for pattern, (kind, text) in refused.items():
        with pytest.raises(kind, match=text):
            index_it(tmp_path / "set", train=[pattern], val=["val.tar"], force=True)


def test_keys_that_begin_again_in_every_shard_are_no_duplicates(tmp_path):
    names = {"train-0.tar": pixels(3, 0), "train-1.tar": pixels(3, 1), "val.tar": pixels(2, 2)}
    for name, images in names.items():
        members = {}
        for number, image in enumerate(images):
            members |= {f"{number:06}.png": encode(image, compress_level=0), f"{number:06}.cls": b"1"}
        write_members(tmp_path / "set" / name, members)
    index = index_it(tmp_path / "set")
    assert index.splits["train"].samples == 6
    assert verify(index) == []
    same = {"000009.png": encode(pixels(1, 5)[0]), "000009.cls": b"0", **members}
    write_members(tmp_path / "set" / "train-2.tar", same)
    write_members(tmp_path / "set" / "train-3.tar", {**same, "other.png": b"x", "other.cls": b"0"})
    with pytest.raises(
        DataError, match=r"train-3\.tar: sample 000009: is also in another shard of the split"
    ):
        index_it(tmp_path / "set", force=True)


@pytest.mark.parametrize(
    ("names", "label", "words"),
    [
        (("a.png", "a.cls"), b"\x80\x01", r"sample a: b'\\x80\\x01' is not a label"),
        (("a.png", "a.cls"), b" ", r"sample a: b'' is not a label"),
        (("a.png", "a.json"), b"{}", r"sample a: no label \(member cls\) \(no sample"),
        (("a.input.png", "a.output.cls"), b"1", r"no image: a key ends at the first dot .* is input\.png"),
        (("n01.v2_0.png", "n01.v2_0.cls"), b"1", r"sample n01: no image: a key .* is v2_0\.cls"),
        (("a.png", "b.png", "a.cls", "b.cls"), b"1", r"sample a: key a occurs twice"),
        (("a.png", "b.png", "a.txt", "b.txt"), b"cat", r"sample a: key a occurs twice"),
    ],
)
@pytest.mark.parametrize("bad", [("train", "val"), ("train",), ("val",)])
def test_the_reason_is_said_when_no_sample_of_a_split_has_a_label(tmp_path, names, label, words, bad):
    write(tmp_path / "set" / "train.tar", pixels(3, 0), [0, 1, 0])
    write(tmp_path / "set" / "val.tar", pixels(2, 1), [0, 1])
    image = encode(pixels(1, 0)[0])
    if "a.txt" in names and len(bad) == 1:
        words = "no label"  # the other split has its labels in KEY.cls
    for split in bad:
        members = {name: image if name.endswith("png") else label for name in names}
        write_members(tmp_path / "set" / f"{split}.tar", members)
    with pytest.raises(DataError, match=rf"{bad[0]}\.tar: .*{words}.*KEY\.cls") as caught:
        index_it(tmp_path / "set")
    assert "--skip" not in str(caught.value)


@pytest.mark.parametrize("problem", ["empty", "missing", "no tar", "no labels", "name"])
def test_what_cannot_be_indexed_is_told_and_leaves_no_index(tmp_path, problem):
    folder = tmp_path / ("my set" if problem == "name" else "set")
    folder.mkdir()
    write(folder / "train.tar", pixels(3, 0), [""] * 3 if problem == "no labels" else [0, 1, 0])
    write(folder / "val.tar", pixels(2, 1), [0, 1])
    words = {
        "empty": "no tars match",
        "missing": "no such folder",
        "no tar": r"train\.tar: .*get or make it again",
        "no labels": "no sample has a label|is not a label",
        "name": "is not a valid name of a data set",
    }
    if problem in {"empty", "missing"}:
        shutil.rmtree(folder)
        if problem == "empty":
            folder.mkdir()
    if problem == "no tar":
        (folder / "train.tar").write_bytes(os.urandom(2048))
    if problem == "no labels":
        write(folder / "val.tar", pixels(2, 1), ["", ""])
    with pytest.raises((DataError, UsageError), match=words[problem]):
        index_it(folder)
    assert not (folder / "index.json").exists()


def test_a_folder_is_indexed_and_trained_on_through_the_command(disttrain, tmp_path, config_file):
    write_tar(tmp_path / "sets" / "flowers" / "train-0.tar", 70, seed=0)
    write_tar(tmp_path / "sets" / "flowers" / "test-0.tar", 20, seed=1)
    (tmp_path / "names.txt").write_text("rose\ntulip\nlily\ndaisy\n")
    result = disttrain("data", "index", "sets/flowers", "--classes", "names.txt")
    assert result.returncode == 0, result.stderr
    assert f"data.name=flowers data.root={tmp_path / 'sets'}" in result.stdout
    assert json.loads((tmp_path / "sets/flowers/index.json").read_text())["classes"][1] == "tulip"
    result = disttrain(
        "run",
        config_file,
        "--procs",
        "1",
        "data.name=flowers",
        f"data.root={tmp_path / 'sets'}",
        "--run-dir",
        "r",
    )
    assert result.returncode == 0, result.stderr
    assert "of 20" in result.stdout
