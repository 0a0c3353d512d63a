"""Packs samples as a data set: plans the shards, writes them in several processes, and publishes them.

The plan depends only on the input, so the bytes do not depend on the number of processes. After an
interruption, the next attempt keeps the finished shards. `datasets` and `imagefolder` supply the samples.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import operator
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from disttrain.errors import DataError, StorageError
from disttrain.files import sha256, sync_folder, write_atomically, write_new
from disttrain.parallel import KilledError, in_processes, usable_cores
from disttrain.shards.bad_samples import list_of, report
from disttrain.shards.index import Index, data_folder, load_index
from disttrain.shards.index_file import (
    IndexFile,
    Shard,
    Split,
    check_index,
    index_bytes,
    mean_std,
    one_size,
    sizes_of,
    version_of,
)
from disttrain.shards.publish import check_replaceable, instead_of, publish, scratch_folder
from disttrain.shards.writer import SEVERAL, Sample, WrittenShard, member_bytes, tell, write_shard
from disttrain.units import mib

Progress = Callable[[int, int], None]
"""Called now and then with the samples done and their total."""


def silent(*told: object) -> None:
    """Ignores the message."""


_FEW = 4000  # samples; fewer are not worth more processes


@dataclass(frozen=True)
class Options:
    """How a data set is made.

    Attributes:
        force: replace an existing data set.
        shard_mib: a shard ends when it reaches this size, estimated from the sizes of the source.
        skip: leave bad samples out, instead of making no data set.
        processes: number of processes; None means one per usable core if there is enough work.
        say: called with lines for the user.
        on_progress: called with the progress of packing.
    """

    force: bool = False
    shard_mib: float = 64
    skip: bool = False
    processes: int | None = None
    say: Callable[[str], None] = silent
    on_progress: Progress = silent


class Source(Protocol):
    """A list of samples, which are loaded one by one."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def load(self, number: int) -> Sample:
        """Returns a sample."""

    def size(self, number: int) -> int:
        """Returns the approximate size of a sample's image in bytes."""

    def sample_fingerprint(self, number: int) -> str | None:
        """Returns a text that changes if the sample does; None for samples in memory.

        Only this process writes samples in memory, and they are not kept after an interruption. For other
        samples the source is pickled, so that other processes can load them.
        """


def pack(
    name: str,
    root: str | None,
    splits: Mapping[str, Source],
    classes: Sequence[str],
    channels: Literal[1, 3],
    options: Options,
    *,
    in_train: Collection[str] | None = None,
) -> Index:
    """Writes samples as a data set, which appears under its name when it is complete.

    Every image is decoded once, to check that it is intact. An existing data set of this name stays, also if
    another process makes it meanwhile; it is returned if it is the same.

    Args:
        name: folder under the root.
        root: see `data_root`.
        splits: the samples of `train` and other splits, each in the order of the shards.
        classes: names of the classes; a label is a position in this list.
        channels: number of channels to decode the images to.
        options: how to make the data set.
        in_train: names of the classes that train has; None means all.

    Raises:
        DataError: an image is broken, a split is empty, or another data set of this name exists.
        StorageError: a write failed, or a process was killed.
    """
    for split, source in splits.items():
        if len(source) == 0:
            raise DataError(f"the {split} split has no images; add some")
    target = data_folder(name, root)
    place = target.resolve()  # a data set may be a link to a larger disk
    if options.force:
        check_replaceable(place)
    jobs = list(_plan(splits, int(options.shard_mib * 2**20), len(classes), channels))
    try:
        with scratch_folder(place, options.say, keep=all(job.fingerprint for job in jobs)) as scratch:
            records = _write(jobs, splits, scratch, options)
            needed = [name if in_train is None or name in in_train else None for name in classes]
            jobs, records = _without_bad(jobs, records, place, needed, options)
            text = _read_back(index_bytes(_describe(jobs, records, classes, channels)), target)
            _complete(scratch, {job.file for job in jobs}, text)
            if options.force:
                check_replaceable(place)  # another process may have put tars there meanwhile
            published = publish(scratch, place, options.force)
    except OSError as error:
        raise StorageError(
            f"{error.filename or target}: the data set cannot be written: {error.strerror or error}; "
            "make room or choose another folder with --root"
        ) from error
    except KilledError:
        raise StorageError(
            f"{target}: a packing process was killed, perhaps for lack of memory; run the command again with "
            "fewer --procs, it keeps the finished shards"
        ) from None
    index = load_index(name, root)
    if not published and index.digest != hashlib.sha256(text).hexdigest():
        raise DataError(f"{target}: another data set of this name exists; {instead_of(target)}")
    return index


