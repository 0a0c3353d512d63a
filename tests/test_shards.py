"""The packed format, through pack, load_index and read_split."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttrain import shards
from disttrain.errors import DataError, StorageError, UsageError
from disttrain.shards import Sample

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, which is the default one."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DISTTRAIN_DATA", str(folder))
    return folder


def encode(pixels, image_format="PNG", **options):
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, image_format, **options)
    return file.getvalue()


def images(count, seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def samples(pixels):
    return [Sample(encode(image), "png", i % len(CLASSES)) for i, image in enumerate(pixels)]


def pack(name="toy", train=10, val=4, seed=0, root=None, **options):
    splits = {"train": samples(images(train, seed)), "val": samples(images(val, seed + 1))}
    return shards.pack(name, root, splits, CLASSES, channels=3, **options)


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_index(folder, change):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_shard(folder, members):
    """Replaces the first train shard by one of these members, with an index that agrees."""
    path = folder / "train-000000.tar"
    path.chmod(0o644)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_index(folder, lambda content: content["splits"]["train"]["shards"][0].update(shard))


# --- Where ------------------------------------------------------------------------------------------


def test_root_is_argument_then_variable_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert shards.data_root(str(tmp_path / "argument")) == tmp_path / "argument"
    assert shards.data_root("~/d") == tmp_path / "home" / "d"
    assert shards.data_root(None) == tmp_path / "variable"
    monkeypatch.delenv("DISTTRAIN_DATA")
    assert shards.data_root(None) == tmp_path / "xdg" / "disttrain" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert shards.data_root(None) == tmp_path / "home" / ".cache" / "disttrain" / "data"


def test_relative_root_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = pack(root="here")
    monkeypatch.chdir("/")
    assert len(list(shards.read_split(index, "val"))) == 4


# --- Writing and reading ----------------------------------------------------------------------------


def test_every_pixel_and_label_comes_back(root):
    index = pack()
    for split, seed, count in (("train", 0, 10), ("val", 1, 4)):
        read = list(shards.read_split(index, split))
        assert [key for key, _, _ in read] == [f"{i:08d}" for i in range(count)]
        assert [label for _, _, label in read] == [i % 3 for i in range(count)]
        decoded = np.stack([shards.decode_image(image, 3) for _, image, _ in read])
        np.testing.assert_array_equal(decoded, images(count, seed))


def test_index_says_what_is_there(root):
    index = pack()
    folder = root / "toy"
    assert (index.folder, index.name, index.classes) == (folder, "toy", CLASSES)
    assert (index.channels, index.height, index.width) == (3, 6, 5)
    assert index.splits["train"].class_counts == (4, 3, 3)
    assert index.splits["val"].class_counts == (2, 1, 1)
    assert index.digest == hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    for split in index.splits.values():
        for shard in split.shards:
            data = (folder / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(tree(folder)) == ["index.json", "train-000000.tar", "val-000000.tar"]
    assert shards.load_index("toy", None) == index


def test_mean_and_std_are_those_of_the_train_split(root):
    index = pack(train=50)
    pixels = images(50) / 255
    np.testing.assert_allclose(index.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(index.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_constant_images_have_std_zero(root):
    white = Sample(encode(np.full((4, 4), 255, np.uint8)), "png", 0)
    index = shards.pack("white", None, {"train": [white] * 3}, ["one"], channels=1)
    assert (index.mean, index.std) == ((1.0,), (0.0,))


def test_same_samples_give_same_bytes(root, tmp_path):
    first = pack(shard_mib=0.01)
    second = pack(root=str(tmp_path / "other"), name="renamed", shard_mib=0.01)
    assert tree(first.folder) == tree(second.folder)
    assert first.digest == second.digest


def test_several_shards_keep_the_order(root):
    index = pack(train=40, shard_mib=0.01)
    of_train = index.splits["train"].shards
    assert len(of_train) > 3
    assert [shard.file for shard in of_train] == [f"train-{i:06d}.tar" for i in range(len(of_train))]
    assert sum(shard.samples for shard in of_train) == 40
    assert [key for key, _, _ in shards.read_split(index, "train")] == [f"{i:08d}" for i in range(40)]
    of_one = list(shards.read_shard(index, of_train[1]))
    first = of_train[0].samples
    assert of_one == list(shards.read_split(index, "train"))[first : first + len(of_one)]


def test_every_caller_reads_every_shard(root, monkeypatch):
    index = pack(train=40, shard_mib=0.01)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("WORKER", "1"), ("NUM_WORKERS", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WDS_CACHE", "/nowhere")
    monkeypatch.setenv("GOPEN_REWRITE", "/=/nowhere/")
    assert len(list(shards.read_split(index, "train"))) == 40


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library leaves the tar open
def test_shards_are_plain_webdataset(root):
    import webdataset

    index = pack()
    stock = webdataset.WebDataset(str(index.folder / "train-000000.tar"), shardshuffle=False).decode("rgb8")
    read = [(sample["__key__"], sample["png"], sample["cls"]) for sample in stock]
    assert [key for key, _, _ in read] == [f"{i:08d}" for i in range(10)]
    assert [label for _, _, label in read] == [i % 3 for i in range(10)]
    np.testing.assert_array_equal(np.stack([image for _, image, _ in read]), images(10))


def test_tar_members_are_the_same_for_every_user_and_day(root):
    index = pack()
    with tarfile.open(index.folder / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "disttrain", "disttrain", 0o444)
    }


def test_progress_counts_over_all_splits(root):
    seen = []
    pack(train=250, val=4, on_progress=seen.append)
    assert seen == [100, 200, 250, 254]


def test_data_set_is_readable_for_others(root):
    mask = os.umask(0o022)
    try:
        index = pack()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(index.folder.stat().st_mode) == 0o755


def test_samples_are_taken_as_they_are_needed(root):
    ahead = [0, 0]

    def endless():
        image = encode(images(1)[0])
        for ahead[0] in range(10_000):
            yield Sample(image, "png", 0)

    def watch(done):
        ahead[1] = max(ahead[1], ahead[0] - done)

    shards.pack("long", None, {"train": endless()}, CLASSES, channels=3, on_progress=watch)
    assert ahead[1] < 2_000


# --- Refusals of pack -------------------------------------------------------------------------------


def test_existing_data_set_stays(root):
    index = pack()
    with pytest.raises(DataError, match=r"toy: another data set .* --force") as caught:
        pack(seed=7)
    assert caught.value.exit_code == 65
    assert shards.load_index("toy", None) == index
    assert pack() == index
    assert [path.name for path in root.iterdir()] == ["toy"]


def test_overwrite_replaces(root):
    old = pack()
    new = pack(seed=7, train=3, overwrite=True)
    assert new.digest != old.digest
    assert len(list(shards.read_split(new, "train"))) == 3
    assert [path.name for path in root.iterdir()] == ["toy"]


def test_reader_of_a_replaced_shard_is_not_disturbed(root):
    reader = shards.read_split(pack(), "train")
    next(reader)
    pack(seed=7, overwrite=True)
    assert len(list(reader)) == 9


def test_overwrite_spares_what_is_no_data_set(root):
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex: not part of a packed data set; move it away"):
        pack(overwrite=True)
    assert (root / "toy" / "thesis.tex").read_text() == "years of work"


def test_data_set_may_be_a_link_to_another_disk(root, tmp_path):
    (tmp_path / "disk" / "toy").mkdir(parents=True)
    root.mkdir()
    (root / "toy").symlink_to(tmp_path / "disk" / "toy")
    pack(overwrite=True)
    assert (root / "toy").is_symlink()
    assert (tmp_path / "disk" / "toy" / "index.json").is_file()


BROKEN = {
    "no image": Sample(b"hello", "png", 0, "a/b.png"),
    "cut off": Sample(encode(images(1)[0])[:60], "png", 0, "a/b.png"),
    "other size": Sample(encode(images(1, shape=(7, 5, 3))[0]), "png", 0, "a/b.png"),
    "label": Sample(encode(images(1)[0]), "png", 3, "a/b.png"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sample_is_named_and_nothing_is_left(root, case):
    with pytest.raises(DataError, match=r"^a/b\.png") as caught:
        shards.pack("toy", None, {"train": [*samples(images(3)), BROKEN[case]]}, CLASSES, channels=3)
    assert "\n" not in str(caught.value)
    assert list(root.iterdir()) == []


def test_sizes_are_both_named(root):
    train = [*samples(images(2)), BROKEN["other size"]]
    with pytest.raises(DataError, match=r"a/b\.png is 5x7 but train sample 0 is 5x6"):
        shards.pack("toy", None, {"train": train}, CLASSES, channels=3)


def test_empty_split_is_refused(root):
    with pytest.raises(DataError, match="the val split has no images"):
        shards.pack("toy", None, {"train": samples(images(2)), "val": []}, CLASSES, channels=3)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(root, stop):
    def interrupted():
        yield from samples(images(200))
        raise stop

    with pytest.raises(stop):
        shards.pack("toy", None, {"train": interrupted()}, CLASSES, channels=3)
    assert list(root.iterdir()) == []


def test_failed_write_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*cannot be written.*--root") as caught:
        pack(root=str(tmp_path / "file"))
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "a b"])
def test_name_must_be_plain(root, name):
    with pytest.raises(UsageError, match="is not the name of a data set"):
        shards.load_index(name, None)
    with pytest.raises(UsageError, match="is not the name of a data set"):
        pack(name=name)


PACK_ON_SIGNAL = """
import sys, webdataset
from disttrain import shards
from disttrain.errors import DataError
splits, classes, root = eval(sys.stdin.readline())
print("ready", flush=True)
sys.stdin.readline()
try:
    splits = {name: [shards.Sample(*sample) for sample in samples] for name, samples in splits.items()}
    print(shards.pack("toy", root, splits, classes, channels=3).digest)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("seeds", [(0, 0), (0, 7)], ids=["same", "different"])
