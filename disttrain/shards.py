"""The packed format: index.json and plain WebDataset tars, written, checked and read.

    <root>/<name>/index.json
    <root>/<name>/train-000000.tar ...   val-000000.tar ...

A tar holds `<key>.png|jpg|webp` and `<key>.cls` (the label in decimal) for each sample; the key is the
sample's running number in its split. The index records the shape and statistics of the images and the
size and SHA-256 of every shard, so that a damaged shard is noticed before a sample of it is used. The
same samples give the same bytes. Where the samples come from is the business of `datasets`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pydantic
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from disttrain.errors import DataError, StorageError, UsageError

BUILT_IN = ("digits", "mnist", "cifar10")
"""The data sets that `disttrain data prepare` makes."""

MAX_PIXELS = 8192 * 8192
"""Larger pictures are refused before they are decoded: a file of 10 kB can ask for gigabytes."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try on a file; some of its other readers start programs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_VERSION = 1

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int], None]

_Count = Annotated[int, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_T = TypeVar("_T")
_R = TypeVar("_R")


class Sample(NamedTuple):
    """One encoded image with its label."""

    image: bytes
    """An image file."""
    extension: str
    """Its format: png, jpg or webp."""
    label: int
    """Position in the list of classes."""
    origin: str = ""
    """Where it comes from, for messages; not stored."""


@dataclass(frozen=True)
class Shard:
    """One tar."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name in the folder of the index."""
    samples: _Count
    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Split:
    """The shards of a split, in order."""

    samples: _Count
    shards: tuple[Shard, ...]
    class_counts: tuple[Annotated[int, Field(ge=0)], ...]


@dataclass(frozen=True)
class Index:
    """A packed data set.

    `mean` and `std` are per channel, of the train split's pixels scaled to 0..1; `std` is 0 where a channel
    is constant. `digest` is the SHA-256 of index.json and so, through the hashes in it, of every byte of
    the data set.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Split]
    digest: str


class _IndexFile(pydantic.BaseModel):
    """What index.json holds."""

    version: Literal[1]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    channels: Literal[1, 3]
    height: _Count
    width: _Count
    mean: tuple[_Fraction, ...]
    std: tuple[_Fraction, ...]
    splits: dict[str, Split]


def data_root(root: str | None) -> Path:
    """Returns the folder of the packed data sets.

    Args:
        root: the --root option or data.root; None means $DISTTRAIN_DATA, else the user's cache folder.
    """
    if chosen := root or os.environ.get("DISTTRAIN_DATA"):
        return Path(chosen).expanduser().absolute()
    return user_cache() / "data"


def user_cache() -> Path:
    """Returns the folder of this user's caches: disttrain in $XDG_CACHE_HOME, else in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "disttrain"


def data_folder(name: str, root: str | None) -> Path:
    """Returns the folder of a data set, which need not exist.

    Raises:
        UsageError: the name is not a plain name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not the name of a data set; use letters, digits, '.', '_' and '-', "
            "and give its folder with --root"
        )
    return data_root(root) / name


def remedy(name: str, root: Path, *, force: bool = False) -> str:
    """Returns the command that makes a data set under a root; `force` replaces the one that is there."""
    place = "" if root == data_root(None) else f" --root {shlex.quote(str(root))}"
    if name in BUILT_IN:
        return f"`disttrain data prepare {name}{place}`"
    return f"`disttrain data pack DIR --name {name}{place}{' --force' if force else ''}`"


# --- The index --------------------------------------------------------------------------------------


def load_index(name: str, root: str | None) -> Index:
    """Reads the index of a data set and checks that its shards are there in full size.

    Args:
        name: a folder under the root.
        root: as for `data_root`.

    Raises:
        DataError: the data set is missing or damaged; the message names the file and the remedy.
        UsageError: the name is not a plain name.
    """
    folder = data_folder(name, root)
    path = folder / "index.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing(name, folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    again = f"make the data set again with {remedy(name, folder.parent, force=True)}"
    try:
        content = _IndexFile.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise DataError(f"{path}: {_first_problem(error)}; {again}") from None
    if problem := _contradiction(content):
        raise DataError(f"{path}: {problem}; {again}")
    for shard in itertools.chain.from_iterable(split.shards for split in content.splits.values()):
        if problem := _size_problem(folder / shard.file, shard):
            raise DataError(f"{problem}; {again}")
    fields = {field: getattr(content, field) for field in _IndexFile.model_fields if field != "version"}
    return Index(folder=folder, name=name, digest=hashlib.sha256(text).hexdigest(), **fields)


def _missing(name: str, folder: Path) -> str:
    there = sorted(path.parent.name for path in folder.parent.glob("[!.]*/index.json"))
    close = difflib.get_close_matches(name, [*there, *BUILT_IN], 1)
    text = f"{folder / 'index.json'}: there is no data set {name!r}"
    if close and close[0] != name:
        text += f"; did you mean {close[0]}?"
    wanted = close[0] if close and close[0] not in there else name
    found = f"in {folder.parent}: {', '.join(there)}" if there else f"{folder.parent} holds none yet"
    return f"{text}; make it with {remedy(wanted, folder.parent)} ({found})"


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "not valid JSON"
    if first["loc"] == ("version",) and first["type"] != "missing":
        return f"format version {first['input']!r}, but this disttrain reads version {_VERSION}"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _contradiction(content: _IndexFile) -> str | None:
    """Returns what is wrong between the fields of an index, if anything."""
    if not len(content.mean) == len(content.std) == content.channels:
        return f"mean and std must have {content.channels} values, one per channel"
    if "train" not in content.splits:
        return "splits: train is missing"
    for name, split in content.splits.items():
        if len(split.class_counts) != len(content.classes):
            return f"splits.{name}.class_counts: {len(split.class_counts)} for {len(content.classes)} classes"
        total, counted = sum(shard.samples for shard in split.shards), sum(split.class_counts)
        if not split.samples == total == counted:
            return f"splits.{name}: {split.samples} samples, but {total} in shards and {counted} in classes"
    return None


def _size_problem(path: Path, shard: Shard) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: the shard cannot be read: {error.strerror}"
    return None if size == shard.bytes else f"{path}: {size} bytes, but the index says {shard.bytes}"


def _index_bytes(content: _IndexFile) -> bytes:
    return (json.dumps(content.model_dump(mode="json"), indent=1) + "\n").encode()


# --- Writing ----------------------------------------------------------------------------------------


def pack(
    name: str,
    root: str | None,
    splits: Mapping[str, Iterable[Sample]],
    classes: Sequence[str],
    *,
    channels: Literal[1, 3],
    shard_mib: float = 64,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Index:
    """Writes samples as a data set, which appears under its name when it is complete.

    Every image is decoded once: it must be sound and have the shape of the first. Samples are taken as
    they are needed, so that memory stays bounded. When a data set of that name exists, or another process
    makes it meanwhile, the existing one stays: it is returned if it is the same.

    Args:
        name: folder under the root.
        root: as for `data_root`.
        splits: the samples of `train` and other splits, each in the order of the shards.
        classes: their names; labels are positions in it.
        channels: 1 or 3, to which the images are converted when they are decoded.
        shard_mib: a shard is closed when it has reached this size.
        overwrite: replace an existing data set.
        on_progress: called now and then with the number of samples written so far, and at the end.

    Raises:
        DataError: an image is broken or of another shape, a split is empty, or another data set of that
            name exists.
        StorageError: a write failed.
    """
    target = data_folder(name, root)
    place = target.resolve()  # a data set may be a link to a larger disk
    if overwrite:
        _check_replaceable(place)
    try:
        with _scratch_folder(place) as scratch:
            census = _Census(len(classes), channels, on_progress or (lambda done: None))
            written = {}
            for split, samples in splits.items():
                shards = _write_shards(scratch, split, census.check(split, samples), int(shard_mib * 2**20))
                counts = census.class_counts[split]
                written[split] = Split(sum(counts), shards, tuple(counts))
            height, width, _ = census.shape
            mean, std = census.mean_std()
            text = _index_bytes(
                _IndexFile(
                    version=_VERSION,
                    classes=tuple(classes),
                    channels=channels,
                    height=height,
                    width=width,
                    mean=mean,
                    std=std,
                    splits=written,
                )
            )
            with (scratch / "index.json").open("wb") as file:
                file.write(text)
                _sync(file)
            _sync_folder(scratch)
            published = _publish(scratch, place, overwrite)
    except OSError as error:
        raise StorageError(
            f"{error.filename or target}: the data set cannot be written: {error.strerror or error}; "
            "make room or choose another folder with --root"
        ) from error
    index = load_index(name, root)
    if not published and index.digest != hashlib.sha256(text).hexdigest():
        raise DataError(
            f"{target}: another data set of this name exists; replace it with --force or choose another name"
        )
    return index


class _Measured(NamedTuple):
    sample: Sample
    shape: tuple[int, int, int]
    sums: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]


class _Census:
    """What is counted while samples pass on their way into the shards."""

    def __init__(self, classes: int, channels: int, on_progress: Progress) -> None:
        self.class_counts: dict[str, list[int]] = {}
        self.shape = (0, 0, channels)
        self._classes = classes
        self._channels = channels
        self._on_progress = on_progress
        self._first = ""
        self._done = 0
        self._sums = np.zeros(channels, np.int64)  # of the train split; exact up to 1e14 pixels
        self._squares = np.zeros(channels, np.int64)

    def check(self, split: str, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yields the samples after checking and counting them."""
        counts = self.class_counts[split] = [0] * self._classes
        named = (
            sample if sample.origin else sample._replace(origin=f"{split} sample {number}")
            for number, sample in enumerate(samples)
        )
        for sample, shape, sums, squares in map_in_threads(self._measure, named):
            if not 0 <= sample.label < self._classes:
                raise DataError(f"{sample.origin}: label {sample.label}, but {self._classes} classes")
            if not self._first:
                self._first, self.shape = sample.origin, shape
            if shape != self.shape:
                (height, width, _), (first_height, first_width, _) = shape, self.shape
                raise DataError(
                    f"{sample.origin} is {width}x{height} but {self._first} is {first_width}x{first_height}; "
                    "all images must have one size"
                )
            counts[sample.label] += 1
            if split == "train":
                self._sums += sums
                self._squares += squares
            self._done += 1
            if self._done % 100 == 0:
                self._on_progress(self._done)
            yield sample
        if not any(counts):
            raise DataError(f"the {split} split has no images; add some")
        self._on_progress(self._done)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns both per channel for pixels in 0..1, rounded once from exact integers."""
        pixels = sum(self.class_counts["train"]) * self.shape[0] * self.shape[1]
        pairs = list(zip(self._sums.tolist(), self._squares.tolist(), strict=True))
        mean = tuple(total / (255 * pixels) for total, _ in pairs)
        std = tuple(math.sqrt(pixels * square - total**2) / (255 * pixels) for total, square in pairs)
        return mean, std

    def _measure(self, sample: Sample) -> _Measured:
        try:
            pixels = decode_image(sample.image, self._channels)
        except ValueError as error:
            raise DataError(f"{sample.origin}: {error}; repair or remove it") from None
        flat = pixels.reshape(-1, self._channels)
        sums = flat.sum(axis=0, dtype=np.int64)
        squares = np.square(flat, dtype=np.uint16).sum(axis=0, dtype=np.int64)  # 255 * 255 < 2**16
        return _Measured(sample, (pixels.shape[0], pixels.shape[1], pixels.shape[2]), sums, squares)


def _write_shards(folder: Path, split: str, samples: Iterator[Sample], shard_bytes: int) -> tuple[Shard, ...]:
    from webdataset.writer import TarWriter

    shards: list[Shard] = []
    number = 0
    sample = next(samples, None)
    while sample is not None:
        path = folder / f"{split}-{len(shards):06d}.tar"
        first = number
        with path.open("wb") as file:
            tar = TarWriter(
                file, encoder=False, mtime=0, mode=0o444, user="disttrain", group="disttrain", compress=False
            )
            with tar:
                while sample is not None and (number == first or file.tell() < shard_bytes):
                    label = str(sample.label).encode()
                    tar.write({"__key__": f"{number:08d}", sample.extension: sample.image, "cls": label})
                    number += 1
                    sample = next(samples, None)
            _sync(file)
        with path.open("rb") as file:
            digest = _sha256(file)
        shards.append(Shard(path.name, number - first, path.stat().st_size, digest))
    return tuple(shards)


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Makes a hidden folder beside the target and removes it in the end, whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Refuses to replace what is not a packed data set: a wrong --root must not delete a home folder."""
    if not target.exists():
        return
    foreign = (
        target
        if not target.is_dir()
        else next(
            (path for path in target.iterdir() if not (path.name == "index.json" or path.suffix == ".tar")),
            None,
        )
    )
    if foreign:
        raise DataError(f"{foreign}: not part of a packed data set; move it away, or choose another name")


def _publish(folder: Path, target: Path, overwrite: bool) -> bool:
    """Renames a complete folder to its place; returns False if another one is there and may not go."""
    while True:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync_folder(target.parent)
            return True
        if not overwrite:
            return False
        with _scratch_folder(target) as old, contextlib.suppress(FileNotFoundError):
            target.rename(old / target.name)  # a reader that has its shards open keeps them


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


# --- Reading ----------------------------------------------------------------------------------------


def read_split(index: Index, split: str) -> Iterator[tuple[str, bytes, int]]:
    """Yields key, image file and label of every sample of a split, in the order of the shards.

    Every caller gets all of them, whatever its rank or worker.

    Raises:
        DataError: as for `read_shard`, or there is no such split.
    """
    path = index.folder / "index.json"
    if split not in index.splits:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(index.splits)}")
    for shard in index.splits[split].shards:
        yield from read_shard(index, shard)