def _complete(scratch: Path, files: set[str], index: bytes) -> None:
    """Writes the index to the shards, and removes all other files."""
    for path in scratch.iterdir():
        if path.name not in files:
            path.unlink()  # the record of a shard, or a shard from an earlier plan
    write_new(scratch / "index.json", index)
    sync_folder(scratch)


def _without_bad(
    jobs: list[_Job],
    records: list[WrittenShard],
    place: Path,
    needed: Sequence[str | None],
    options: Options,
) -> tuple[list[_Job], list[WrittenShard]]:
    """Tells the bad samples, and returns the shards that have a good one.

    Args:
        jobs: the shards.
        records: their records.
        place: of the data set.
        needed: names of the classes; None for one that may be without a sample in train.
        options: how to make the data set.

    Raises:
        DataError: there are bad samples that are not to be left out, or all of a split or class are bad.
    """
    problems = [problem for record in records for problem in record.problems]
    if not problems:
        list_of(place).unlink(missing_ok=True)  # of an attempt before
        return jobs, records
    report(problems, place, skip=options.skip, say=options.say)
    pairs = [(job, record) for job, record in zip(jobs, records, strict=True) if record.samples]
    for split in dict.fromkeys(job.split for job in jobs):
        counts = [record.class_counts for job, record in pairs if job.split == split]
        if not counts:
            raise DataError(f"every image of the {split} split is bad; repair them")
        for name, count in zip(needed, np.sum(counts, axis=0), strict=True):
            if split == "train" and name is not None and not count:  # a whole class is never left out
                raise DataError(f"every image of the class {name} is bad; repair them or remove the class")
    return [job for job, _ in pairs], [record for _, record in pairs]


def _read_back(text: bytes, target: Path) -> bytes:
    """Returns an index.json, or raises DataError if the reader would refuse it: then it is not published."""
    try:
        check_index(text)
    except ValueError as error:
        raise DataError(f"{target}: not published, because its index cannot be read: {error}") from None
    return text


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    split: str
    file: str
    numbers: range
    """Numbers of its samples in the split."""
    size: int
    """Approximate size in bytes."""
    fingerprint: str
    """Changes if any input of the shard does; empty for samples in memory."""
    classes: int
    channels: int


def _plan(splits: Mapping[str, Source], shard_bytes: int, classes: int, channels: int) -> Iterator[_Job]:
    for split, source in splits.items():
        first, size, shards = 0, 0, itertools.count()
        for number in range(len(source)):
            size += member_bytes(source.size(number))
            if size >= shard_bytes or number + 1 == len(source):
                numbers = range(first, number + 1)
                identities = [source.sample_fingerprint(i) for i in numbers]
                fingerprint = ""
                if None not in identities:
                    text = json.dumps([classes, channels, first, identities])
                    fingerprint = hashlib.sha256(text.encode()).hexdigest()
                yield _Job(
                    split, f"{split}-{next(shards):06d}.tar", numbers, size, fingerprint, classes, channels
                )
                first, size = number + 1, 0


# --- Writing ----------------------------------------------------------------------------------------