def test_two_processes_at_once(root, seeds):
    command = [sys.executable, "-c", PACK_ON_SIGNAL]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in seeds
    ]
    for process, seed in zip(processes, seeds, strict=True):
        splits = {"train": [tuple(sample) for sample in samples(images(60, seed))]}
        process.stdin.write(f"{(splits, CLASSES, str(root))!r}\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    index = shards.load_index("toy", None)
    shards.verify(index)
    assert index.digest in outcomes
    if seeds[0] == seeds[1]:
        assert outcomes == [index.digest] * 2
    else:
        assert any("another data set" in outcome for outcome in outcomes)
    assert [path.name for path in root.iterdir()] == ["toy"]


# --- Damage -----------------------------------------------------------------------------------------


def test_missing_data_set_names_path_remedy_and_what_is_there(root):
    pack(name="flowers")
    with pytest.raises(DataError) as caught:
        shards.load_index("flower", None)
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
    with pytest.raises(DataError, match="holds none yet") as caught:
        shards.load_index(name, None)
    assert f"`disttrain data {command}" in str(caught.value)


def test_remedy_names_a_root_that_is_not_the_default(root, tmp_path):
    with pytest.raises(DataError) as caught:
        shards.load_index("mnist", str(tmp_path / "my data"))
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
        (set_key("version", value=2), "format version 2, but this disttrain reads version 1"),
        (drop_key("version"), "version: field required"),
        (drop_key("mean"), "mean: field required"),
        (drop_key(*TRAIN_SHARD, "sha256"), r"splits\.train\.shards\.0\.sha256: field required"),
        (set_key(*TRAIN_SHARD, "file", value="../other/train-000000.tar"), r"splits\.train\.shards\.0\.file"),
        (set_key(*TRAIN_SHARD, "file", value="/etc/passwd"), r"splits\.train\.shards\.0\.file"),
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
        shards.load_index("toy", None)
    assert str(root / "toy" / "index.json") in str(caught.value)
    assert "`disttrain data pack DIR --name toy --force`" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]"])
