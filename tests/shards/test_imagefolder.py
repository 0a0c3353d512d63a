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
    write(folder / "5.png", picture.quantize(256), transparency=b"\x80")
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


def test_different_sizes_need_size(root, source):
    write_tree(source)
    write(source / "val" / "bee" / "9.png", noise(1, 20, 30, 3)[0])
    with pytest.raises(DataError, match=r"ant/0\.png is 8x9, .*bee/9\.png is 30x20; .*--size 8") as caught:
        pack(source)
    assert caught.value.exit_code == 65
    index = pack(source, size=8)
    assert (index.height, index.width) == (8, 8)


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
    assert len(said) == 1
    assert "skipped 9 " in said[0]
    assert str(source / "train" / ".cache") in said[0]


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
    with pytest.raises(DataError, match="has no folder val or test; add one or use --val-fraction"):
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
