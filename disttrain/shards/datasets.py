"""Makes the built-in data sets, digits, MNIST and CIFAR-10, from their original files.

`imagefolder` packs folders of images; `pack` and `writer` own the format on disk.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import importlib.resources
import io
import math
import socket
import struct
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from disttrain.errors import DataError, UsageError, reason
from disttrain.shards.foldertree import is_tree, list_tree
from disttrain.shards.imagefolder import Tree, scan_tree
from disttrain.shards.images import Pixels, encode_image
from disttrain.shards.index import BUILT_IN, Index, data_folder, data_root, load_index, make_command
from disttrain.shards.origin import existing_tar
from disttrain.shards.pack import Options, Source, pack
from disttrain.shards.reader import open_shard
from disttrain.shards.writer import Sample

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_DIGITS = tuple("0123456789")
_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError)  # errors from a broken archive
_DOWNLOAD_TIMEOUT_S = 30.0

_Splits = Mapping[str, Source]


def prepare(name: str, source: Path | None, root: str | None, options: Options) -> Index:
    """Makes a built-in data set, unless it exists and its shards match its index.

    Args:
        name: digits, mnist or cifar10.
        source: folder of the original files; None downloads them (digits needs neither).
        root: see `data_root`.
        options: see `pack`; `force` makes the data set again even if it exists.

    Raises:
        UsageError: there is no such data set.
        DataError: the original files are missing or damaged, or the download failed.
        StorageError: a write failed.
    """
    if name not in BUILT_IN:
        close = difflib.get_close_matches(name, BUILT_IN, 1)
        raise UsageError(
            f"{name!r} is not one of {', '.join(BUILT_IN)}"
            + (f"; did you mean {close[0]}?" if close else "")
            + "; for your own images use `disttrain data pack DIR --name NAME`"
        )
    if source is not None and name == "digits":
        raise UsageError("digits comes with disttrain; leave out --source")
    if source is not None and not source.exists():
        raise DataError(f"{source}: no such folder; give the folder of the {name} files with --source")
    say = options.say
    if not options.force and data_folder(name, root).exists():
        try:
            index = _intact(name, root)
        except DataError as error:
            if existing_tar(data_folder(name, root)):
                raise
            say(str(error).partition("; make ")[0] + "; making it again")
            options = replace(options, force=True)
        else:
            say(f"{name} is already prepared: {index.folder}")
            return index
    if name == "digits":
        return pack(name, root, _digits(), _DIGITS, 1, options)
    if name == "mnist":
        return pack(name, root, _mnist(source, root, say), _DIGITS, 1, options)
    if source is None or not is_tree(source):
        return pack(name, root, _cifar10(source, root, say), CIFAR10_CLASSES, 3, options)
    tree = scan_tree(list_tree(source, None), None, 0, say)
    _check_cifar_tree(source, tree)
    return pack(name, root, tree.sources(), tree.classes, tree.channels, options)


def _intact(name: str, root: str | None) -> Index:
    index = load_index(name, root)
    for name, split in index.splits.items():
        for number in range(len(split.shards)):
            open_shard(index, name, number)
    return index


# --- Arrays -----------------------------------------------------------------------------------------


class _Arrays:
    """Images in memory, uint8 [N, H, W] or [N, H, W, 3], to be packed as PNG files."""

    def __init__(self, images: Pixels, labels: Sequence[int] | npt.NDArray[np.uint8]) -> None:
        assert len(images) == len(labels)
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def load(self, number: int) -> Sample:
        """Returns a sample."""
        return Sample(encode_image(self._images[number], "PNG"), "png", int(self._labels[number]))

    def size(self, number: int) -> int:
        """Returns the size of the pixels in bytes; the PNG of a small image is about as large."""
        return int(self._images[number].size)

    def sample_fingerprint(self, number: int) -> None:
        """Returns None, because the samples are in memory."""


def _digits() -> _Splits:
    """Returns the splits of the 1,797 digits; every fifth of each class, in turn, is for validation."""
    file = io.BytesIO(importlib.resources.files("disttrain").joinpath("assets/digits.npz").read_bytes())
    with np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    is_val = np.zeros(len(labels), bool)
    is_val[np.argsort(labels, kind="stable")[4::5]] = True
    return {
        "train": _Arrays(images[~is_val], labels[~is_val]),
        "val": _Arrays(images[is_val], labels[is_val]),
    }


# --- MNIST ------------------------------------------------------------------------------------------

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _mnist(source: Path | None, root: str | None, say: Callable[[str], None]) -> _Splits:
    files = [f"{name}.gz" for pair in _MNIST_FILES.values() for name in pair]
    if source is None:
        import torchvision

        with _downloading("mnist", "12 MB", files, root, say) as downloads:
            torchvision.datasets.MNIST(downloads, download=True)
        source = downloads
    return {split: _mnist_split(source, names, files) for split, names in _MNIST_FILES.items()}


def _mnist_split(source: Path, names: tuple[str, str], files: Sequence[str]) -> Source:
    images_file, labels_file = (_find_idx(source, name, files) for name in names)
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_file}: images of {images.shape[2]}x{images.shape[1]}, but MNIST has 28x28")
    if len(images) != len(labels):
        raise DataError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file}")
    _check_labels(labels, labels_file)
    return _Arrays(images, labels)


def _find_idx(source: Path, name: str, files: Sequence[str]) -> Path:
    for folder in (source, source / "MNIST" / "raw", source / "raw"):
        for stem in (name, name.replace("-idx", ".idx")):
            for path in (folder / stem, folder / f"{stem}.gz"):
                if path.is_file():
                    return path
    raise DataError(f"{source}: has no {name}; it must have {', '.join(files)}, with or without .gz")


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """Reads an IDX file of unsigned bytes, with or without gzip."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path}: not a {dimensions}-dimensional IDX file of bytes; get it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > 2**31:
                raise DataError(f"{path}: claims {size} bytes of data; get it again")
            data = file.read(size + 1)  # one more, to detect data after the end
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; get it again") from None
    if len(data) != size:
        found = "more" if len(data) > size else f"only {len(data)}"
        raise DataError(f"{path}: has {found} bytes of data, but its header says {size}; get it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_labels(labels: npt.NDArray[np.uint8], path: Path | str) -> None:
    if len(labels) == 0:
        raise DataError(f"{path}: has no samples; get it again")
    if labels.max() > 9:
        raise DataError(f"{path}: label {labels.max()} at position {int(labels.argmax())}; expected 0 to 9")


# --- CIFAR-10 ---------------------------------------------------------------------------------------

_CIFAR_PYTHON = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
_CIFAR_BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
_CIFAR_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_MAX_BATCH_BYTES = 2**26  # twice the real size


def _cifar10(source: Path | None, root: str | None, say: Callable[[str], None]) -> _Splits:
    if source is None:
        import torchvision

        with _downloading("cifar10", "170 MB", [_CIFAR_PYTHON[1]], root, say) as downloads:
            torchvision.datasets.CIFAR10(downloads, download=True)
        return _cifar_python(downloads)
    if source.name in (*_CIFAR_PYTHON, *_CIFAR_BINARY):
        source = source.parent
    for (folder, archive), read in ((_CIFAR_PYTHON, _cifar_python), (_CIFAR_BINARY, _cifar_binary)):
        if (source / folder).is_dir():
            return read(source)
        if (source / archive).is_file():
            with tempfile.TemporaryDirectory() as scratch:
                _extract(source / archive, folder, Path(scratch) / folder)
                return read(Path(scratch))
    raise DataError(
        f"{source}: not the files of CIFAR-10; it must have one of "
        f"{', '.join((*_CIFAR_PYTHON, *_CIFAR_BINARY))}, or images in train/<class>/ and test/<class>/"
    )


def _extract(archive: Path, folder: str, target: Path) -> None:
    """Extracts only the regular files of one folder from an archive."""
    target.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if not member.isreg() or str(path.parent) != folder:
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise DataError(f"{archive}: {member.name} has {member.size} bytes; get the file again")
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                (target / path.name).write_bytes(content.read())
    except _DAMAGED as error:
        raise DataError(f"{archive}: cannot be read: {reason(error)}; get it again") from None


def _cifar_python(source: Path) -> _Splits:
    """Reads the pickled version; torchvision checks the MD5 of every file before unpickling."""
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pickles of 2009 use deprecated NumPy features
        try:
            splits = {
                "train": torchvision.datasets.CIFAR10(source, train=True),
                "val": torchvision.datasets.CIFAR10(source, train=False),
            }
        except RuntimeError:
            raise DataError(
                f"{source / _CIFAR_PYTHON[0]}: a file is missing or damaged (its MD5 is wrong); "
                f"get {_CIFAR_PYTHON[1]} again"
            ) from None
    return {split: _Arrays(data.data, data.targets) for split, data in splits.items()}


def _cifar_binary(source: Path) -> _Splits:
    """Reads the binary version: records of a label and 32x32 planes of red, green and blue."""
    splits: dict[str, Source] = {}
    for split, batches in _CIFAR_BATCHES.items():
        records = []
        for batch in batches:
            path = source / _CIFAR_BINARY[0] / f"{batch}.bin"
            try:
                data = np.frombuffer(path.read_bytes(), np.uint8)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}; get it again") from None
            if len(data) % 3073:
                raise DataError(f"{path}: {len(data)} bytes are not a whole number of 3073-byte records")
            records.append(data.reshape(-1, 3073))
            _check_labels(records[-1][:, 0], path)
        table = np.concatenate(records)
        images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = _Arrays(images, table[:, 0])
    return splits


def _check_cifar_tree(source: Path, tree: Tree) -> None:
    if tree.classes != CIFAR10_CLASSES:
        raise DataError(
            f"{source}: has the classes {', '.join(tree.classes[:12])}, but CIFAR-10 has "
            f"{', '.join(CIFAR10_CLASSES)}; for other classes use `disttrain data pack {source} --name NAME`"
        )
    for (width, height), file in tree.sizes.items():
        if (width, height) != (32, 32):
            raise DataError(f"{file} is {width}x{height}, but CIFAR-10 has images of 32x32")


@contextlib.contextmanager
def _downloading(
    name: str, size: str, files: Sequence[str], root: str | None, say: Callable[[str], None]
) -> Iterator[Path]:
    """Runs a download of torchvision silently; the error says what to do without a network."""
    downloads = data_root(root) / "downloads"
    say(f"downloading {name} ({size}) into {downloads}")
    old_timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            yield downloads
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        command = make_command(name, data_root(root)).rstrip("`") + " --source FOLDER`"
        raise DataError(
            f"{name}: the download failed ({reason(error)}); put {', '.join(files)} into a folder and run "
            f"{command}"
        ) from None
    finally:
        socket.setdefaulttimeout(old_timeout_s)
