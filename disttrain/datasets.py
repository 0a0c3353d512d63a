"""Turns original files into samples and has them packed: digits, MNIST, CIFAR-10, or a folder of images.

What a packed data set looks like on disk is the business of `shards`.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import importlib.resources
import io
import itertools
import math
import os
import socket
import struct
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from disttrain import shards
from disttrain.errors import DataError, UsageError
from disttrain.shards import Index, Pixels, Progress, Sample

Say = Callable[[str], None]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_DIGITS = tuple("0123456789")
_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError)  # what reading a broken archive raises
_DOWNLOAD_TIMEOUT_S = 30.0

_Splits = Mapping[str, Iterable[Sample]]


def prepare(
    name: str,
    *,
    source: Path | None,
    root: str | None,
    force: bool = False,
    say: Say,
    on_progress: Progress | None = None,
) -> Index:
    """Makes a known data set, unless it is there and its shards are what its index says.

    Args:
        name: digits, mnist or cifar10.
        source: folder of the original files; None downloads them (digits needs neither).
        root: as for `shards.data_root`.
        force: make it again even if it is there.
        say: takes lines for the user.
        on_progress: as for `shards.pack`.

    Raises:
        UsageError: there is no such data set.
        DataError: the original files are missing or damaged, or cannot be downloaded.
        StorageError: a write failed.
    """
    if name not in shards.BUILT_IN:
        close = difflib.get_close_matches(name, shards.BUILT_IN, 1)
        raise UsageError(
            f"{name!r} is not one of {', '.join(shards.BUILT_IN)}"
            + (f"; did you mean {close[0]}?" if close else "")
            + "; for a folder of your own images use `disttrain data pack DIR --name NAME`"
        )
    if source is not None and name == "digits":
        raise UsageError("digits comes with disttrain; leave out --source")
    if source is not None and not source.exists():
        raise DataError(f"{source}: no such folder; give the folder of the {name} files with --source")
    overwrite = force
    if not force and shards.data_folder(name, root).exists():
        try:
            index = _intact(name, root)
        except DataError as error:
            say(str(error).partition("; make ")[0] + "; making it again")
            overwrite = True
        else:
            say(f"{name} is prepared already: {index.folder}")
            return index
    if name == "cifar10" and source is not None and _is_tree(source):
        tree = _scan_tree(source, None, 0, say)
        _check_cifar_tree(source, tree)
        return _pack_tree(tree, name, root, None, overwrite, on_progress)
    splits: _Splits
    channels: Literal[1, 3] = 1
    if name == "digits":
        classes, splits = _DIGITS, _digits()
    elif name == "mnist":
        classes, splits = _DIGITS, _mnist(source, root, say)
    else:
        classes, splits, channels = CIFAR10_CLASSES, _cifar10(source, root, say), 3
    return shards.pack(
        name, root, splits, classes, channels=channels, overwrite=overwrite, on_progress=on_progress
    )


def pack_folder(
    folder: Path,
    *,
    name: str,
    root: str | None,
    size: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    force: bool = False,
    say: Say,
    on_progress: Progress | None = None,
) -> Index:
    """Packs a folder of images: DIR/{train,val|test}/<class>/<files>, or DIR/<class>/<files> to be split.

    The classes are the sorted folder names; the images are shuffled, in an order that depends on the seed
    and the names alone. PNG, JPEG and WebP files of upright 8-bit gray or RGB pixels keep their bytes;
    anything else Pillow reads becomes PNG. The data set is gray if every image is.

    Args:
        folder: the images. Hidden files, other files and links that leave the folder are skipped.
        name: the new data set.
        root: as for `shards.data_root`.
        size: side in pixels; the shorter side of an image is resized to it and the middle cut out
            (JPEG files become JPEG of quality 95, others PNG). None: all images must have one size.
        val_fraction: share of each class that becomes the val split, when the folder has none.
        seed: of the order and of the split.
        force: replace an existing data set.
        say: takes lines for the user.
        on_progress: as for `shards.pack`.

    Raises:
        DataError: the folder has not the expected layout, an image is broken, or the sizes differ.
        UsageError: an argument is out of range or does not fit the folder.
        StorageError: a write failed.
    """
    target = shards.data_folder(name, root)
    if target.exists() and not force:
        raise DataError(f"{target}: exists; replace it with --force or choose another name")
    if size is not None and size < 1:
        raise UsageError(f"--size {size}: must be at least 1")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: must be between 0 and 1")
    tree = _scan_tree(folder, val_fraction, seed, say)
    if size is None and len(tree.sizes) > 1:
        (one, first), (other, second) = list(tree.sizes.items())[:2]
        raise DataError(
            f"images of different sizes: {first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]}; "
            f"give one size with --size N, for example --size {min(min(one), min(other))}"
        )
    return _pack_tree(tree, name, root, size, force, on_progress)


def _intact(name: str, root: str | None) -> Index:
    index = shards.load_index(name, root)
    for split in index.splits.values():
        for shard in split.shards:
            shards.check_shard(index, shard)
    return index


# --- Arrays -----------------------------------------------------------------------------------------


def _array_samples(images: Pixels, labels: Iterable[int]) -> Iterator[Sample]:
    """Yields PNG samples of uint8 [N, H, W] or [N, H, W, 3]."""
    for image, label in zip(images, labels, strict=True):
        yield Sample(_encode(image, "PNG"), "png", int(label))


def _encode(pixels: Pixels, image_format: Literal["PNG", "JPEG"]) -> bytes:
    file = io.BytesIO()
    _as_picture(pixels).save(file, image_format, quality=95, subsampling=0)  # PNG ignores the two
    return file.getvalue()


def _as_picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _digits() -> _Splits:
    """Every fifth of the 1,797 digits, counted through the classes, is for validation."""
    file = io.BytesIO(importlib.resources.files("disttrain").joinpath("assets/digits.npz").read_bytes())
    with np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    is_val = np.zeros(len(labels), bool)
    is_val[np.argsort(labels, kind="stable")[4::5]] = True
    return {
        "train": _array_samples(images[~is_val], labels[~is_val]),
        "val": _array_samples(images[is_val], labels[is_val]),
    }


# --- MNIST ------------------------------------------------------------------------------------------

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _mnist(source: Path | None, root: str | None, say: Say) -> _Splits:
    files = [f"{name}.gz" for pair in _MNIST_FILES.values() for name in pair]
    if source is None:
        import torchvision

        with _downloading("mnist", "12 MB", files, root, say) as downloads:
            torchvision.datasets.MNIST(downloads, download=True)
        source = downloads
    return {split: _mnist_split(source, names, files) for split, names in _MNIST_FILES.items()}


def _mnist_split(source: Path, names: tuple[str, str], files: Sequence[str]) -> Iterator[Sample]:
    images_file, labels_file = (_find_idx(source, name, files) for name in names)
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_file}: images of {images.shape[2]}x{images.shape[1]}; MNIST has 28x28")
    if len(images) != len(labels):
        raise DataError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file}")
    _check_labels(labels, labels_file)
    return _array_samples(images, labels)


def _find_idx(source: Path, name: str, files: Sequence[str]) -> Path:
    for folder in (source, source / "MNIST" / "raw", source / "raw"):
        for stem in (name, name.replace("-idx", ".idx")):
            for path in (folder / stem, folder / f"{stem}.gz"):
                if path.is_file():
                    return path
    raise DataError(f"{source}: has no {name}; expected the files {', '.join(files)} (or without .gz)")


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """Reads an IDX file of unsigned bytes, gzipped or not."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; get it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > 2**31:
                raise DataError(f"{path}: claims {size} bytes of data; get it again")
            data = file.read(size + 1)  # one more than there should be
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}; get it again") from None
    if len(data) != size:
        more = "more" if len(data) > size else str(len(data))
        raise DataError(f"{path}: {more} bytes of data where its header says {size}; get it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_labels(labels: npt.NDArray[np.uint8], path: Path | str) -> None:
    if len(labels) == 0:
        raise DataError(f"{path}: holds no samples; get it again")
    if labels.max() > 9:
        raise DataError(f"{path}: label {labels.max()} at {int(labels.argmax())}; expected 0 to 9")


# --- CIFAR-10 ---------------------------------------------------------------------------------------

_CIFAR_PYTHON = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
_CIFAR_BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
_CIFAR_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_MAX_BATCH_BYTES = 2**26  # twice that of the real ones


def _cifar10(source: Path | None, root: str | None, say: Say) -> _Splits:
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
        f"{source}: has none of {', '.join((*_CIFAR_PYTHON, *_CIFAR_BINARY))}, "
        "nor folders train/<class>/ and test/<class>/ of images"
    )