def test_index_that_is_no_json_object(root, text):
    pack()
    (root / "toy" / "index.json").write_bytes(text)
    with pytest.raises(DataError, match=r"index\.json: .*; make the data set again"):
        shards.load_index("toy", None)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 1024)])
def test_missing_or_short_shard_is_noticed_by_load_index(root, damage):
    pack()
    damage(root / "toy" / "val-000000.tar")
    with pytest.raises(DataError, match=r"val-000000\.tar: .*`disttrain data pack DIR --name toy --force`"):
        shards.load_index("toy", None)


def test_any_flipped_bit_is_noticed_before_the_first_sample(root):
    index = pack()
    path = index.folder / "train-000000.tar"
    sound = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(sound), 40):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar: the shard is damaged .*--force"):
            next(shards.read_split(index, "train"))
    path.write_bytes(sound)
    assert len(list(shards.read_split(index, "train"))) == 10


def test_shard_that_vanishes_or_shrinks_after_loading(root):
    index = pack()
    os.truncate(index.folder / "train-000000.tar", 2048)
    with pytest.raises(DataError, match=r"train-000000\.tar: 2048 bytes, but the index says"):
        next(shards.read_split(index, "train"))
    (index.folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: No such file"):
        next(shards.read_split(index, "train"))
    with pytest.raises(DataError, match=r"train-000000\.tar: No such file"):
        shards.check_shard(index, index.splits["train"].shards[0])


PNG = encode(images(1)[0])


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.png": PNG}, r"sample 0 has no label \(0\.cls\)"),
        ({"0.cls": b"1"}, "sample 0 has 0 images"),
        ({"0.png": PNG, "0.jpg": PNG, "0.cls": b"1"}, "sample 0 has 2 images"),
        ({"0.png": PNG, "0.cls": b"cat"}, "sample 0: b'cat' is not a label from 0 to 2"),
        ({"0.png": PNG, "0.cls": b"3"}, "sample 0: b'3' is not a label from 0 to 2"),
        ({"0.png": PNG, "0.cls": b"-1"}, "sample 0: b'-1' is not a label"),
        ({"0.png": PNG, "0.cls": b"1"}, "1 samples, but the index says 10"),
        ({"0.png": PNG, "0.PNG": PNG, "0.cls": b"1"}, "duplicate"),
    ],
)
def test_shard_with_wrong_members(root, members, reason):
    pack()
    rewrite_shard(root / "toy", members)
    index = shards.load_index("toy", None)
    with pytest.raises(DataError, match=rf"train-000000\.tar: .*{reason}.*make the data set again"):
        list(shards.read_split(index, "train"))


