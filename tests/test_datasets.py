"""Original files become packed data sets: digits, MNIST, CIFAR-10 and folders of images."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttrain.errors import DataError, UsageError
from disttrain.shards import datasets, imagefolder
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from kit.shards import read_split


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, which is the default one."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DISTTRAIN_DATA", str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def said():
    return []


def prepare(name, source=None, said=None, **options):
    say = [].append if said is None else said.append
    return datasets.prepare(name, source, None, Options(say=say, **options))


def pack(folder, said=None, name="mine", force=False, **options):
    say = [].append if said is None else said.append
    return imagefolder.pack_folder(folder, name, None, Options(force, say=say), **options)


def read(index, split):
    """Returns images as uint8 [N, H, W, C] and labels."""
    pairs = [(decode_image(image, index.channels), label) for _, image, label in read_split(index, split)]
    return np.stack([image for image, _ in pairs]), [label for _, label in pairs]


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


# --- digits -----------------------------------------------------------------------------------------


def test_digits_are_the_1797(root):
    index = prepare("digits")
    assert (index.channels, index.height, index.width) == (1, 8, 8)
    assert index.classes == tuple("0123456789")
    assert [index.splits[split].samples for split in ("train", "val")] == [1438, 359]
    counts = np.array([index.splits[split].class_counts for split in ("train", "val")])
    assert counts.sum(axis=0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert set(counts[1].tolist()) <= {34, 35, 36, 37}
    images, labels = read(index, "train")
    assert labels[0] == 0
    expected = [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 sixteenths
    assert images[0, 0, :, 0].tolist() == expected


def test_digits_carry_their_attribution():
    path = Path(datasets.__file__).parents[1] / "assets" / "digits.npz"
    with np.load(path, allow_pickle=False) as arrays:
        attribution = " ".join(arrays["attribution"].tolist())
    assert "Alpaydin" in attribution
    assert "CC BY 4.0" in attribution
    assert path.stat().st_size < 60_000


def test_prepared_data_set_is_left_alone(root, said):
    index = prepare("digits")
    before = (index.folder / "index.json").stat().st_ino
    assert prepare("digits", said=said) == index
    assert (index.folder / "index.json").stat().st_ino == before
    assert said == [f"digits is prepared already: {root / 'digits'}"]
    assert prepare("digits", force=True) == index
    assert (index.folder / "index.json").stat().st_ino != before


def test_damaged_data_set_is_prepared_again(root, said):
    index = prepare("digits")
    path = index.folder / "train-000000.tar"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"x")
    prepare("digits", said=said)
    assert path.read_bytes() == sound
    assert "damaged: its SHA-256" in said[0]
    assert said[0].endswith("making it again")
    assert "\n" not in said[0]


@pytest.mark.parametrize(("name", "hint"), [("mnits", "did you mean mnist"), ("imagenet", "data pack DIR")])
def test_unknown_name(root, name, hint):
    with pytest.raises(UsageError, match="digits, mnist, cifar10") as caught:
        prepare(name)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_digits_need_no_source(root, source):
    with pytest.raises(UsageError, match="leave out --source"):
        prepare("digits", source)


# --- MNIST ------------------------------------------------------------------------------------------

MNIST = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(folder, rename=lambda name: name, count=12):
    folder.mkdir(parents=True, exist_ok=True)
    train, val = noise(count, 28, 28), noise(5, 28, 28, seed=1)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in zip(MNIST, (train, labels, val, labels[:5]), strict=True):
        data = idx(array)
        name = rename(name)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return train, val


@pytest.mark.parametrize(
    ("below", "rename"),
    [
        (".", lambda name: name),
        (".", lambda name: name + ".gz"),
        (".", lambda name: name.replace("-idx", ".idx")),
        ("MNIST/raw", lambda name: name),
    ],
)
def test_mnist_from_its_files(root, source, below, rename):
    train, val = write_mnist(source / below, rename)
    index = prepare("mnist", source)
    for split, expected in (("train", train), ("val", val)):
        images, labels = read(index, split)
        np.testing.assert_array_equal(images[..., 0], expected)
        assert labels == [i % 10 for i in range(len(expected))]


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / MNIST[3]).unlink(),
            rf"source: has no {MNIST[3]}; expected the files",
        ),
        (
            damage(MNIST[0], lambda data: data[:-1]),
            rf"{MNIST[0]}: 9407 bytes .* says 9408; get it again",
        ),
        (damage(MNIST[0], lambda data: data + b"x"), rf"{MNIST[0]}: more bytes"),
        (damage(MNIST[0], lambda data: b"\0\0\x0d\3" + data[4:]), rf"{MNIST[0]}: not an IDX file"),
        (damage(MNIST[0], lambda data: data[:9]), rf"{MNIST[0]}: not an IDX file"),
        (damage(MNIST[0], lambda data: data[:4] + b"\xff" * 12), rf"{MNIST[0]}: claims \d+ bytes"),
        (damage(MNIST[1], lambda data: data[:-1] + b"\x0a"), rf"{MNIST[1]}: label 10 at 11"),
        (damage(MNIST[1], lambda data: idx(np.zeros(3, np.uint8))), rf"{MNIST[1]}: 3 labels for the 12"),
        (damage(MNIST[2], lambda data: idx(noise(5, 8, 8))), rf"{MNIST[2]}: images of 8x8"),
    ],
)
def test_wrong_mnist_file_is_named(root, source, break_it, message):
    write_mnist(source)
    break_it(source)
    with pytest.raises(DataError, match=message) as caught:
        prepare("mnist", source)
    assert caught.value.exit_code == 65
    assert not (root / "mnist").exists()


def test_truncated_and_corrupt_gzip_are_named(root, source):
    write_mnist(source, lambda name: name + ".gz")
    path = source / f"{MNIST[0]}.gz"
    sound = path.read_bytes()
    for data in (sound[: len(sound) // 2], b"no gzip", sound[:30] + b"\xff" * 50 + sound[80:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{MNIST[0]}\.gz: cannot be read: .*; get it again"):
            prepare("mnist", source)


def test_source_that_is_not_there(root, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        prepare("mnist", tmp_path / "nowhere")


# --- Downloads --------------------------------------------------------------------------------------


def test_failed_download_says_what_to_do_by_hand(root, tmp_path, monkeypatch, said, capfd):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"file://{tmp_path}/nowhere/"])
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "url", f"file://{tmp_path}/nowhere/cifar-10-python.tar.gz"
    )
    for name, file in (("mnist", "t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")):
        with pytest.raises(DataError, match=rf"{name}: the download failed") as caught:
            prepare(name, said=said)
        text = str(caught.value)
        assert file in text
        assert f"`disttrain data prepare {name} --source FOLDER`" in text
        assert "\n" not in text
    assert capfd.readouterr() == ("", "")
    assert [line.split()[1] for line in said] == ["mnist", "cifar10"]


def test_mnist_is_downloaded_in_silence(root, source, monkeypatch, capfd):
    import torchvision

    train, _ = write_mnist(source)

    def fetch(url, download_root, filename, md5):
        print(f"Downloading {url}")
        print("100%", file=sys.stderr)
        name = filename.removesuffix(".gz")
        shutil.copy(source / name, Path(download_root) / name)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    images, _ = read(prepare("mnist"), "train")
    np.testing.assert_array_equal(images[..., 0], train)
    assert capfd.readouterr() == ("", "")


# --- CIFAR-10 ---------------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar_binary(folder):
    folder.mkdir(parents=True)
    images = noise(24, 3, 32, 32)
    for number, batch in enumerate(BATCHES):
        records = [bytes([i % 10]) + images[i].tobytes() for i in range(4 * number, 4 * number + 4)]
        (folder / f"{batch}.bin").write_bytes(b"".join(records))
    return images.transpose(0, 2, 3, 1)


def write_cifar_python(folder, monkeypatch):
    """Writes pickles of the layout of the real ones, and has torchvision accept their hashes."""
    import torchvision

    folder.mkdir(parents=True)
    images = noise(24, 3, 32, 32)
    files = {
        batch: {
            "data": images[4 * n : 4 * n + 4].reshape(4, -1),
            "labels": [i % 10 for i in range(4 * n, 4 * n + 4)],
        }
        for n, batch in enumerate(BATCHES)
    } | {"batches.meta": {"label_names": list(datasets.CIFAR10_CLASSES)}}
    hashes = {}
    for name, content in files.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        hashes[name] = hashlib.md5(data).hexdigest()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, hashes[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(cifar, "test_list", [[BATCHES[5], hashes[BATCHES[5]]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": hashes["batches.meta"]})
    return images.transpose(0, 2, 3, 1)


def archive(folder, name):
    """Puts a folder into a tar.gz beside it and removes it."""
    with tarfile.open(folder.parent / name, "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def check_cifar(index, images):
    assert index.classes == datasets.CIFAR10_CLASSES
    for split, part in (("train", slice(0, 20)), ("val", slice(20, 24))):
        decoded, labels = read(index, split)
        np.testing.assert_array_equal(decoded, images[part])
        assert labels == [i % 10 for i in range(24)][part]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_cifar_binary(root, source, packed, direct):
    folder = source / "cifar-10-batches-bin"
    images = write_cifar_binary(folder)
    if packed:
        archive(folder, "cifar-10-binary.tar.gz")
        folder = source / "cifar-10-binary.tar.gz"
    check_cifar(prepare("cifar10", folder if direct else source), images)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_python(root, source, monkeypatch, packed):
    folder = source / "cifar-10-batches-py"
    images = write_cifar_python(folder, monkeypatch)
    if packed:
        archive(folder, "cifar-10-python.tar.gz")
    check_cifar(prepare("cifar10", source), images)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("packed", [False, True])
def test_pickle_of_a_stranger_is_not_opened(root, source, tmp_path, monkeypatch, packed):
    folder = source / "cifar-10-batches-py"
    write_cifar_python(folder, monkeypatch)
    (folder / "data_batch_3").write_bytes(pickle.dumps(_Harmful(str(tmp_path / "harm"))))
    if packed:
        archive(folder, "cifar-10-python.tar.gz")
    with pytest.raises(DataError, match=r"cifar-10-batches-py: .*MD5.*get cifar-10-python\.tar\.gz again"):
        prepare("cifar10", source)
    assert not (tmp_path / "harm").exists()


def test_wrong_cifar_files_are_named(root, source):
    with pytest.raises(DataError, match=r"source: has none of .*cifar-10-binary\.tar\.gz"):
        prepare("cifar10", source)
    folder = source / "cifar-10-batches-bin"
    write_cifar_binary(folder)
    path = folder / "data_batch_2.bin"
    sound = path.read_bytes()
    for data, message in (
        (sound[:-1], "12291 bytes are not a whole number"),
        (b"\x0b" + sound[1:], "label 11 at 0"),
        (b"", "holds no samples"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"data_batch_2\.bin: {message}"):
            prepare("cifar10", source)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read"):
        prepare("cifar10", source)


def test_archive_cannot_write_elsewhere_and_is_checked(root, source, tmp_path):
    path = source / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../harm.bin", "cifar-10-batches-bin/../../harm.bin"):
            info = tarfile.TarInfo(name)
            info.size = 3073
            tar.addfile(info, io.BytesIO(bytes(3073)))
    with pytest.raises(DataError, match=r"data_batch_1\.bin: cannot be read"):
        prepare("cifar10", source)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: cannot be read"):
        prepare("cifar10", source)


def test_cifar_as_a_tree_keeps_the_bytes(root, source):
    images = noise(20, 32, 32, 3)
    for i, image in enumerate(images):
        write(source / ("train" if i < 10 else "test") / datasets.CIFAR10_CLASSES[i % 10] / "0.jpg", image)
    index = prepare("cifar10", source)
    assert index.classes == datasets.CIFAR10_CLASSES
    files = {path.read_bytes() for path in (source / "train").rglob("*.jpg")}
    assert {image for _, image, _ in read_split(index, "train")} == files


def test_cifar_tree_must_be_cifar(root, source):
    for name in ("train/cat", "val/cat"):
        write(source / name / "0.png", noise(1, 32, 32, 3)[0])
    with pytest.raises(DataError, match=r"source: the classes are cat, .*`disttrain data pack"):
        prepare("cifar10", source)
    for name in datasets.CIFAR10_CLASSES:
        write(source / "train" / name / "0.png", noise(1, 28, 28, 3)[0])
    with pytest.raises(DataError, match=r"0\.png is 28x28, but the images of CIFAR-10 are 32x32"):
        prepare("cifar10", source)


# --- Folders of images ------------------------------------------------------------------------------


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


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
        (remove_class, r"val/bee: a class that train does not have; add it there or remove it"),
        (empty_class, r"train/cow: has no images; add some or remove the folder"),
        (corrupt, r"train/bee/3\.png: not a sound image file.*; repair or remove it"),
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
    with pytest.raises(DataError, match=r"val: a link that leaves .*source"):
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
    with pytest.raises(DataError, match=r"mine: exists; replace it with --force or choose another name"):
        pack(source, seed=1)
    assert load_index("mine", None) == first
    assert pack(source, seed=1, force=True).digest != first.digest