def _extract(archive: Path, folder: str, target: Path) -> None:
    """Takes the regular files of one folder out of an archive, and nothing else."""
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
        raise DataError(f"{archive}: cannot be read: {_reason(error)}; get it again") from None


def _cifar_python(source: Path) -> _Splits:
    """Reads the pickled version; torchvision checks the MD5 of every file before it unpickles it."""
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy deprecates what the pickles of 2009 say
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
    return {split: _array_samples(data.data, data.targets) for split, data in splits.items()}


def _cifar_binary(source: Path) -> _Splits:
    """Reads the binary version: records of a label and the planes of red, green and blue, 32x32 each."""
    splits: dict[str, Iterable[Sample]] = {}
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
        splits[split] = _array_samples(images, table[:, 0])
    return splits


def _check_cifar_tree(source: Path, tree: _Tree) -> None:
    if tree.classes != CIFAR10_CLASSES:
        raise DataError(
            f"{source}: the classes are {', '.join(tree.classes[:12])}, but those of CIFAR-10 are "
            f"{', '.join(CIFAR10_CLASSES)}; for others use `disttrain data pack {source} --name NAME`"
        )
    for (width, height), file in tree.sizes.items():
        if (width, height) != (32, 32):
            raise DataError(f"{file} is {width}x{height}, but the images of CIFAR-10 are 32x32")


