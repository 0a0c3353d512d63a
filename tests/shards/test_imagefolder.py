"""Packing folders of images."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from disttrain.errors import DataError, UsageError
from disttrain.shards import imagefolder
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import verify
from kit.shards import read_split
from kit.sources import noise, read, write


def pack(folder, said=None, name="mine", force=False, **options):
    say = [].append if said is None else said.append
    return imagefolder.pack_folder(folder, name, None, Options(force, say=say), **options)


def write_tree(folder, splits=("train", "val"), classes=("ant", "bee"), count=6, shape=(9, 8, 3)):
    images = {}
    for n, (split, name) in enumerate((split, name) for split in splits for name in classes):
        for i, image in enumerate(noise(count, *shape, seed=n)):
            path = folder / split / name / f"{i}.png"
            write(path, image)
            images[path] = image
    return images


@pytest.mark.parametrize("val", ["val", "test"])
def test_folder_round_trip(root, source, val):
    images = write_tree(source, ("train", val))
    index = pack(source)
    assert (index.name, index.classes, index.channels) == ("mine", ("ant", "bee"), 3)
    for split, name in (("train", "train"), ("val", val)):
        decoded, labels = read(index, split)
        found = sorted((image.tobytes(), label) for image, label in zip(decoded, labels, strict=True))
        expected = [
            (image.tobytes(), int(path.parent.name == "bee"))
            for path, image in images.items()
            if path.is_relative_to(source / name)
        ]
        assert found == sorted(expected)
    assert read(index, "train")[1] not in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)  # shuffled


def test_order_depends_on_seed_and_names_alone(root, source, tmp_path, monkeypatch):
    write_tree(source)
    digest = pack(source).digest
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            self._entries = scandir(folder)

        def __enter__(self):
            return reversed(list(self._entries.__enter__()))

        def __exit__(self, *error):
            self._entries.close()

    source.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Backwards)
        assert pack(tmp_path / "moved", name="again").digest == digest
    assert pack(tmp_path / "moved", name="other", seed=1).digest != digest


def test_val_fraction_takes_the_same_share_of_every_class(root, source):
    for name, count in (("ant", 40), ("bee", 20), ("cow", 2)):
        for i, image in enumerate(noise(count, 4, 4, seed=count)):
            write(source / name / f"{i}.png", image)
    index = pack(source, val_fraction=0.25)
    assert index.splits["val"].class_counts == (10, 5, 1)
    assert index.splits["train"].class_counts == (30, 15, 1)
    both = [image.tobytes() for split in ("train", "val") for image in read(index, split)[0]]
    assert len(set(both)) == 62
    assert pack(source, val_fraction=0.25, name="again").digest == index.digest
    assert pack(source, val_fraction=0.25, name="other", seed=1).digest != index.digest


def test_train_folder_alone_may_be_split(root, source):
    write_tree(source, ("train",))
    assert pack(source, val_fraction=0.5).splits["val"].class_counts == (3, 3)


def test_gray_images_have_one_channel_unless_one_has_colour(root, source):
    write_tree(source, shape=(9, 8))
    assert pack(source).channels == 1
    write(source / "val" / "bee" / "9.png", noise(1, 9, 8, 3)[0])
    assert pack(source, name="colour").channels == 3


def test_bytes_are_kept_where_every_reader_sees_the_same(root, source):
    image = noise(1, 9, 8, 3)[0]
    for file in ("0.png", "1.jpg", "2.JPEG", "3.webp"):
        write(source / "train" / "ant" / file, image)
    write(source / "val" / "ant" / "0.png", image)
    kept = {path.read_bytes() for path in (source / "train" / "ant").iterdir()}
    assert {data for _, data, _ in read_split(pack(source), "train")} == kept


def test_other_formats_become_png_of_the_same_pixels(root, source):
    image = noise(1, 9, 8, 3)[0]
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.fromarray(image)
    folder = source / "train" / "ant"
    write(folder / "0.bmp", image)
    write(folder / "1.tiff", image)
    write(folder / "2.ppm", image)
    write(folder / "3.png", image[::-1, ::-1], exif=exif)
    write(folder / "4.gif", picture.quantize(256))
    write(folder / "5.png", picture.quantize(256), transparency=b"\xff")
    write(folder / "6.png", picture.convert("RGBA"))
    write(source / "val" / "ant" / "0.png", image)
    index = pack(source)
    assert all(data.startswith(b"\x89PNG") for _, data, _ in read_split(index, "train"))
    assert all(Image.open(io.BytesIO(data)).mode == "RGB" for _, data, _ in read_split(index, "train"))
    np.testing.assert_array_equal(read(index, "train")[0], np.stack([image] * 7))


def test_deep_gray_is_cut_to_8_bits(root, source):
    write(source / "train" / "a" / "0.png", np.array([[0, 255, 256, 65535]], np.uint16))
    write(source / "val" / "a" / "0.png", np.zeros((1, 4), np.uint8))
    images, _ = read(pack(source), "train")
    assert images.reshape(-1).tolist() == [0, 0, 1, 255]


def test_images_of_several_sizes_keep_their_bytes(root, source):
    write_tree(source)
    exif = Image.Exif()
    exif[0x0112] = 6
    write(source / "val" / "bee" / "9.jpg", noise(1, 20, 30, 3)[0], exif=exif)
    index = pack(source)
    assert index.splits["val"].sizes.height == (9, 30)  # upright
    stored = {image for _, image, _ in read_split(index, "val")}
    assert (source / "val" / "bee" / "9.jpg").read_bytes() in stored
    index = pack(source, name="one", size=8)
    assert (index.version, index.height, index.width) == (1, 8, 8)


def test_size_of_a_turned_photo_is_that_of_the_upright_one(root, source):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(source / "train" / "a" / "0.jpg", noise(1, 8, 6, 3)[0], exif=exif)
    write(source / "val" / "a" / "0.png", noise(1, 6, 8, 3)[0])
    index = pack(source)
    assert (index.height, index.width) == (6, 8)


def test_size_scales_the_shorter_side_and_cuts_the_middle(root, source):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    write(source / "train" / "a" / "0.png", wide)
    exact = noise(1, 10, 10, 3)[0]
    write(source / "train" / "a" / "1.jpg", exact)
    write(source / "train" / "a" / "2.jpg", noise(1, 40, 20, 3)[0])
    write(source / "val" / "a" / "0.png", exact)
    index = pack(source, size=10)
    stored = [data for _, data, _ in read_split(index, "train")]
    assert (source / "train" / "a" / "1.jpg").read_bytes() in stored
    assert sorted(data[:2] for data in stored) == [b"\x89P", b"\xff\xd8", b"\xff\xd8"]
    scaled = next(image for image in read(index, "train")[0] if image[:, 2:-2].min() == 255)
    assert scaled.shape == (10, 10, 3)


def test_other_files_are_skipped_and_counted(root, source, tmp_path, said):
    write_tree(source)
    outside = tmp_path / "outside"
    write(outside / "0.png", noise(1, 9, 8, 3)[0])
    (source / "README.md").write_text("beside the splits, not looked at")
    (source / "train" / "notes.txt").write_text("")
    (source / "train" / ".cache").mkdir()
    (source / "train" / "ant" / ".hidden.png").write_text("")
    (source / "train" / "ant" / "labels.csv").write_text("")
    (source / "train" / "ant" / "deeper.png").mkdir()
    (source / "train" / "ant" / "link.png").symlink_to(outside / "0.png")
    (source / "train" / "ant" / "dangling.png").symlink_to("nowhere.png")
    (source / "train" / "cow").symlink_to(outside)
    os.mkfifo(source / "train" / "ant" / "pipe.png")
    (source / "train" / "bee" / "copy.png").symlink_to("../ant/0.png")
    index = pack(source, said)
    assert index.splits["train"].class_counts == (6, 7)
    train = source / "train"
    told = [
        f"{source}: the train split is train, the val split is val",
        f"left out: 2 x hidden entry: such as {train}/.cache",
        f"left out: 1 x link to a folder outside (take it with --follow-links): {train}/cow",
        f"left out: 1 x .txt file: {train}/notes.txt",
        f"left out: 1 x broken link: {train}/ant/dangling.png",
        f"left out: 1 x sub-folder of a class: {train}/ant/deeper.png",
        f"left out: 1 x .csv file: {train}/ant/labels.csv",
        f"left out: 1 x link to a file outside (take it with --follow-links): {train}/ant/link.png",
        f"left out: 1 x pipe, socket or device: {train}/ant/pipe.png",
    ]
    assert said == told * 2  # at the beginning and at the end


def remove_class(source):
    for path in (source / "train" / "bee").iterdir():
        path.unlink()
    (source / "train" / "bee").rmdir()


def empty_class(source):
    (source / "train" / "cow").mkdir()


def corrupt(source):
    (source / "train" / "bee" / "3.png").write_bytes(b"not a picture")


def cut(source):
    os.truncate(source / "train" / "bee" / "3.png", 70)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (remove_class, r"val/bee: train does not have this class; add it there or remove it here"),
        (empty_class, r"train/cow: has no images; add some or remove the folder"),
        (corrupt, r"train/bee/3\.png: damaged, or not an image.*; repair or remove it"),
        (cut, r"train/bee/3\.png: .*; repair or remove it"),
    ],
)
def test_wrong_folder_is_named_with_the_remedy(root, source, break_it, message):
    write_tree(source)
    break_it(source)
    with pytest.raises(DataError, match=message) as caught:
        pack(source)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)
    assert not (root / "mine").exists()


def test_layout_is_explained(root, source, tmp_path):
    for folder in (tmp_path / "nowhere", source):
        with pytest.raises(DataError, match=r"expected .*/train/<class>/<image files> .*--val-fraction"):
            pack(folder)
    with pytest.raises(DataError, match="has no class folders; expected"):
        pack(source, val_fraction=0.1)
    write_tree(source, ("train",))
    with pytest.raises(DataError, match=r"has no folder val, .* or test; add one or use --val-fraction"):
        pack(source)
    (source / "val").mkdir()
    with pytest.raises(DataError, match=r"val: has no class folders"):
        pack(source)
    with pytest.raises(UsageError, match="leave out --val-fraction"):
        pack(source, val_fraction=0.1)


def test_split_folder_may_not_leave(root, source, tmp_path):
    write_tree(tmp_path / "elsewhere")
    write_tree(source, ("train",))
    (source / "val").symlink_to(tmp_path / "elsewhere" / "val")
    with pytest.raises(DataError, match=r"val: this link leaves .*source"):
        pack(source)


def test_single_image_cannot_be_split(root, source):
    write(source / "ant" / "0.png", noise(1, 4, 4)[0])
    with pytest.raises(DataError, match=r"0\.png: the only image of 'ant'"):
        pack(source, val_fraction=0.5)


OUT_OF_RANGE = [{"size": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"name": "a/b"}]


@pytest.mark.parametrize("options", OUT_OF_RANGE)
def test_arguments_out_of_range(root, source, options):
    write_tree(source)
    with pytest.raises(UsageError) as caught:
        pack(source, **options)
    assert caught.value.exit_code == 2


def test_existing_name_needs_force(root, source):
    write_tree(source)
    first = pack(source)
    with pytest.raises(
        DataError, match=r"mine: already exists; replace it with --force or choose another name"
    ):
        pack(source, seed=1)
    assert load_index("mine", None) == first
    assert pack(source, seed=1, force=True).digest != first.digest


# --- What is left out, and what is taken ------------------------------------------------------------


def test_links_are_followed_if_asked(root, source, tmp_path, said):
    disk = tmp_path / "disk"
    write_tree(disk)
    write_tree(source, classes=("ant",), count=2)
    (source / "train" / "ant" / "more.png").symlink_to(disk / "train" / "bee" / "0.png")
    (source / "train" / "bee").symlink_to(disk / "train" / "bee")
    index = pack(source, said, name="without")
    assert index.splits["train"].class_counts == (2,)
    (source / "val").rename(source / "old")
    (source / "val").symlink_to(disk / "val")
    with pytest.raises(DataError, match=r"val: this link leaves .* --follow-links"):
        pack(source)
    index = pack(source, said, follow_links=True)
    assert index.classes == ("ant", "bee")
    assert [index.splits[split].class_counts for split in ("train", "val")] == [(3, 6), (6, 6)]


def test_images_in_sub_folders_are_counted(root, source, said):
    write_tree(source)
    for i, image in enumerate(noise(3, 9, 8, 3)):
        write(source / "train" / "ant" / "2019" / f"{i}.png", image)
    pack(source, said)
    place = source / "train" / "ant" / "2019"
    assert said[1:3] == [
        f"left out: 1 x sub-folder of a class: {place}",
        f"left out: 3 x image in a sub-folder of a class (move it up): such as {place}/0.png",
    ]
    for path in (source / "train" / "ant").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"ant: has no images; .* 3 x image in a sub-folder of a class"):
        pack(source, name="none")


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "mpo"])
def test_every_suffix_of_jpeg_is_taken(root, source, suffix):
    write_tree(source)
    write(source / "train" / "ant" / f"9.{suffix}", noise(1, 9, 8, 3)[0], format="JPEG")
    index = pack(source)
    assert index.splits["train"].class_counts == (7, 6)
    kept = (source / "train" / "ant" / f"9.{suffix}").read_bytes()
    assert kept in {data for _, data, _ in read_split(index, "train")}


@pytest.mark.parametrize("val", ["valid", "validation", "dev"])
def test_the_val_split_has_several_names_and_comes_before_test(root, source, said, val):
    write_tree(source, ("train", val, "test", "extra"))
    (source / val / "ant" / "0.png").unlink()
    index = pack(source, said)
    assert index.splits["val"].class_counts == (5, 6)
    assert said[0] == (f"{source}: the train split is train, the val split is {val}; left out: extra, test")


def test_folders_of_systems_and_empty_classes_of_val_end_nothing(root, source, said):
    write_tree(source)
    (source / "val" / "cow").mkdir()
    for name in ("@eaDir", "__MACOSX", "lost+found"):
        for split in ("train", "val"):
            write(source / split / name / "0.png", noise(1, 9, 8, 3)[0])
        write(source / "train" / "ant" / name / "0.png", noise(1, 9, 8, 3)[0])
    index = pack(source, said)
    assert index.classes == ("ant", "bee")
    assert index.splits["train"].class_counts == (6, 6)
    assert f"left out: 1 x empty class folder of val: {source}/val/cow" in said
    assert sum("of the system" in line for line in said) == 6


def test_a_class_whose_name_is_not_utf8_is_refused(root, source):
    write_tree(source)
    (source / "train" / "bee").rename(source / "train" / os.fsdecode(b"be\xe9"))
    with pytest.raises(
        DataError, match=r"train/be\\xe9: the name of this class is not UTF-8; rename"
    ) as caught:
        pack(source)
    assert str(caught.value).isprintable()
    assert not root.exists()


def test_an_image_whose_name_is_not_utf8_is_packed(root, source, said):
    write_tree(source)
    path = source / "train" / "bee" / "3.png"
    path.rename(path.with_name(os.fsdecode(b"\xe9.png")))
    (source / "train" / os.fsdecode(b"\xe9.txt")).touch()
    assert pack(source, said).splits["train"].class_counts == (6, 6)
    assert all(line.isprintable() for line in said)


# --- Broken images ----------------------------------------------------------------------------------


@pytest.fixture
def broken(source):
    """Three broken files: no image, a header alone, and one cut off."""
    write_tree(source, count=9)
    corrupt(source)
    cut(source)
    paths = [source / "train" / "ant" / "2.png", source / "train" / "bee" / "3.png"]
    paths[0].write_bytes(b"no picture")
    paths.append(source / "val" / "ant" / "1.png")
    paths[2].write_bytes(paths[2].read_bytes()[:-60])
    return {str(path) for path in paths}


def test_all_broken_images_are_told_in_one_run(root, source, broken):
    with pytest.raises(
        DataError, match=r"3 bad images, such as .*; .*mine\.bad\.txt lists all; repair"
    ) as caught:
        pack(source)
    assert "--skip" in str(caught.value)
    lines = [line.split("\t") for line in (root / "mine.bad.txt").read_text().splitlines()]
    assert {path for path, _ in lines} == broken
    assert all(why for _, why in lines)
    assert not (root / "mine").exists()
    for path in broken:
        os.unlink(path)  # noqa: PTH108
    assert sum(split.samples for split in pack(source).splits.values()) == 33
    assert sorted(path.name for path in root.iterdir()) == ["mine"]


def test_broken_images_are_left_out_if_asked(root, source, broken, said):
    folder = imagefolder.pack_folder(source, "mine", None, Options(skip=True, say=said.append)).folder
    index = load_index("mine", None)
    assert [index.splits[split].class_counts for split in ("train", "val")] == [(8, 8), (8, 9)]
    assert verify(index) == []
    assert any(line.startswith("left out: 3 bad images, such as ") for line in said)
    assert len((folder.parent / "mine.bad.txt").read_text().splitlines()) == 3


def test_a_whole_class_is_never_left_out(root, source):
    write_tree(source)
    for path in (source / "train" / "bee").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="every image of the class bee is bad"):
        imagefolder.pack_folder(source, "mine", None, Options(skip=True))
    for path in (source / "train" / "ant").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="every image of the train split is bad"):
        imagefolder.pack_folder(source, "mine", None, Options(skip=True))
    assert not (root / "mine").exists()


def test_through_the_command_line(disttrain, root, source, broken):
    (source / "val").rename(source / "valid")
    (source / "train" / "bee" / "notes.txt").touch()
    result = disttrain("data", "pack", source, "--name", "mine", "--root", root)
    assert result.returncode == 65
    assert (
        f"{root}/mine.bad.txt lists all; repair or remove them, or leave them out with --skip"
        in result.stderr
    )
    result = disttrain("data", "pack", source, "--name", "mine", "--root", root, "--skip")
    assert result.returncode == 0, result.stderr
    told = [
        f"{source}: the train split is train, the val split is valid",
        f"left out: 1 x .txt file: {source}/train/bee/notes.txt",
    ]
    lines = result.stdout.splitlines()
    assert lines[:2] == told
    assert lines[lines.index(f"mine: {root}/mine") - 2 :][:2] == told
    assert disttrain("data", "verify", "mine", "--root", root).returncode == 0
