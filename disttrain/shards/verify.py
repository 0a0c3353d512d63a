"""Reads every sample of a data set: finds bad samples, and checks that the index matches the shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeAlias

import numpy as np

from disttrain.files import file_lock, stamp
from disttrain.parallel import usable_cores
from disttrain.shards.index import Index, extra_shards
from disttrain.shards.index_file import Shard, mean_std, sizes_of
from disttrain.shards.pack import Progress, silent
from disttrain.shards.reader import Ids, ShardError, open_shard
from disttrain.shards.remarks import Remarks, add, pillow_warnings
from disttrain.shards.tar import Contents
from disttrain.shards.whole_shard import ScannedSamples, scanned
from disttrain.userdirs import cache_folder, remember


class Problem(NamedTuple):
    """A problem of a sample, a shard or the index."""

    place: str
    """Path or URL of the shard or the index."""
    key: str | None
    """Key of the sample; None for the whole file."""
    text: str


class Findings:
    """The results of reading a whole data set.

    Attributes:
        problems: problems of samples and shards, in the order of the shards.
        unusable: split -> ids of the bad samples, in order.
        class_counts: split -> number of usable samples of each class, or with each label.
        sizes: split -> height and width of its usable images, int64 [n, 2] in parts.
        sums: sums of the pixels of the train split; see `pixel_sums`.
        remarks: remarks on usable samples, each with its shard and key.
    """

    def __init__(self, index: Index) -> None:
        self.problems: list[Problem] = []
        self.unusable: dict[str, list[int]] = {split: [] for split in index.splits}
        self.class_counts = {split: np.zeros(len(index.classes), np.int64) for split in index.splits}
        self.sizes: dict[str, list[Ids]] = {split: [] for split in index.splits}
        self.sums = np.zeros((2, index.channels), np.int64)
        self.remarks: Remarks = {}

    def add(self, index: Index, split: str, shard: Shard, scan: ScannedSamples) -> None:
        """Adds the samples of a part of a shard."""
        usable = scan.usable
        for key, text in scan.problems.values():
            self.problems.append(Problem(index.place(shard), key, text))
        self.unusable[split] += scan.problems
        labels = scan.labels[usable]
        counts = (
            labels.sum(0, dtype=np.int64)
            if index.multi_label
            else np.bincount(labels, minlength=len(index.classes))
        )
        self.class_counts[split] += counts
        for key, text in scan.remarks:
            add(self.remarks, text, f"{index.place(shard)}: sample {key}")
        self.sizes[split].append(scan.sizes[usable])
        if split == "train":
            self.sums += scan.sums

    def usable(self, split: str) -> int:
        """Returns the number of usable samples of a split."""
        return sum(map(len, self.sizes[split]))

    def all_sizes(self, split: str) -> Ids:
        """Returns height and width of the usable images of a split, in pixels: int64 [n, 2]."""
        return np.concatenate([np.empty((0, 2), np.int64), *self.sizes[split]])

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation for index.json, from the usable samples of the train split."""
        return mean_std(self.sums, int(self.all_sizes("train").prod(1).sum()))


def examine(index: Index, splits: tuple[str, ...], *, on_progress: Progress = silent) -> Findings:
    """Reads and decodes every sample of some splits.

    Args:
        index: the data set.
        splits: which of its splits.
        on_progress: called now and then with the samples done and their total.

    Raises:
        UnsafeError: a shard has a member of a forbidden kind.
    """
    findings = Findings(index)
    total = sum(index.splits[split].samples for split in splits)
    done = 0
    with pillow_warnings():
        for split in splits:
            for number, shard in enumerate(index.splits[split].shards):
                try:
                    for scan in scanned(index, split, number, threads=usable_cores()):
                        findings.add(index, split, shard, scan)
                        done += len(scan.labels)
                        on_progress(done, total)
                except ShardError as error:
                    findings.problems.append(Problem(index.place(shard), None, error.problem))
                    begin, end = index.first_ids(split)[number : number + 2].tolist()
                    done += end - begin
                    findings.unusable[split] = [i for i in findings.unusable[split] if i < begin]
                    findings.unusable[split] += range(begin, end)
    return findings