def read_shard(index: Index, shard: Shard) -> Iterator[tuple[str, bytes, int]]:
    """Yields key, image file and label of every sample of a shard, after checking its size and hash.

    Raises:
        DataError: the shard is missing or is not what the index says; the message names the shard, the
            key where there is one, and the remedy.
    """
    # The library's parser without its opener, which splits by rank, caches, rewrites URLs and runs pipes.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = index.folder / shard.file
    again = f"make the data set again with {remedy(index.name, index.folder.parent, force=True)}"
    count = 0
    try:
        with _open_shard(path, shard) as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                yield _parse(sample, len(index.classes))
                count += 1
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or next(iter(error.args), error)
        raise DataError(f"{path}: {reason}; {again}") from None
    if count != shard.samples:
        raise DataError(f"{path}: {count} samples, but the index says {shard.samples}; {again}")


def check_shard(index: Index, shard: Shard) -> None:
    """Checks the size and hash of a shard without reading its samples.

    Raises:
        DataError: the shard is missing or is not what the index says.
    """
    path = index.folder / shard.file
    try:
        _open_shard(path, shard).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        again = remedy(index.name, index.folder.parent, force=True)
        raise DataError(f"{path}: {reason}; make the data set again with {again}") from None


def verify(index: Index, *, on_progress: Progress | None = None) -> None:
    """Reads and decodes a whole data set and checks it against its index.

    Args:
        index: the data set.
        on_progress: called now and then with the number of samples checked so far, and at the end.

    Raises:
        DataError: a shard or an image is damaged, or an image or the number of a class is not what the
            index says.
    """
    again = f"make the data set again with {remedy(index.name, index.folder.parent, force=True)}"
    census = _Census(len(index.classes), index.channels, on_progress or (lambda done: None))
    for name, split in index.splits.items():
        samples = (
            Sample(image, "", label, f"{index.folder}: {name} sample {key}")
            for key, image, label in read_split(index, name)
        )
        deque(census.check(name, samples), maxlen=0)
        if tuple(census.class_counts[name]) != split.class_counts:
            raise DataError(f"{index.folder}: {name}: the class counts are not those of the index; {again}")
    if census.shape != (index.height, index.width, index.channels):
        raise DataError(f"{index.folder}: the image size is not that of the index; {again}")
    if census.mean_std() != (index.mean, index.std):
        raise DataError(f"{index.folder}: mean or std is not that of the index; {again}")


