"""The records of metrics.jsonl and gpu.jsonl.

Every key in these files is a field here. Unknown numbers are None, and null in the file. In files of another
version, undeclared keys are ignored and missing keys are None. A field that only some runs have is UNSET in
the others and not written.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from disttrain.runs.jsonl import parts

Times = TypeVar("Times")

_WHOLE_BYTES = 2**24
_SAMPLES = 1000  # of a larger file
_MISSING: Any = None  # in a file of an older version


class StepTimes(msgspec.Struct, Generic[Times], frozen=True, gc=False, omit_defaults=True):
    """Milliseconds of a step, by phase."""

    data: Times = _MISSING
    """Waiting for samples."""
    to_device: Times = _MISSING
    """Copying samples from the host to the device."""
    augmentation: Times = _MISSING
    """Augmentation and normalization."""
    compute: Times = _MISSING
    """Forward and backward pass, without waiting for other ranks."""
    communication: Times = _MISSING
    """Waiting for the gradient all-reduce after the backward pass."""
    optimizer: Times = _MISSING
    """Optimizer and EMA of the weights."""
    logging: Times = _MISSING
    """Log points. This field and the next two are averaged over all steps."""
    evaluation: Times = _MISSING
    """Evaluations."""
    checkpoint: Times = _MISSING
    """Time for which checkpoints block training."""


class Process(msgspec.Struct, gc=False):
    """A process of a CPU run, at a log point."""

    rank: int
    host: str = ""
    cpu_pct: float | None = None
    """CPU time since the previous log point; 100 is one busy core."""
    memory_used_mib: float | None = None
    """Resident set size."""


class GpuMeans(msgspec.Struct, gc=False):
    """A GPU at a log point: mean readings since the previous log point, and peak memory."""

    host: str
    index: int | None
    """NVML index, or the number of the device file if each task sees only its own GPU."""
    uuid: str
    name: str | None = None
    memory_total_mib: int | None = None
    memory_shared: bool | None = None
    """Whether its memory is the system's, as that of an integrated GPU."""
    utilization_pct: float | None = None
    """Share of the time in which a kernel ran."""
    memory_utilization_pct: float | None = None
    """Share of the time in which the memory controller was busy."""
    memory_used_mib: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttled_power_pct: float | None = None
    """Share of the readings in which the power limit reduced the clocks."""
    throttled_thermal_pct: float | None = None
    """Share of the readings in which the temperature reduced the clocks."""
    sm_activity_pct: float | None = None
    """Share of the streaming multiprocessors that were busy."""
    critical_events: float | None = None
    """Xid errors and losses of the GPU since the start."""


class LogPoint(msgspec.Struct, tag="train", tag_field="kind", kw_only=True):
    """Means over the steps since the previous log point, without the values of each rank."""

    time: str | None = None
    """UTC, ISO 8601 with microseconds, as in every record of metrics.jsonl."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epoch of the last step, from 1."""
    samples: int
    """Samples trained on since the start of the run, over all ranks."""
    loss: float
    accuracy: float
    """0..1, on the augmented images."""
    lr: float
    """Learning rate of the last step."""
    images_per_s: float
    """Over all ranks."""
    step_time_s: float
    data_wait_pct: float
    """Share of the time spent waiting for data."""
    phases_ms: StepTimes[float] = StepTimes()
    """Means over the ranks."""
    device_flops_per_s: float | None = None
    """Model FLOP/s on one device."""
    mfu_pct: float | None = None
    """Model FLOP/s utilization: the share of the peak of the device."""
    grad_norm: float | None = None
    """Gradient norm of the last step, before clipping."""
    skipped: int | None = None
    """Unusable training samples."""
    processes: tuple[Process, ...] | UnsetType = UNSET
    """CPU runs only, in order of rank."""


class TrainRecord(LogPoint, kw_only=True):
    """A log point as written to metrics.jsonl."""

    ranks_ms: StepTimes[tuple[float, ...]] = StepTimes()
    """`phases_ms` of each rank."""
    gpus: tuple[GpuMeans, ...] | UnsetType = UNSET
    """Each GPU once, in order of rank."""
    weights: dict[str, str] | UnsetType = UNSET
    """With train.reproducible: a digest of each tensor of the model after the last step."""