def test_unknown_split(root):
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        next(shards.read_split(pack(), "test"))


def test_verify_finds_what_the_index_gets_wrong(root):
    seen = []
    shards.verify(pack(), on_progress=seen.append)
    assert seen[-1] == 14
    for change, reason in [
        (set_key("width", value=6), "image size"),
        (set_key("mean", value=[0.5, 0.5, 0.5]), "mean or std"),
        (set_key("splits", "val", "class_counts", value=[1, 2, 1]), "val: the class counts"),
    ]:
        pack(overwrite=True)
        edit_index(root / "toy", change)
        with pytest.raises(DataError, match=reason):
            shards.verify(shards.load_index("toy", None))


# --- Images -----------------------------------------------------------------------------------------


def test_exif_orientation_is_applied():
    pixels = images(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    decoded = shards.decode_image(encode(pixels, exif=exif), 3)
    np.testing.assert_array_equal(decoded, np.rot90(pixels, -1))


def test_palette_alpha_cmyk_and_bilevel_become_rgb():
    pixels = np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8)
    picture = Image.fromarray(pixels)
    alpha = picture.convert("RGBA")
    alpha.putalpha(128)
    palette = picture.quantize(2)
    for image in (encode(alpha), encode(palette), encode(palette, transparency=b"\x00\x80")):
        np.testing.assert_array_equal(shards.decode_image(image, 3), pixels)
    cmyk = shards.decode_image(encode(picture.convert("CMYK"), "TIFF"), 3)
    np.testing.assert_array_equal(cmyk, pixels)
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert shards.decode_image(encode(bilevel), 3).tolist() == [[[255] * 3, [0] * 3]]


def test_16_bits_keep_the_upper_8():
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    for channels in (1, 3):
        decoded = shards.decode_image(encode(deep), channels)
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 255]
        assert decoded.shape == (1, 4, channels)


def test_decoded_array_is_writable_and_has_its_channels():
    gray = encode(np.arange(6, dtype=np.uint8).reshape(2, 3))
    decoded = shards.decode_image(gray, 1)
    assert decoded.shape == (2, 3, 1)
    assert decoded.flags.writeable
    assert shards.decode_image(gray, 3).shape == (2, 3, 3)


def test_huge_picture_is_refused_by_its_header():
    bomb = encode(Image.new("1", (8193, 8192)))
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="8193x8192 pixels are more than the limit"):
        shards.decode_image(bomb, 3)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize("data", [b"", b"hello", PNG[:50], POSTSCRIPT])
def test_what_is_no_sound_image_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"not a sound image|truncated"):
        shards.decode_image(data, 3)


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        shards.decode_image(encode(Image.new("F", (2, 2)), "TIFF"), 1)


@pytest.mark.parametrize("slow_s", [0, 3600], ids=["threads", "inline"])
def test_map_in_threads_keeps_order_and_raises(slow_s):
    options = {"chunk": 7, "slow_s": slow_s}
    assert list(shards.map_in_threads(str, range(1000), **options)) == [str(i) for i in range(1000)]
    with pytest.raises(ZeroDivisionError):
        list(shards.map_in_threads(lambda x: 1 // x, [1, 0], **options))


@pytest.mark.parametrize("slow_s", [0, 3600], ids=["threads", "inline"])
def test_map_in_threads_may_be_left_early(slow_s):
    taken, before = [], threading.active_count()
    results = shards.map_in_threads(str, (taken.append(i) or i for i in range(10_000)), slow_s=slow_s)
    assert next(results) == "0"
    results.close()
    assert len(taken) < 2_000
    assert threading.active_count() == before


# --- Imports ----------------------------------------------------------------------------------------


def test_import_is_light():
    code = "import disttrain.datasets, sys; print({'torch', 'torchvision', 'webdataset'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert run.stdout.strip() == "set()"