def _open_shard(path: Path, shard: Shard) -> BinaryIO:
    """Opens a shard at its start; raises ValueError if its bytes are not those of the index."""
    file = path.open("rb")
    try:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            raise ValueError(f"{size} bytes, but the index says {shard.bytes}")
        if _sha256(file) != shard.sha256:
            raise ValueError("the shard is damaged (its SHA-256 is not that of the index)")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _parse(sample: Mapping[str, bytes], classes: int) -> tuple[str, bytes, int]:
    key = str(sample["__key__"])
    images = [sample[extension] for extension in _EXTENSIONS if extension in sample]
    if len(images) != 1:
        raise ValueError(f"sample {key} has {len(images)} images, expected one")
    if "cls" not in sample:
        raise ValueError(f"sample {key} has no label ({key}.cls)")
    text = sample["cls"]
    if not text.isdigit() or int(text) >= classes:
        raise ValueError(f"sample {key}: {text[:20]!r} is not a label from 0 to {classes - 1}")
    return key, images[0], int(text)


# --- Images -----------------------------------------------------------------------------------------


def decode_image(image: bytes, channels: int) -> Pixels:
    """Decodes an image file.

    The EXIF orientation is applied, transparency dropped, 16 bits are cut to their upper 8, and of an
    animation the first frame is taken.

    Args:
        image: the file, of one of `IMAGE_FORMATS`.
        channels: 1 for gray, 3 for RGB.

    Returns:
        uint8 [height, width, channels]

    Raises:
        ValueError: it is no image, broken, or larger than `MAX_PIXELS`; the message is the reason.
    """
    try:
        with open_image(io.BytesIO(image)) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            pixels = np.array(_convert(picture, "L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises anything on a broken file, SyntaxError and struct.error too
        raise ValueError(str(error) or type(error).__name__) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def open_image(file: BinaryIO) -> Image.Image:
    """Reads the header of an image file; the pixels follow on demand.

    Raises:
        ValueError: it is no image of a known format, or larger than `MAX_PIXELS`.
    """
    try:
        picture = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not a sound image file of a known format") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels are more than the limit of {MAX_PIXELS}")
    return picture


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them to 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits are not supported")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns about the direct way
    return picture.convert(mode)


def map_in_threads(
    function: Callable[[_T], _R], items: Iterable[_T], *, chunk: int = 64, slow_s: float = 0.002
) -> Iterator[_R]:
    """Yields `function(item)` in the order of the items, some of them computed ahead by threads.

    Threads start when an item has been seen to be slow. Small images are not: there the threads would
    spend their time waiting for each other.

    Args:
        function: work that leaves Python, such as reading or decoding an image.
        items: taken in the caller's thread, a bounded number ahead of what is yielded.
        chunk: items in one task.
        slow_s: mean time of an item in a chunk from which threads are used.
    """

    def work(batch: list[_T]) -> list[_R]:
        return [function(item) for item in batch]

    source = iter(items)
    item_s = 0.0
    while item_s < slow_s and (batch := list(itertools.islice(source, chunk))):
        start_s = time.perf_counter()
        results = work(batch)
        item_s = (time.perf_counter() - start_s) / len(batch)
        yield from results
    workers = min(8, len(os.sched_getaffinity(0)))
    pending: deque[Future[list[_R]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while batch := list(itertools.islice(source, chunk)):
            pending.append(pool.submit(work, batch))
            if len(pending) > workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
