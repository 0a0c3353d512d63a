"""The file index.json: its fields, and what makes it wrong.

Images of one size make an index of version 1. Images of several sizes make one of version 2, which has their
range in place of a height and a width. Multi-label data make one of version 3, which has either of the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import Field

from disttrain.errors import UnsafeError, UsageError
from disttrain.shards.label_format import LabelPlace
from disttrain.shards.remote import check_url
from disttrain.urls import is_url

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SHARD = re.compile(rf"{_NAME}(/{_NAME})*")
INDEX_LIMIT_BYTES = 2**25
VERSIONS = (1, 2, 3)
"""Of the index: 1 for images of one size, 2 for images of several sizes, 3 for multi-label data."""
MAX_SHARD_PIXELS = 4096 * 4096
"""The limit for images of one size, because whole batches must fit into memory."""
_LEAST_BYTES = 512  # of a sample in a tar
_Count = Annotated[int, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Shard:
    """One tar."""

    file: str
    """Path relative to the folder of the index, or an address on a server (`urls.is_url`)."""
    samples: _Count
    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the images of a split, in pixels, upright.

    Attributes:
        height: the least and the largest.
        width: the least and the largest.
        sides: number of images by the length of the shorter side; see `SIDE_BINS`.
    """

    height: tuple[_Count, _Count]
    width: tuple[_Count, _Count]
    sides: tuple[Annotated[int, Field(ge=0)], ...]


SIDE_BINS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
"""Upper ends of the bins of `Sizes.sides`; the last bin, after them, has no upper end."""


@dataclass(frozen=True)
class Split:
    """The shards of a split, in order.

    Attributes:
        samples: their number.
        shards: the tars.
        class_counts: number of samples of each class; in multi-label data, of those that have this label.
        sizes: of the images, unless all have one size.
    """

    samples: _Count
    shards: tuple[Shard, ...]
    class_counts: tuple[Annotated[int, Field(ge=0)], ...]
    sizes: Sizes | None = None


