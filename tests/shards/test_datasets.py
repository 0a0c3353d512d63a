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

from disttrain.errors import DataError, UsageError
from disttrain.shards import datasets
from disttrain.shards.pack import Options
from kit.shards import read_split
from kit.sources import noise, read, write


def prepare(name, source=None, said=None, **options):
    say = [].append if said is None else said.append
    return datasets.prepare(name, source, None, Options(say=say, **options))


# --- digits ---------------------------------------------------------------------------------------


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


@pytest.mark.integration
def test_prepared_data_set_is_left_alone(root, said):
    index = prepare("digits")
    before = (index.folder / "index.json").stat().st_ino
    assert prepare("digits", said=said) == index
    assert (index.folder / "index.json").stat().st_ino == before
    assert said == [f"digits is already prepared: {root / 'digits'}"]
    assert prepare("digits", force=True) == index
    assert (index.folder / "index.json").stat().st_ino != before


@pytest.mark.integration
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


# --- MNIST ----------------------------------------------------------------------------------------

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
            rf"source: has no {MNIST[3]}; it must have",
        ),
        (
            damage(MNIST[0], lambda data: data[:-1]),
            rf"{MNIST[0]}: has only 9407 bytes .* says 9408; get it again",
        ),
        (damage(MNIST[0], lambda data: data + b"x"), rf"{MNIST[0]}: has more bytes"),
        (
            damage(MNIST[0], lambda data: b"\0\0\x0d\3" + data[4:]),
            rf"{MNIST[0]}: not a 3-dimensional IDX file",
        ),
        (damage(MNIST[0], lambda data: data[:9]), rf"{MNIST[0]}: not a 3-dimensional IDX file"),
        (damage(MNIST[0], lambda data: data[:4] + b"\xff" * 12), rf"{MNIST[0]}: claims \d+ bytes"),
        (damage(MNIST[1], lambda data: data[:-1] + b"\x0a"), rf"{MNIST[1]}: label 10 at position 11"),
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


# --- Downloads ------------------------------------------------------------------------------------


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


# --- CIFAR-10 -------------------------------------------------------------------------------------

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
    with pytest.raises(DataError, match=r"source: not the files of CIFAR-10; .*cifar-10-binary\.tar\.gz"):
        prepare("cifar10", source)
    folder = source / "cifar-10-batches-bin"
    write_cifar_binary(folder)
    path = folder / "data_batch_2.bin"
    sound = path.read_bytes()
    for data, message in (
        (sound[:-1], "12291 bytes are not a whole number"),
        (b"\x0b" + sound[1:], "label 11 at position 0"),
        (b"", "has no samples"),
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
    with pytest.raises(DataError, match=r"source: has the classes cat, .*`disttrain data pack"):
        prepare("cifar10", source)
    for name in datasets.CIFAR10_CLASSES:
        write(source / "train" / name / "0.png", noise(1, 28, 28, 3)[0])
    with pytest.raises(DataError, match=r"0\.png is 28x28, but CIFAR-10 has images of 32x32"):
        prepare("cifar10", source)