class EvalRecord(msgspec.Struct, tag="eval", tag_field="kind", kw_only=True, omit_defaults=True):
    """An evaluation; fields that are None are not written."""

    time: str | None = None
    loss: float | None
    """Cross entropy; in multi-label data the binary one, as a mean over the classes."""
    accuracy: float
    """0..1; in multi-label data, the share of the samples whose labels are all predicted correctly."""
    correct: int
    total: int
    tta: str | None = None
    """The test-time augmentation, if any."""
    plain_accuracy: float | None = None
    """Accuracy without test-time augmentation."""
    plain_correct: int | None = None
    """Correct predictions without test-time augmentation."""
    macro_precision: float | None = None
    """Mean of the precision of the classes, 0..1 (runs/eval_metrics.py)."""
    macro_recall: float | None = None
    """Mean of the recall of the classes, 0..1; also called balanced accuracy."""
    macro_f1: float | None = None
    """Mean of the F1 of the classes, 0..1."""
    micro_f1: float | None = None
    """F1 of all labels together, 0..1; only of multi-label data."""
    map: float | None = None
    """Mean of the average precision of the classes that have samples, 0..1; only of multi-label data."""
    top5_accuracy: float | None = None
    """Share of the samples whose class is among the five best, 0..1; only for more than 5 classes."""
    calibration_error: float | None = None
    """Expected calibration error, 0..1."""
    skipped: int | None = None
    """Unusable validation samples."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs completed."""


class GpuReading(msgspec.Struct, gc=False, kw_only=True):
    """A line of gpu.jsonl: one NVML reading of one GPU."""

    time: str | None = None
    """UTC, ISO 8601 with milliseconds."""
    host: str = ""
    index: int | None = None
    uuid: str
    name: str | None = None
    utilization_pct: int | None = None
    """Share of the past second or less in which a kernel ran."""
    memory_utilization_pct: int | None = None
    """Share of the past second or less in which the memory controller was busy."""
    memory_used_mib: int | None = None
    memory_used_by_us_mib: int | None = None
    """Memory used by the processes of the run. None if NVML does not list them, as in most containers.
    This value, the power limit and the errors are up to 30 s old."""
    memory_total_mib: int | None = None
    memory_shared: bool | None = None
    """Whether its memory is the system's, as that of an integrated GPU; None where it is not known."""
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    """Reasons for reduced clocks; only `power` is usual under load."""
    sm_activity_pct: float | None = None
    """Share of busy streaming multiprocessors since the last reading; Hopper or newer."""
    tensor_activity_pct: float | None = None
    """Share of the time since the last reading in which tensor cores were busy; Hopper or newer."""
    pcie_rx_mib_per_s: float | None = None
    """Traffic is measured since the last reading, or for 20 ms every 30 s on older GPUs and drivers."""
    pcie_tx_mib_per_s: float | None = None
    nvlink_rx_mib_per_s: float | None = None
    nvlink_tx_mib_per_s: float | None = None
    ecc_corrected: int | None = None
    """Memory errors since the driver was loaded."""
    ecc_uncorrected: int | None = None
    xids: tuple[int, ...] | None = None
    """Critical errors (Xids) since the last reading."""
    lost: bool | None = None
    """Whether the GPU was lost; this is then its last reading."""


READINGS = tuple(
    name for name in GpuReading.__struct_fields__ if name not in ("time", "host", "index", "uuid", "name")
)
"""The fields of GpuReading that NVML measures."""

METRICS: msgspec.json.Decoder[TrainRecord | EvalRecord] = msgspec.json.Decoder(TrainRecord | EvalRecord)
CURVES: msgspec.json.Decoder[LogPoint | EvalRecord] = msgspec.json.Decoder(LogPoint | EvalRecord)
GPUS = msgspec.json.Decoder(GpuReading)


def read_metrics(path: Path) -> tuple[list[LogPoint], list[EvalRecord], int]:
    """Returns the log points and evaluations of metrics.jsonl, and the number of unreadable lines."""
    trained: list[LogPoint] = []
    evals: list[EvalRecord] = []
    unread = 0
    for part in parts(path, CURVES):
        trained += (record for record in part.rows if isinstance(record, LogPoint))
        evals += (record for record in part.rows if isinstance(record, EvalRecord))
        unread += part.unread
    return trained, evals, unread


def thinned(path: Path) -> Iterator[TrainRecord | EvalRecord]:
    """Yields the records of metrics.jsonl in order; of a large file, single ones at equal distances."""
    size = path.stat().st_size if path.exists() else 0
    if size <= _WHOLE_BYTES:
        places: list[tuple[int, int | None]] = [(0, None)]
    else:
        places = [(begin, begin + 1) for begin in range(0, size, size // _SAMPLES)]
    for begin, end in places:
        for part in parts(path, METRICS, begin, end):
            yield from part.rows


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