class IndexFile(pydantic.BaseModel):
    """The contents of index.json."""

    model_config = pydantic.ConfigDict(frozen=True)

    version: Literal[1, 2, 3]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    channels: Literal[1, 3]
    stored_height: Annotated[_Count | None, Field(alias="height")] = None  # None: several sizes
    stored_width: Annotated[_Count | None, Field(alias="width")] = None
    mean: tuple[_Fraction, ...]
    std: tuple[_Fraction, ...]
    splits: dict[str, Split]
    label: LabelPlace | None = None  # not a number in KEY.cls

    @property
    def multi_label(self) -> bool:
        """Whether a sample has any number of labels."""
        return self.version == 3

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits, in order."""
        return [shard for split in self.splits.values() for shard in split.shards]


def check_index(text: bytes) -> IndexFile:
    """Returns the contents of an index.json.

    Raises:
        ValueError: it is damaged, inconsistent or too large; the message is the reason.
        UnsafeError: it names a file that may not be a shard.
    """
    if len(text) > INDEX_LIMIT_BYTES:
        raise ValueError(f"{len(text)} bytes, over the limit of {INDEX_LIMIT_BYTES}")
    try:
        content = IndexFile.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    for shard in content.shards:
        if not _is_place(shard.file):
            raise UnsafeError(
                f"refused to open {shard.file!r}: a shard must be a file in the folder of its index "
                "or an http(s)://, s3://, gs:// or hf:// address"
            )
    if problem := _contradiction(content):
        raise ValueError(problem)
    return content


def _is_place(file: str) -> bool:
    """Returns whether this may be a shard: a path in the folder of the index, or an address on a server."""
    if not is_url(file):
        return _SHARD.fullmatch(file) is not None
    try:
        check_url(file)
    except (UnsafeError, UsageError):
        return False
    return True


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "not valid JSON"
    if first["loc"] == ("version",) and first["type"] != "missing":
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        return f"format version {first['input']!r}, but this disttrain reads versions {known}"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _contradiction(content: IndexFile) -> str | None:
    """Returns the first inconsistency between the fields of an index, or None."""
    if not len(content.mean) == len(content.std) == content.channels:
        return f"mean and std must have {content.channels} values, one per channel"
    height, width = content.stored_height, content.stored_width
    fits = content.multi_label or (content.version == 1) == (height is not None)
    if not fits or (height is None) != (width is None):
        has = {1: "needs", 2: "has no"}.get(content.version, "needs both or none of")
        return f"version {content.version} {has} height and width"
    if height and width and height * width > MAX_SHARD_PIXELS:
        return f"images of {width}x{height} are over the limit of {MAX_SHARD_PIXELS} pixels"
    if "train" not in content.splits:
        return "splits: train is missing"
    if problem := _wrong_sizes(content):
        return problem
    for name, split in content.splits.items():
        if len(split.class_counts) != len(content.classes):
            return f"splits.{name}.class_counts: {len(split.class_counts)} for {len(content.classes)} classes"
        total, counted = sum(shard.samples for shard in split.shards), sum(split.class_counts)
        most = max(split.class_counts) if content.multi_label else counted
        if not split.samples == total >= most:  # samples without a valid label have no class
            return f"splits.{name}: {split.samples} samples, but {total} in shards and {counted} in classes"
    for shard in content.shards:
        if shard.samples * _LEAST_BYTES > shard.bytes:
            return f"{shard.file}: {shard.bytes} bytes are too few for {shard.samples} samples"
    for field in ("file", "sha256"):
        seen = set[str]()
        for shard in content.shards:
            if getattr(shard, field) in seen:
                return f"the shard {shard.file} is listed twice (same {field})"
            seen.add(getattr(shard, field))
    return None


def _wrong_sizes(content: IndexFile) -> str | None:
    for name, split in content.splits.items():
        if (split.sizes is None) != (content.stored_height is not None):
            only = "only for" if split.sizes else "needed for"
            return f"splits.{name}.sizes: {only} images of several sizes"
        if split.sizes is None:
            continue
        if any(least > most for least, most in (split.sizes.height, split.sizes.width)):
            return f"splits.{name}.sizes: the least is larger than the largest"
        if len(split.sizes.sides) != len(SIDE_BINS) + 1 or sum(split.sizes.sides) > split.samples:
            return f"splits.{name}.sizes.sides: does not match its samples"
    return None


def version_of(height: int | None, *, multi_label: bool) -> Literal[1, 2, 3]:
    """Returns the version of an index; `height` is None for images of several sizes."""
    if multi_label:
        return 3
    return 2 if height is None else 1


def one_size(sizes: Set[tuple[int, int]]) -> tuple[int, int] | tuple[None, None]:
    """Returns height and width if all images have them, and whole batches fit into memory, else None twice.

    Args:
        sizes: height and width of every image, at least one.
    """
    height, width = next(iter(sizes))
    return (height, width) if len(sizes) == 1 and height * width <= MAX_SHARD_PIXELS else (None, None)


def sizes_of(heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]) -> Sizes:
    """Returns the summary of the sizes of some images, at least one: int64 [n] each."""
    import numpy as np

    sides = np.bincount(np.searchsorted(SIDE_BINS, np.minimum(heights, widths)), minlength=len(SIDE_BINS) + 1)
    return Sizes(
        (int(heights.min()), int(heights.max())),
        (int(widths.min()), int(widths.max())),
        tuple(sides.tolist()),
    )


def mean_std(sums: npt.NDArray[np.int64], pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel, of pixels in 0..1, from exact integer sums.

    Args:
        sums: sums of the pixels; see `pixel_sums`.
        pixels: number of pixels.
    """
    pairs = list(zip(*sums.tolist(), strict=True))
    mean = tuple(total / (255 * pixels) for total, _ in pairs)
    std = tuple(math.sqrt(pixels * square - total**2) / (255 * pixels) for total, square in pairs)
    return mean, std


def index_bytes(content: IndexFile) -> bytes:
    """Returns the contents of the file index.json."""
    return (
        json.dumps(content.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1) + "\n"
    ).encode()