@contextlib.contextmanager
def _downloading(name: str, size: str, files: Sequence[str], root: str | None, say: Say) -> Iterator[Path]:
    """Runs a download of torchvision in silence; a failure says what to do without a network."""
    downloads = shards.data_root(root) / "downloads"
    say(f"downloading {name} ({size}) into {downloads}")
    old_timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            yield downloads
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        command = shards.remedy(name, shards.data_root(root)).rstrip("`") + " --source FOLDER`"
        raise DataError(
            f"{name}: the download failed ({_reason(error)}); put {', '.join(files)} into a folder of your "
            f"choice and run {command}"
        ) from None
    finally:
        socket.setdefaulttimeout(old_timeout_s)


# --- Folders of images ------------------------------------------------------------------------------

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: JPEG files of some phones
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_LAYOUT = (
    "expected {0}/train/<class>/<image files> and {0}/val/<class>/... (or test), "
    "or {0}/<class>/<image files> with --val-fraction"
)

_Files = list[tuple[str, int]]
"""Path and label of each image, sorted by class and name."""


class _Header(NamedTuple):
    """What the first bytes of an image file tell."""

    extension: str
    """Its format if that may be in a shard, else empty."""
    plain: bool
    """Upright, 8 bits, gray or RGB: every reader sees the same pixels."""
    gray: bool
    size: tuple[int, int]
    """Width and height when upright."""


class _Picture(NamedTuple):
    """An image file before it is read."""

    file: str
    label: int
    extension: str
    plain: bool


class _Tree(NamedTuple):
    """What a folder of images holds."""

    classes: tuple[str, ...]
    splits: dict[str, list[_Picture]]
    """In the order in which they are packed."""
    sizes: dict[tuple[int, int], str]
    """Every width and height, with the first file that has it."""
    channels: Literal[1, 3]


def _is_tree(source: Path) -> bool:
    return (source / "train").is_dir()


def _scan_tree(folder: Path, val_fraction: float | None, seed: int, say: Say) -> _Tree:
    """Lists a folder of images, reads their headers, and settles split and order."""
    skipped: list[str] = []
    classes, listing = _list_tree(folder, val_fraction, skipped)
    if skipped:
        say(f"{folder}: skipped {len(skipped):,} entries that are no images, such as {skipped[0]}")
    rng = np.random.default_rng(seed)
    if val_fraction is not None:
        listing = _split_off(listing["train"], classes, val_fraction, rng)
    splits: dict[str, list[_Picture]] = {}
    sizes: dict[tuple[int, int], str] = {}
    gray = True
    for split, files in listing.items():
        pictures = []
        headers = shards.map_in_threads(_read_header, (file for file, _ in files))
        for (file, label), header in zip(files, headers, strict=True):
            pictures.append(_Picture(file, label, header.extension, header.plain))
            sizes.setdefault(header.size, file)
            gray = gray and header.gray
        splits[split] = [pictures[i] for i in rng.permutation(len(pictures))]
    return _Tree(classes, splits, sizes, 1 if gray else 3)


def _list_tree(
    folder: Path, val_fraction: float | None, skipped: list[str]
) -> tuple[tuple[str, ...], dict[str, _Files]]:
    """Returns the classes and the images of every split; what is neither is added to `skipped`."""
    inside = folder.resolve()
    classes: tuple[str, ...] = ()
    listing: dict[str, _Files] = {}
    for split, split_folder in _split_folders(folder, val_fraction).items():
        if not split_folder.resolve().is_relative_to(inside):
            raise DataError(f"{split_folder}: a link that leaves {folder}; put the images there")
        class_folders = _entries(split_folder, inside, skipped, lambda entry: entry.is_dir())
        if not class_folders:
            raise DataError(f"{split_folder}: has no class folders; {_LAYOUT.format(folder)}")
        classes = classes or tuple(entry.name for entry in class_folders)  # those of train, which is first
        listing[split] = []
        for class_folder in class_folders:
            if class_folder.name not in classes:
                raise DataError(
                    f"{class_folder.path}: a class that train does not have; add it there or remove it"
                )
            images = _entries(Path(class_folder.path), inside, skipped, _is_image_file)
            if not images:
                raise DataError(f"{class_folder.path}: has no images; add some or remove the folder")
            label = classes.index(class_folder.name)
            listing[split] += [(image.path, label) for image in images]
    return classes, listing


