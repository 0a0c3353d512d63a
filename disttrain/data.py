"""Which samples make up each batch, and how they reach the device.

The plan is pure: the global batch of a step is a function of (seed, epoch, step) and of the size of the
split. A rank takes its contiguous share of that batch. The images come from a decoded copy of the shards:
one uint8 file per split, made once per node and shared by all ranks and later runs through the page cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disttrain import counter_rng
from disttrain.errors import DataError, StorageError, UsageError
from disttrain.shards import Index, decode_image, map_in_threads, read_split, user_cache

_ORDER = 1  # the stream of random numbers that orders an epoch


@dataclass(frozen=True)
class Plan:
    """The order of the samples in every epoch, whatever the number of ranks.

    Attributes:
        seed: the seed of the run.
        samples: samples in the training split.
        batch_size: the global batch.
        drop_remainder: leave out the samples that do not fill the last batch.
    """

    seed: int
    samples: int
    batch_size: int
    drop_remainder: bool

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"train.batch_size = {self.batch_size} is more than the {self.samples} training samples and "
                "data.remainder = drop leaves none; lower it or use data.remainder = keep"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    @property
    def samples_per_epoch(self) -> int:
        """Samples trained on in one epoch."""
        return min(self.samples, self.steps_per_epoch * self.batch_size)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Returns the ids of the split in the order of this epoch: int64 [samples]."""
        return counter_rng.permutation(counter_rng.derive(self.seed, _ORDER, epoch), self.samples)

    def batch(self, step: int) -> range:
        """Returns the places in the epoch's order that make up the global batch of a step of the epoch."""
        return range(step * self.batch_size, min((step + 1) * self.batch_size, self.samples))


def share(places: range, rank: int, world_size: int) -> range:
    """Returns one rank's contiguous part of `places`; the first parts may be one longer."""
    base, extra = divmod(len(places), world_size)
    begin = rank * base + min(rank, extra)
    return places[begin : begin + base + (rank < extra)]


@dataclass(frozen=True)
class DecodedSplit:
    """The decoded images of one split, in index order, mapped from the cache.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def cache_folder() -> Path:
    """Returns the folder of decoded data sets: $DISTTRAIN_CACHE, else in the user's cache folder."""
    return Path(os.environ.get("DISTTRAIN_CACHE") or user_cache() / "decoded")


def open_split(index: Index, split: str, say: Callable[[str], None]) -> DecodedSplit:
    """Returns the decoded images of a split, decoding the shards if no process has done so before.

    Any number of processes may call this at once: one decodes, the others wait for it.

    Args:
        index: the data set.
        split: train or val.
        say: told when decoding begins, or that another process is waited for.

    Raises:
        DataError: a shard is damaged or does not hold what the index says.
        StorageError: the decoded copy does not fit on the disk.
    """
    folder = cache_folder()
    target = folder / f"{index.name}-{index.digest[:16]}-{split}"
    decoded = _map(target, index, split)
    if decoded is not None:
        return decoded
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{target.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that decodes {index.name}/{split}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            decoded = _map(target, index, split)
            if decoded is None:
                _decode(index, split, target, say)
                decoded = _map(target, index, split)
    except OSError as error:
        raise StorageError(
            f"cannot write the decoded copy of {index.name} to {folder}: {error.strerror or error}; "
            "free some space or set DISTTRAIN_CACHE to another folder"
        ) from None
    assert decoded is not None
    return decoded


def _map(target: Path, index: Index, split: str) -> DecodedSplit | None:
    shape = (index.splits[split].samples, index.height, index.width, index.channels)
    try:  # copy-on-write, because torch warns of arrays that cannot be written
        images = np.load(target / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(target / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    expected = (shape, np.uint8, shape[:1], np.int64)
    found = (images.shape, images.dtype, labels.shape, labels.dtype)
    return DecodedSplit(images, labels) if found == expected else None


def _decode(index: Index, split: str, target: Path, say: Callable[[str], None]) -> None:
    shape = (index.splits[split].samples, index.height, index.width, index.channels)
    needed = int(np.prod(shape)) + 9 * shape[0]
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise StorageError(
            f"{target.parent}: {needed / 2**20:,.0f} MiB needed for the decoded copy of {index.name}, "
            f"{free / 2**20:,.0f} MiB free; free some space or set DISTTRAIN_CACHE to another folder"
        )
    say(f"decoding {index.name}/{split} once: {shape[0]:,} images, {needed / 2**20:,.1f} MiB")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        images = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        with (partial / "images.npy").open("r+b") as mapped:  # a full disk is an error here, a SIGBUS later
            os.posix_fallocate(mapped.fileno(), 0, os.fstat(mapped.fileno()).st_size)
        labels = np.empty(shape[0], dtype=np.int64)

        def decode(sample: tuple[int, tuple[str, bytes, int]]) -> None:
            place, (key, image, label) = sample
            try:
                pixels = decode_image(image, index.channels)
                if pixels.shape != shape[1:]:
                    raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels")
            except ValueError as error:
                raise DataError(
                    f"{index.folder}: {split} image {key}: {error}; the index says "
                    f"{index.width}x{index.height}; pack the data set again"
                ) from None
            images[place], labels[place] = pixels, label

        for _ in map_in_threads(decode, enumerate(read_split(index, split))):
            pass
        images.flush()
        np.save(partial / "labels.npy", labels)
        for file in partial.iterdir():
            with file.open("rb") as unsynced:
                os.fsync(unsynced.fileno())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Served:
    """A decoded split in the place it is served from, for one rank.

    Args:
        decoded: the split.
        device: where batches are wanted.
        place: device keeps a copy there; host gathers in host memory and copies each batch.
    """

    def __init__(self, decoded: DecodedSplit, device: torch.device, place: Literal["device", "host"]) -> None:
        self.samples = len(decoded.labels)
        self.device = device
        home = device if place == "device" else torch.device("cpu")
        self._images = torch.from_numpy(decoded.images).to(home)
        self._labels = torch.from_numpy(decoded.labels).to(home)
        self._pinned = home.type == "cpu" and device.type == "cuda"

    def ids(self, order: npt.NDArray[np.int64]) -> Tensor:
        """Returns an epoch's order as an int64 tensor in the place where the images are gathered."""
        return torch.from_numpy(order).to(self._images.device)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers samples.

        Args:
            ids: int64 [B], from `ids`.

        Returns:
            images uint8 [B, H, W, C] and labels int64 [B], on the device. The copy to a GPU is
            asynchronous.
        """
        if not self._pinned:
            return self._images[ids], self._labels[ids]
        images = torch.empty((len(ids), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=True)
        torch.index_select(self._images, 0, ids, out=images)
        labels = self._labels[ids].pin_memory()
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def choose_place(
    cache: Literal["auto", "device", "host"], needed: int, device: torch.device
) -> tuple[Literal["device", "host"], str]:
    """Decides where the decoded images of a rank live, and says why.

    Args:
        cache: `data.cache` of the config.
        needed: bytes of the decoded splits.
        device: the device of the rank.
    """
    if device.type == "cpu":
        return "host", "the device is the CPU: mapped from the cache, shared by the ranks of the node"
    if cache != "auto":
        return cache, f"data.cache = {cache}"
    free, _ = torch.cuda.mem_get_info(device)
    sizes = f"{needed / 2**20:,.0f} MiB decoded, {free / 2**20:,.0f} MiB free on the device"
    if needed <= 0.3 * free:
        return "device", f"{sizes}: fits in 30 % of it"
    return "host", f"{sizes}: more than 30 % of it"
