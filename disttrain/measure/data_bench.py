"""How fast each stage of the data path is on this machine, beside the stock webdataset pipeline."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from disttrain.config import AugmentConfig
from disttrain.data.cached import Cached, DecodedSplit
from disttrain.data.plan import Ids, Plan
from disttrain.data.streamed import Streamed
from disttrain.errors import UsageError
from disttrain.parallel import in_order, usable_cores
from disttrain.shards.images import decode_into, use_torchvision
from disttrain.shards.index import Index
from disttrain.shards.reader import decoded, open_shard
from disttrain.shards.tar import scan
from disttrain.training.augment import Augment
from disttrain.training.normalise import Normalise


class Stage(NamedTuple):
    """The speed of one stage.

    Attributes:
        name: of the stage.
        what: what it does, with the threads it uses.
        samples: measured.
        seconds: they took.
    """

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
        index: the data set, on this machine.
        samples: to measure each stage with, at most those of the split.
        batch_size: of the batches.
        threads: for decoding and arithmetic; None means the usable cores.

    Raises:
        UsageError: the data set lies on a server.
        DataError: a shard is damaged.
    """
    if index.base is not None:
        raise UsageError(f"{index.base}: lies on a server; benchmark a local copy")
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    shards = index.splits["train"].shards
    numbers = list(range(_enough(index, samples)))
    samples = min(samples, index.splits["train"].samples)
    many = f"{threads} thread{'s' * (threads > 1)}"

    tars = [index.folder / shards[number].file for number in numbers]
    inside = sum(shards[number].samples for number in numbers)
    yield _timed("check", "SHA-256 of the shards", inside, lambda: _drain(map(_hash, tars)))
    yield _timed("scan", "find the samples of the shards", inside, lambda: _drain(map(_scan, tars)))

    contents = [open_shard(index, "train", number) for number in numbers]
    places = [(shard, position) for shard in contents for position in range(len(shard.contents.keys))]
    places = places[:samples]
    images: list[bytes] = []
    yield _timed(
        "read", "image files at their offsets", samples, lambda: images.extend(s.read(p) for s, p in places)
    )
    pixels = np.empty((samples, index.height, index.width, index.channels), np.uint8)

    def decode(part: slice) -> None:
        decode_into(images[part], pixels[part])

    parts = [slice(begin, begin + 64) for begin in range(0, samples, 64)]
    use_torchvision()
    for count in sorted({1, threads}):
        what = f"image files to pixels, {count} thread{'s' * (count > 1)}"
        yield _timed("decode", what, samples, lambda count=count: _drain(in_order(decode, parts, count)))  # type: ignore[misc]

    yield _timed(
        "decode once",
        f"shards to the cache file, {many}",
        inside,
        lambda: _fill_cache(index, numbers, threads),
    )
    plan = Plan(0, tuple(shards[number].samples for number in numbers), batch_size)
    order = plan.order(0)[:samples]
    yield _timed("plan", "the order of an epoch", plan.samples, lambda: plan.order(0))

    windows = [slice(begin, min(begin + batch_size, samples)) for begin in range(0, samples, batch_size)]
    cpu = torch.device("cpu")
    augment = Augment(
        AugmentConfig(crop_padding=min(4, min(index.height, index.width) - 1), flip=True),
        seed=0,
        normalise=Normalise(index.mean, index.std, index.width, channels_last=True),
    )
    augment.start_epoch(0, order, index.height, index.width)
    labels = np.zeros(samples, np.int64)
    cached = Cached(DecodedSplit(pixels, labels), cpu, "host")
    within = np.argsort(order, kind="stable")  # an order of the samples that have been decoded
    yield _timed(
        "batch",
        f"gather batches of {batch_size} from the cache",
        samples,
        lambda: _drain(cached.batches(within, windows)),
    )
    batches = list(cached.batches(within, windows))

    augment.train(batches[0].images, windows[0])  # the first use of the memory is no part of it

    def augment_all() -> None:
        for batch, window in zip(batches, windows, strict=True):
            augment.train(batch.images, window)

    yield _timed("augment", f"crop, flip, normalise, {many}", samples, augment_all)

    def serve(loader: Cached | Streamed, ids: Ids) -> None:
        for batch, window in zip(loader.batches(ids, windows), windows, strict=True):
            augment.train(batch.images, window)

    yield _timed("cached epoch", f"batch and augment, {many}", samples, lambda: serve(cached, within))
    streamed = Streamed(index, "train", cpu, batch_size=batch_size, workers=threads, say=lambda text: None)
    yield _timed(
        "streamed epoch", f"read, decode, batch and augment, {many}", samples, lambda: serve(streamed, order)
    )
    stock = min(samples, 5000)
    yield _timed(
        "stock webdataset", "decode('pil'), torchvision transforms, batched, one process", stock,
        lambda: _stock(tars, index, stock, batch_size),
    )  # fmt: skip


def _enough(index: Index, samples: int) -> int:
    """Returns how many shards hold that many samples."""
    totals = itertools.accumulate(shard.samples for shard in index.splits["train"].shards)
    return next(
        (n for n, total in enumerate(totals, 1) if total >= samples), len(index.splits["train"].shards)
    )


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
        scan(file, None)


def _fill_cache(index: Index, numbers: list[int], threads: int) -> None:
    """Decodes shards into a file of the kind that the cache has."""
    count = sum(index.splits["train"].shards[number].samples for number in numbers)
    scratch = Path(tempfile.mkdtemp())
    try:
        shape = (count, index.height, index.width, index.channels)
        images = np.lib.format.open_memmap(scratch / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for number in numbers:
            for chunk in decoded(index, "train", number, threads=threads):
                images[chunk.first : chunk.first + len(chunk.labels)] = chunk.images
        images.flush()
    finally:
        shutil.rmtree(scratch)


def _stock(tars: list[Path], index: Index, samples: int, batch_size: int) -> None:
    """Runs the pipeline that most people write."""
    import webdataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop((index.height, index.width), padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(index.mean, [value or 1.0 for value in index.std]),
        ]
    )
    pipeline = (
        webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
        .shuffle(1000)
        .decode("pil" if index.channels == 3 else "pill")
        .to_tuple("jpg;png;webp;jpeg", "cls")
        .map_tuple(transform)
        .batched(batch_size)
    )
    done = 0
    for _, labels in pipeline:
        done += len(labels)
        if done >= samples:
            return
