"""What a run writes down of itself: the one declaration of the lines of metrics.jsonl and gpu.jsonl.

Every key that is written is a field here, and a number that is not known is None, in the file null. Of a file
that another version wrote, keys that are not declared are passed over, and those that are missing are None;
what only some runs have is left out of the others and UNSET.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from disttrain.runs.jsonl import parts

Times = TypeVar("Times")

_MISSING: Any = None  # in a file of an older version


class StepTimes(msgspec.Struct, Generic[Times], frozen=True, gc=False, omit_defaults=True):
    """Milliseconds of a step, by what they went into."""

    data: Times = _MISSING
    """Waiting for samples."""
    to_device: Times = _MISSING
    """Copying them from the host to the device."""
    augmentation: Times = _MISSING
    """Their augmentation and normalization."""
    compute: Times = _MISSING
    """Forward and backward pass, without the wait for others."""
    communication: Times = _MISSING
    """Waiting for the reduction of the gradients after one's own are computed."""
    optimizer: Times = _MISSING
    """Optimizer and moving average."""
    logging: Times = _MISSING
    """Log points, spread over the steps, as are the next two."""
    evaluation: Times = _MISSING
    """Evaluations."""
    checkpoint: Times = _MISSING
    """What checkpoints take of the training."""


class Process(msgspec.Struct, gc=False):
    """A process of a run on CPUs, at a log point."""

    rank: int
    host: str = ""
    cpu_pct: float | None = None
    """Processor time since the log point before; 100 is one core kept busy."""
    memory_used_mib: float | None = None
    """Resident set."""


class GpuMeans(msgspec.Struct, gc=False):
    """A GPU at a log point: means of the readings since the one before, of memory the most."""

    host: str
    index: int | None
    """NVML's, or where each task sees only its own GPU the number of the device file."""
    uuid: str
    name: str | None = None
    memory_total_mib: int | None = None
    memory_shared: bool | None = None
    """Whether its memory is the system's, as that of an integrated GPU."""
    utilization_pct: float | None = None
    """Share of the time in which a kernel ran."""
    memory_utilization_pct: float | None = None
    """The same for the memory controller."""
    memory_used_mib: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttled_power_pct: float | None = None
    """Share of the readings in which the clocks were held down for the power."""
    throttled_thermal_pct: float | None = None
    """Share of those in which they were for the temperature."""
    sm_activity_pct: float | None = None
    """Share of the multiprocessors that were at work."""
    critical_events: float | None = None
    """Xids, and the loss of the GPU, since the start."""


class LogPoint(msgspec.Struct, tag="train", tag_field="kind", kw_only=True):
    """The means of the steps since the log point before, without what grows with the number of ranks."""

    time: str | None = None
    """UTC, ISO 8601 with microseconds, as in every record of metrics.jsonl."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """That of the step, from 1."""
    samples: int
    """Trained on in the whole run, over all ranks."""
    loss: float
    accuracy: float
    """0..1, of the images as they were augmented."""
    lr: float
    """Learning rate of the last step."""
    images_per_s: float
    """Over all ranks."""
    step_time_s: float
    data_wait_pct: float
    """Share of the time that went into waiting for data."""
    phases_ms: StepTimes[float] = StepTimes()
    """Means over the ranks."""
    device_flops_per_s: float | None = None
    """Arithmetic of the model on one device."""
    mfu_pct: float | None = None
    """That as a share of the most that the device does."""
    grad_norm: float | None = None
    """Of the last step before it was clipped, if that is done."""
    skipped: int | None = None
    """Training samples that cannot be used."""
    processes: tuple[Process, ...] | UnsetType = UNSET
    """On CPUs, in order of rank."""


class TrainRecord(LogPoint, kw_only=True):
    """A log point as it is written."""

    ranks_ms: StepTimes[tuple[float, ...]] = StepTimes()
    """`phases_ms` of each rank."""
    gpus: tuple[GpuMeans, ...] | UnsetType = UNSET
    """Each once, in order of the ranks."""


class EvalRecord(msgspec.Struct, tag="eval", tag_field="kind", kw_only=True, omit_defaults=True):
    """An evaluation; what is None is not written."""

    time: str | None = None
    loss: float | None
    """Cross entropy."""
    accuracy: float
    """0..1."""
    correct: int
    total: int
    tta: str | None = None
    """The test-time augmentation, if there was one."""
    plain_accuracy: float | None = None
    """Without it."""
    plain_correct: int | None = None
    """Without it."""
    skipped: int | None = None
    """Validation samples that cannot be used."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs completed."""


class GpuReading(msgspec.Struct, gc=False, kw_only=True):
    """A line of gpu.jsonl: what NVML said of a GPU at a moment."""

    time: str | None = None
    """UTC, ISO 8601 with milliseconds."""
    host: str = ""
    index: int | None = None
    uuid: str
    name: str | None = None
    utilization_pct: int | None = None
    """Share of the past second, or less, in which a kernel ran."""
    memory_utilization_pct: int | None = None
    """The same for the memory controller."""
    memory_used_mib: int | None = None
    memory_used_by_us_mib: int | None = None
    """By the processes of the run; up to 30 s old, as are the power limit and the errors. None where NVML
    lists none of them, as in most containers."""
    memory_total_mib: int | None = None
    memory_shared: bool | None = None
    """Whether its memory is the system's, as that of an integrated GPU; None where it is not known."""
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    """What holds the clocks down; only `power` is usual under load."""
    sm_activity_pct: float | None = None
    """Multiprocessors at work since the last reading; from Hopper on."""
    tensor_activity_pct: float | None = None
    """Time since the last reading in which tensor cores were at work; from Hopper on."""
    pcie_rx_mib_per_s: float | None = None
    """Traffic is that since the last reading; on older drivers of older GPUs, of 20 ms every 30 s."""
    pcie_tx_mib_per_s: float | None = None
    nvlink_rx_mib_per_s: float | None = None
    nvlink_tx_mib_per_s: float | None = None
    ecc_corrected: int | None = None
    """Errors of the memory since the driver was loaded."""
    ecc_uncorrected: int | None = None
    xids: tuple[int, ...] | None = None
    """Critical errors since the last reading."""
    lost: bool | None = None
    """Whether the GPU went; then it is its last reading."""


READINGS = tuple(
    name for name in GpuReading.__struct_fields__ if name not in ("time", "host", "index", "uuid", "name")
)
"""What NVML says, of the fields of GpuReading."""

METRICS: msgspec.json.Decoder[TrainRecord | EvalRecord] = msgspec.json.Decoder(TrainRecord | EvalRecord)
CURVES: msgspec.json.Decoder[LogPoint | EvalRecord] = msgspec.json.Decoder(LogPoint | EvalRecord)
GPUS = msgspec.json.Decoder(GpuReading)


def read_metrics(path: Path) -> tuple[list[LogPoint], list[EvalRecord], int]:
    """Returns the log points and the evaluations of metrics.jsonl, and how many lines could not be read."""
    trained: list[LogPoint] = []
    evals: list[EvalRecord] = []
    unread = 0
    for part in parts(path, CURVES):
        trained += (record for record in part.rows if isinstance(record, LogPoint))
        evals += (record for record in part.rows if isinstance(record, EvalRecord))
        unread += part.unread
    return trained, evals, unread


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of those that are known, or None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