def verify(index: Index, *, on_progress: Progress = silent) -> list[Problem]:
    """Reads and decodes a whole data set, and compares it with its index.

    Args:
        index: the data set, loaded with `strict=False`.
        on_progress: see `examine`.

    Returns:
        The problems; empty if there are none.

    Raises:
        UnsafeError: a shard has a member of a forbidden kind.
    """
    findings = examine(index, tuple(index.splits), on_progress=on_progress)
    problems = findings.problems
    for path in extra_shards(index):
        problems.append(Problem(str(path), None, "this shard is not in index.json"))
    place = f"{index.base or index.folder}/index.json"
    for split in index.splits:
        problems += double_keys(index, split)
    if problems:
        return problems
    for split, content in index.splits.items():
        if content.sizes is not None and content.sizes != sizes_of(*findings.all_sizes(split).T):
            problems.append(Problem(place, None, f"sizes of {split} do not match the shards"))
        if findings.class_counts[split].tolist() != list(content.class_counts):
            problems.append(Problem(place, None, f"class_counts of {split} do not match the shards"))
    if findings.mean_std() != (index.mean, index.std):
        problems.append(Problem(place, None, "mean or std do not match the train split"))
    return problems


def double_keys(index: Index, split: str) -> Iterator[Problem]:
    """Yields the samples of a split that are also in another of its shards: same key, label and image file.

    Many writers begin with the same key in every shard, so a key alone says nothing.
    """
    seen: set[_Described] = set()
    candidates: set[_Described] = set()
    shards = index.splits[split].shards
    for number in range(len(shards)):
        with suppress(ShardError):  # a shard that cannot be opened was reported before
            samples = set(_described(open_shard(index, split, number).contents))
            candidates |= samples & seen
            seen |= samples
    if not candidates:
        return
    found: set[tuple[str, int | bytes, bytes]] = set()
    for number, shard in enumerate(shards):
        with suppress(ShardError):
            tar = open_shard(index, split, number)
            for position, sample in enumerate(_described(tar.contents)):
                if sample not in candidates or position in tar.contents.problems:
                    continue
                key, _, label = sample
                identity = key, label, hashlib.sha256(tar.read(position)).digest()
                if identity in found:
                    yield Problem(index.place(shard), key, "is also in another shard of the split")
                found.add(identity)


_Described: TypeAlias = tuple[str, int, int | bytes]


def _described(contents: Contents) -> Iterator[_Described]:
    """Yields key, size of the image file and label of every sample; the row of several labels as bytes."""
    labels = contents.labels
    found = labels.tolist() if labels.ndim == 1 else [row.tobytes() for row in labels]
    yield from zip(contents.keys, contents.sizes.tolist(), found, strict=True)


def find_bad_samples(index: Index, split: str, say: Callable[[str], None]) -> Ids:
    """Reads and decodes all samples of a split once, and returns the ids of the bad ones.

    The result is kept in the user's cache until a shard changes. Any single process may call this. Nodes may
    have different files, so the ranks must combine their results.

    Args:
        index: the data set, loaded with `strict=False`.
        split: train or val.
        say: called when the search starts, and for every bad sample.

    Raises:
        UnsafeError: a shard has a member of a forbidden kind.
    """
    record = cache_folder() / "bad_samples" / f"{index.name}-{index.digest[:16]}-{split}.json"
    stamps = [_stamp(index, shard) for shard in index.splits[split].shards]
    with contextlib.ExitStack() as stack:
        with suppress(OSError):  # if the cache cannot be written, every process searches on its own
            wait = f"waiting for another process to check {index.name}/{split}"
            stack.enter_context(file_lock(record, lambda: say(wait)))
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(record.read_text())
            if kept["stamps"] == stamps:
                return np.array(kept["unusable"], np.int64)
        unusable = _search(index, split, say)
        remember(record, json.dumps({"stamps": stamps, "unusable": unusable}))
    return np.array(unusable, np.int64)


def _search(index: Index, split: str, say: Callable[[str], None]) -> list[int]:
    say(f"looking for bad samples in {index.name}/{split} once: {index.splits[split].samples:,} samples")
    findings = examine(index, (split,))
    for problem in findings.problems[:20]:
        sample = f"sample {problem.key}" if problem.key else "all its samples"
        say(f"skipped: {problem.place}: {sample}: {problem.text}")
    if len(findings.problems) > 20:
        say(f"skipped: {len(findings.problems) - 20:,} more; `disttrain data verify {index.name}` lists them")
    return findings.unusable[split]


def _stamp(index: Index, shard: Shard) -> list[int] | None:
    """Returns the stamp of a shard's file; None for a shard on a server or a missing one."""
    with suppress(OSError):
        return None if index.url(shard) else stamp(index.folder / shard.file)
    return None