def _write(
    jobs: Sequence[_Job], splits: Mapping[str, Source], scratch: Path, options: Options
) -> list[WrittenShard]:
    """Writes the missing shards and returns the records of all shards, in order.

    Raises:
        KilledError: a process was killed.
    """
    records = {job.file: _kept(scratch, job) for job in jobs}
    missing = [job for job in jobs if records[job.file] is None]
    total = sum(len(job.numbers) for job in jobs)
    done = total - sum(len(job.numbers) for job in missing)
    if done:
        kept = len(jobs) - len(missing)
        options.say(f"resuming: {kept:,} of {len(jobs):,} shards are already finished")
    free, needed = shutil.disk_usage(scratch).free, sum(job.size for job in missing)
    if needed > free:
        raise StorageError(
            f"{scratch.parent}: the shards need {mib(needed)}, but only {mib(free)} are free; "
            "make room or choose another folder with --root"
        )
    processes = min(options.processes or (usable_cores() if total >= _FEW else 1), len(missing))
    if processes > 1 and all(job.fingerprint for job in jobs):
        written = multiprocessing.get_context("spawn").RawArray("q", len(missing))  # samples of each shard
        work = partial(_write_numbered, splits, scratch, written)
        found = in_processes(
            work,
            list(enumerate(missing)),
            processes,
            lambda: options.on_progress(done + sum(written), total),
        )
        records |= {job.file: record for job, record in zip(missing, found, strict=True)}
    else:
        for job in missing:
            show = partial(_show_hundreds, options.on_progress, done, total)
            records[job.file] = _write_job(job, splits[job.split], scratch, show)
            done += len(job.numbers)
    options.on_progress(total, total)
    finished = [record for job in jobs if (record := records[job.file])]
    tell(finished, options.say)
    return finished


def _show_hundreds(on_progress: Progress, before: int, total: int, written: int) -> None:
    if (before + written) % 100 == 0:
        on_progress(before + written, total)


def _write_numbered(
    splits: Mapping[str, Source], scratch: Path, written: Any, numbered: tuple[int, _Job]
) -> WrittenShard:
    """Writes a shard, and counts its samples in `written[number]`."""
    number, job = numbered
    return _write_job(job, splits[job.split], scratch, partial(operator.setitem, written, number))


def _write_job(job: _Job, source: Source, scratch: Path, on_sample: Callable[[int], object]) -> WrittenShard:
    path = scratch / job.file
    record = write_shard(path, source.load, job.numbers, job.classes, job.channels, on_sample)
    if job.fingerprint:
        kept = msgspec.json.encode((job.fingerprint, record))
        write_atomically(path.with_suffix(".json"), kept, durable=False)
    return record


def _kept(scratch: Path, job: _Job) -> WrittenShard | None:
    """Returns the record of a shard that an earlier attempt finished from the same input, or None."""
    path = scratch / job.file
    try:
        kept = path.with_suffix(".json").read_bytes()
        fingerprint, record = msgspec.json.decode(kept, type=tuple[str, WrittenShard])
        sound = fingerprint == job.fingerprint and sha256(path) == record.sha256
    except (OSError, msgspec.DecodeError):
        return None
    return record if sound else None


def _describe(
    jobs: Sequence[_Job], records: Sequence[WrittenShard], classes: Sequence[str], channels: Literal[1, 3]
) -> IndexFile:
    """Returns the index of the shards."""
    height, width = one_size({size for record in records for size in record.sizes})
    splits: dict[str, Split] = {}
    for split, group in itertools.groupby(zip(jobs, records, strict=True), key=lambda pair: pair[0].split):
        shards, counts, sizes = [], np.zeros(len(classes), np.int64), []
        for job, record in group:
            sizes += record.sizes
            shards.append(Shard(job.file, record.samples, record.bytes, record.sha256))
            counts += record.class_counts
        spread = None if height else sizes_of(*np.array(sizes, np.int64).T)
        splits[split] = Split(len(sizes), tuple(shards), tuple(counts.tolist()), spread)
    train = [record for job, record in zip(jobs, records, strict=True) if job.split == "train"]
    sums = np.sum([record.sums for record in train], axis=0)
    pixels = sum(height * width for record in train for height, width in record.sizes)
    mean, std = mean_std(sums, pixels)
    multi_label = any(record.multi_label for record in records)
    return IndexFile(
        version=version_of(height, multi_label=multi_label),
        classes=tuple(classes),
        channels=channels,
        height=height,
        width=width,
        mean=mean,
        std=std,
        splits=splits,
        label=SEVERAL if multi_label else None,
    )