def _split_folders(folder: Path, val_fraction: float | None) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {_LAYOUT.format('DIR')}")
    if not _is_tree(folder):
        if val_fraction is None:
            raise DataError(f"{folder}: has no folder train; {_LAYOUT.format(folder)}")
        return {"train": folder}
    train = {"train": folder / "train"}
    val = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if val is None:
        if val_fraction is None:
            raise DataError(f"{folder}: has no folder val or test; add one or use --val-fraction")
        return train
    if val_fraction is not None:
        raise UsageError(f"{val} is the val split already; leave out --val-fraction")
    return train | {"val": val}


def _entries(
    folder: Path, inside: Path, skipped: list[str], wanted: Callable[[os.DirEntry[str]], bool]
) -> list[os.DirEntry[str]]:
    """Returns the wanted entries sorted by name, without hidden ones and links that lead outside."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                hidden = entry.name.startswith(".")
                leaves = entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside)
                if hidden or leaves or not wanted(entry):
                    skipped.append(entry.path)
                else:
                    found.append(entry)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}; check its permissions") from None
    return found


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(_SUFFIXES) and entry.is_file()


def _split_off(
    files: _Files, classes: Sequence[str], fraction: float, rng: np.random.Generator
) -> dict[str, _Files]:
    """Takes the same share of every class, at least one image and never all, for validation."""
    listing: dict[str, _Files] = {"train": [], "val": []}
    for label, members in itertools.groupby(files, key=lambda item: item[1]):
        of_class = list(members)
        if len(of_class) < 2:
            raise DataError(f"{of_class[0][0]}: the only image of {classes[label]!r}; a split needs two")
        count = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        chosen = set(rng.permutation(len(of_class))[:count].tolist())
        for i, item in enumerate(of_class):
            listing["val" if i in chosen else "train"].append(item)
    return listing


def _read_header(file: str) -> _Header:
    try:
        with Path(file).open("rb") as stream, shards.open_image(stream) as picture:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow raises anything on a broken file
        raise _broken(file, error) from None
    extension = _EXTENSIONS.get(picture.format or "", "")
    turned = orientation in range(5, 9)
    return _Header(
        extension=extension,
        plain=bool(extension) and picture.mode in ("L", "RGB") and orientation not in range(2, 9),
        gray=picture.mode in _GRAY_MODES,
        size=(picture.height, picture.width) if turned else picture.size,
    )


def _pack_tree(
    tree: _Tree,
    name: str,
    root: str | None,
    size: int | None,
    overwrite: bool,
    on_progress: Progress | None,
) -> Index:
    splits = {
        split: shards.map_in_threads(lambda picture: _load(picture, tree.channels, size), pictures)
        for split, pictures in tree.splits.items()
    }
    return shards.pack(
        name, root, splits, tree.classes, channels=tree.channels, overwrite=overwrite, on_progress=on_progress
    )


def _load(picture: _Picture, channels: int, size: int | None) -> Sample:
    """Reads an image file; its bytes are kept if they are plain and of the right size."""
    try:
        image = Path(picture.file).read_bytes()
        kept = Sample(image, picture.extension, picture.label, picture.file)
        if picture.plain and size is None:
            return kept
        pixels = shards.decode_image(image, channels)
    except (OSError, ValueError) as error:
        raise _broken(picture.file, error) from None
    if size is None:
        return kept._replace(image=_encode(pixels, "PNG"), extension="png")
    if picture.plain and pixels.shape[:2] == (size, size):
        return kept
    pixels = np.asarray(ImageOps.fit(_as_picture(pixels), (size, size), Image.Resampling.BICUBIC))
    if picture.extension == "jpg":
        return kept._replace(image=_encode(pixels, "JPEG"))
    return kept._replace(image=_encode(pixels, "PNG"), extension="png")


def _broken(file: str, error: Exception) -> DataError:
    return DataError(f"{file}: {_reason(error)}; repair or remove it")


def _reason(error: BaseException) -> str:
    """Returns the reason on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
