"""Measures the speed of each stage of the data path, compared with a plain webdataset pipeline."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from disttrain.config import AugmentConfig
from disttrain.data.batches import Batch
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import DecodedSplit
from disttrain.data.epoch_plan import Plan
from disttrain.data.streamed import Streamed
from disttrain.errors import UsageError
from disttrain.parallel import ordered_map, usable_cores
from disttrain.shards.crops import RandomCrops
from disttrain.shards.index import Index
from disttrain.shards.label_format import LabelPlace, LabelReader
from disttrain.shards.reader import decode_files, open_shard
from disttrain.shards.tar import scan
from disttrain.shards.whole_shard import decoded
from disttrain.training.augment import Augment
from disttrain.training.normalize import Normalize

_LEAST_AREA = 0.08  # of a random crop


class Stage(NamedTuple):
    """The speed of one stage: its work and threads in words, its samples, and the seconds that it took."""

    name: str
    what: str
    samples: int
    seconds: float

    @property
    def samples_per_s(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds


def bench(index: Index, *, samples: int, batch_size: int, threads: int | None = None) -> Iterator[Stage]:
    """Measures the train split of a data set on the CPU, stage by stage.

    Args:
        index: the index of the data set.
        samples: samples for each stage, at most those of the split.
        batch_size: samples per batch.
        threads: threads for decoding and augmentation; None means all usable cores.

    Raises:
        UsageError: the data set is on a server.
        DataError: a shard is damaged.
    """
    if index.base is not None:
        raise UsageError(f"{index.base}: is on a server; benchmark a local copy")
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    train = index.splits["train"]
    samples = min(samples, train.samples)
    totals = list(itertools.accumulate(shard.samples for shard in train.shards))
    numbers = list(range(1 + bisect.bisect_left(totals, samples)))  # the first shards with enough samples
    pixels = np.empty((samples, index.height, index.width, index.channels), np.uint8)
    yield from _shards_to_pixels(index, numbers, pixels, threads)
    plan = Plan(0, tuple(train.shards[number].samples for number in numbers), batch_size)
    yield _timed("plan", "the order of an epoch", plan.samples, lambda: plan.order(0))
    yield from _pixels_to_batches(index, plan, pixels, threads)
    tars = [index.folder / train.shards[number].file for number in numbers]
    stock = min(samples, 5000)
    what = "decode('pil'), torchvision transforms, batched, one process"
    yield _timed("stock webdataset", what, stock, lambda: _stock(tars, index, stock, batch_size))


def _shards_to_pixels(
    index: Index, numbers: list[int], pixels: npt.NDArray[np.uint8], threads: int
) -> Iterator[Stage]:
    """Measures the stages that decode the first samples, and fills `pixels` with them."""
    samples, shards = len(pixels), index.splits["train"].shards
    tars = [index.folder / shards[number].file for number in numbers]
    inside = sum(shards[number].samples for number in numbers)
    yield _timed("check", "SHA-256 of the shards", inside, lambda: _drain(map(_hash, tars)))
    yield _timed("scan", "find the samples of the shards", inside, lambda: _drain(map(_scan, tars)))

    contents = [open_shard(index, "train", number) for number in numbers]
    places = [(shard, position) for shard in contents for position in range(len(shard.contents.keys))]
    images: list[bytes] = []

    def read() -> None:
        images.extend(shard.read(position) for shard, position in places[:samples])

    yield _timed("read", "image files at their offsets", samples, read)

    def decode(part: slice) -> None:
        decode_files(index, images[part], pixels[part])

    size = 64 if index.image_size is None else 8
    parts = [slice(begin, begin + size) for begin in range(0, samples, size)]
    for count in sorted({1, threads}):
        what = f"image files to pixels, {_many(count)}"
        yield _timed("decode", what, samples, partial(_drain, ordered_map(decode, parts, count)))
    if index.image_size is not None:  # never cached
        return
    what = f"shards to the cache file, {_many(threads)}"
    yield _timed("decode once", what, inside, lambda: _fill_cache(index, numbers, threads))


def _pixels_to_batches(
    index: Index, plan: Plan, pixels: npt.NDArray[np.uint8], threads: int
) -> Iterator[Stage]:
    samples, batch_size, cpu = len(pixels), plan.batch_size, torch.device("cpu")
    windows = [slice(begin, min(begin + batch_size, samples)) for begin in range(0, samples, batch_size)]
    order = plan.order(0)[:samples]
    augment = Augment(
        AugmentConfig(crop_padding=min(4, min(index.height, index.width) - 1), flip=True),
        seed=0,
        normalize=Normalize(index.mean, index.std, index.width, channels_last=True),
    )
    augment.start_epoch(0, order, index.height, index.width)
    cached = Cached(DecodedSplit(pixels, np.zeros(samples, np.int64)), cpu, "host")
    within = np.argsort(order, kind="stable")  # a random order of only the decoded samples
    what = f"gather batches of {batch_size} from the cache"
    yield _timed("batch", what, samples, lambda: _drain(cached.batches(within, windows)))

    batches = list(cached.batches(within, windows))
    augment.train(batches[0].images, windows[0])  # warm-up: do not time the first use of the memory

    def augment_all(batches: Iterable[Batch]) -> None:
        for batch, window in zip(batches, windows, strict=True):
            augment.train(batch.images, window)

    many = _many(threads)
    yield _timed("augment", f"crop, flip, normalize, {many}", samples, lambda: augment_all(batches))
    loading = partial(cached.batches, within, windows)
    yield _timed("cached epoch", f"batch and augment, {many}", samples, lambda: augment_all(loading()))
    streamed = Streamed(index, "train", cpu, batch_size=batch_size, workers=threads, say=lambda text: None)
    what = f"read, decode, batch and augment, {many}"
    crops = None if index.image_size is None else RandomCrops(0, 0, _LEAST_AREA)
    yield _timed(
        "streamed epoch", what, samples, lambda: augment_all(streamed.batches(order, windows, crops))
    )


def _many(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _timed(name: str, what: str, samples: int, work: Callable[[], object]) -> Stage:
    start_s = time.perf_counter()
    work()
    return Stage(name, what, samples, time.perf_counter() - start_s)


def _drain(results: Iterator[object]) -> None:
    for _ in results:
        pass


def _hash(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def _scan(path: Path) -> None:
    with path.open("rb") as file:
        scan(file, LabelReader())


def _fill_cache(index: Index, numbers: list[int], threads: int) -> None:
    """Decodes shards into a file like those of the cache."""
    count = sum(index.splits["train"].shards[number].samples for number in numbers)
    with tempfile.TemporaryDirectory() as scratch:
        shape = (count, index.height, index.width, index.channels)
        path = Path(scratch) / "images.npy"
        images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for number in numbers:
            for chunk in decoded(index, "train", number, threads=threads):
                images[chunk.first : chunk.first + len(chunk.labels)] = chunk.images
        images.flush()


def _stock(tars: list[Path], index: Index, samples: int, batch_size: int) -> None:
    """Runs the webdataset pipeline that most people write."""
    import webdataset
    from torchvision import transforms

    size, label = (index.height, index.width), index.label or LabelPlace()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(size, padding=4, padding_mode="reflect")
            if index.image_size is None
            else transforms.RandomResizedCrop(size, (_LEAST_AREA, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(index.mean, [value or 1.0 for value in index.std]),
        ]
    )
    pipeline = (
        webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
        .shuffle(1000)
        .decode("pil" if index.channels == 3 else "pill")
        .to_tuple("jpg;png;webp;jpeg", label.member)
        .map_tuple(transform, lambda content: 0)  # a label may be of any kind
        .batched(batch_size)
    )
    done = 0
    for _, labels in pipeline:
        done += len(labels)
        if done >= samples:
            return
