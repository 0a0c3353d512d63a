"""What limits the speed of a run, in one sentence with its numbers and the setting that helps: pure rules."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from disttrain.runs.records import GpuMeans, TrainRecord, mean
from disttrain.units import time_text

Name = Literal[
    "throttled",
    "straggler",
    "input-bound",
    "communication-bound",
    "launch-bound",
    "memory-tight",
    "compute-bound",
]

THROTTLED_PCT = 20.0  # of the readings in which a GPU lowered its clocks
STRAGGLER = 1.25  # times the median time of the other ranks,
STRAGGLER_PCT = 10.0  # and the excess as a percentage of a step: the others wait that long
INPUT_PCT = 10.0  # of a step spent waiting for data
COMMUNICATION_PCT = 20.0  # of a step spent waiting for the reduction of gradients
IDLE_GPU_PCT = 70.0  # utilisation below which a GPU that does not wait for data is underused
TIGHT_PCT = 95.0  # of a GPU's memory in use


@dataclass(frozen=True)
class Evidence:
    """Means over some log points.

    Attributes:
        step_s: seconds of a step.
        data_s: seconds of a step spent waiting for data; a mean over the ranks, like the next three.
        to_device_s: seconds spent copying samples to the device.
        augmentation_s: seconds spent augmenting them.
        communication_s: seconds a rank waits for the all-reduce after computing its own gradients.
        own_s: seconds of a step that each rank works without waiting for others.
        where: the name of each rank, such as `rank 3 on gpu07`.
        on_gpu: whether the ranks compute on GPUs.
        cache: where the decoded samples are: device, host or none.
        precision: the arithmetic.
        compiled: whether the model is compiled.
        graph: whether the steps are replayed as a CUDA graph; None if they cannot be.
        staged: whether the samples go through the user's own stages, which run in every epoch.
        utilization_pct: mean over the GPUs, or None.
        memory_pct: share of the memory in use on the fullest GPU, or None.
        throttled_pct: for each GPU, the share of readings in which heat lowered its clocks; None if unknown.
            The power limit also lowers them at full load, which is normal and not counted.
        gpu_names: the name of each GPU.
        peak_pct: model FLOP/s as a percentage of the device's peak (MFU), or None.
    """

    step_s: float = 0.0
    data_s: float = 0.0
    to_device_s: float = 0.0
    augmentation_s: float = 0.0
    communication_s: float = 0.0
    own_s: Sequence[float] = ()
    where: Sequence[str] = ()
    on_gpu: bool = False
    cache: str = "host"
    precision: str = "fp32"
    compiled: bool = False
    graph: bool | None = None
    staged: bool = False
    utilization_pct: float | None = None
    memory_pct: float | None = None
    throttled_pct: Sequence[float | None] = ()
    gpu_names: Sequence[str] = ()
    peak_pct: float | None = None

    @property
    def input_s(self) -> float:
        """Seconds of a step spent loading, copying and augmenting samples."""
        return self.data_s + self.to_device_s + self.augmentation_s


@dataclass(frozen=True)
class Verdict:
    """What limits the speed of a run.

    Attributes:
        name: one word for it.
        text: one sentence: the finding, its numbers, what helps.
        key: the config key that helps, or None.
    """

    name: Name
    text: str
    key: str | None


def judge(evidence: Evidence) -> Verdict:
    """Returns the first cause that applies. A cause that distorts the figures of another comes before it."""
    causes = (_throttled, _straggler, _input_bound, _communication_bound, _launch_bound, _memory_tight)
    found = (cause(evidence) for cause in causes)
    return next((verdict for verdict in found if verdict is not None), None) or _compute_bound(evidence)


def _verdict(name: Name, text: str, key: str | None = None) -> Verdict:
    return Verdict(name, f"{name}: {text}", key)


def _throttled(e: Evidence) -> Verdict | None:
    hot = [(pct, name) for pct, name in zip(e.throttled_pct, e.gpu_names, strict=True) if pct is not None]
    pct, name = max(hot, default=(0.0, ""))
    if pct < THROTTLED_PCT:
        return None
    finding = f"{name} overheated and lowered its clocks in {pct:.0f} % of the readings"
    return _verdict("throttled", f"{finding}; check its cooling, no setting helps")


def _straggler(e: Evidence) -> Verdict | None:
    if len(e.own_s) < 2:
        return None
    slowest = max(range(len(e.own_s)), key=lambda rank: e.own_s[rank])
    own_s = e.own_s[slowest]
    median_s = statistics.median(own for rank, own in enumerate(e.own_s) if rank != slowest)
    if own_s < STRAGGLER * median_s or _share(own_s - median_s, e.step_s) < STRAGGLER_PCT:
        return None
    return _verdict(
        "straggler",
        f"{e.where[slowest]} needs {time_text(own_s)} for its own work in a step, the median of the others "
        f"is {time_text(median_s)}, and all wait for it; look for other processes on that host",
    )


def _input_bound(e: Evidence) -> Verdict | None:
    pct = _share(e.input_s, e.step_s)
    if pct < INPUT_PCT:
        return None
    what, help_, key = _input(e)
    text = f"{pct:.0f} % of a step ({time_text(e.input_s)}) is spent {what}; {help_}"
    return _verdict("input-bound", text, key)


def _input(e: Evidence) -> tuple[str, str, str | None]:
    """Returns the slowest part of loading samples, what helps, and its config key."""
    if e.augmentation_s > max(e.data_s, e.to_device_s):
        return "augmenting images", "disable augmentations that the recipe does not need", "augment"
    if e.to_device_s > e.data_s:
        help_ = "data.cache=device keeps the images there if they fit"
        return "copying images to the GPU", help_, "data.cache"
    if e.cache == "none":
        if e.staged:
            return "waiting for data", "raise data.workers, or make the stages cheaper", "data.workers"
        return "waiting for data", "decode once with data.cache=host, or raise data.workers", "data.cache"
    if e.on_gpu and e.cache == "host":
        help_ = "data.cache=device keeps the samples on the GPU if they fit"
        return "waiting for data", help_, "data.cache"
    return "collecting samples", "the network is too small to hide it, and no setting helps", None


def _communication_bound(e: Evidence) -> Verdict | None:
    pct = _share(e.communication_s, e.step_s)
    if pct < COMMUNICATION_PCT:
        return None
    return _verdict(
        "communication-bound",
        f"{pct:.0f} % of a step ({time_text(e.communication_s)}) is spent waiting "
        "for the gradients of other ranks; raise train.batch_size, or use fewer processes",
        "train.batch_size",
    )


def _launch_bound(e: Evidence) -> Verdict | None:
    if not e.on_gpu or e.utilization_pct is None or e.utilization_pct >= IDLE_GPU_PCT:
        return None
    switch = None
    if e.graph is not None or not e.compiled:
        switch = {True: None, False: "train.cuda_graph", None: "train.compile"}[e.graph]
    help_ = "raise train.batch_size" + (f" or set {switch}=true" if switch else "")
    return _verdict(
        "launch-bound",
        f"the GPUs are busy {e.utilization_pct:.0f} % of the time and do not wait for data: the "
        f"steps ({time_text(e.step_s)}) are too small; {help_}",
        switch or "train.batch_size",
    )


def _memory_tight(e: Evidence) -> Verdict | None:
    if e.memory_pct is None or e.memory_pct < TIGHT_PCT:
        return None
    text = f"{e.memory_pct:.0f} % of a GPU's memory is in use; raise train.accumulate to leave some free"
    return _verdict("memory-tight", text, "train.accumulate")


def _compute_bound(e: Evidence) -> Verdict:
    rest_pct = 100 - _share(e.input_s + e.communication_s, e.step_s)
    text = f"{rest_pct:.0f} % of a step ({time_text(e.step_s)}) is spent computing"
    if e.peak_pct is not None:
        text += f", at {e.peak_pct:.0f} % of the device's peak (MFU)"
    if e.precision == "fp32" and e.on_gpu:
        return _verdict("compute-bound", f"{text}; train.precision=bf16 speeds it up", "train.precision")
    more = "GPUs" if e.on_gpu else "cores or a GPU"
    return _verdict("compute-bound", f"{text}, which is good; only more {more} would make it faster")


def places_of(hosts: Sequence[str]) -> list[str]:
    """Returns the words for each rank, by the hosts of the ranks, as `Evidence.where` has them."""
    return [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]


def evidence(records: Sequence[TrainRecord], setting: Evidence) -> Evidence | None:
    """Returns the means of some train records, or None without records.

    Args:
        records: of a run; those with another number of ranks are ignored.
        setting: has what stays the same: the ranks, `cache`, `precision`, `compiled`, `graph` and `staged`.
    """
    records = [record for record in records if len(record.ranks_ms.compute) == len(setting.where)]
    if not records:
        return None
    own_ms = [getattr(record.ranks_ms, phase) for record in records for phase in _OWN]
    gpus: dict[tuple[str, int | None], list[GpuMeans]] = {}
    for record in records:
        for gpu in record.gpus or ():
            gpus.setdefault((gpu.host, gpu.index), []).append(gpu)
    full = [
        100 * gpu.memory_used_mib / gpu.memory_total_mib
        for gpu in records[-1].gpus or ()
        if gpu.memory_used_mib is not None and gpu.memory_total_mib
    ]
    return replace(
        setting,
        step_s=statistics.fmean(record.step_time_s for record in records),
        data_s=statistics.fmean(record.phases_ms.data for record in records) / 1000,
        to_device_s=statistics.fmean(record.phases_ms.to_device for record in records) / 1000,
        augmentation_s=statistics.fmean(record.phases_ms.augmentation for record in records) / 1000,
        communication_s=statistics.fmean(record.phases_ms.communication for record in records) / 1000,
        own_s=[sum(times_ms) / len(records) / 1000 for times_ms in zip(*own_ms, strict=True)],
        on_gpu=bool(gpus),
        utilization_pct=mean(mean(gpu.utilization_pct for gpu in rows) for rows in gpus.values()),
        memory_pct=max(full, default=None),
        throttled_pct=[mean(gpu.throttled_thermal_pct for gpu in rows) for rows in gpus.values()],
        peak_pct=mean(record.mfu_pct for record in records),
        gpu_names=[f"GPU {index} on {host}" for host, index in gpus],
    )


# Phases in which a rank does not wait for others.
_OWN = ("data", "to_device", "augmentation", "compute", "optimizer")


def _share(part_s: float, whole_s: float) -> float:
    return 100 * part_s / whole_s if whole_s > 0 else 0.0
