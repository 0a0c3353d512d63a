"""Chooses the settings that suit this machine: precision, memory order, compilation, threads, bucket size.

The precision is part of the experiment, so a rule chooses it. The other settings follow a rule if one is
known, otherwise a measurement of the real model. Measurements take at most a fiftieth of the run's expected
time, and are skipped for runs of less than a minute. All ranks measure together and choose the same. env.json
has the choices and their reasons. Checkpoints have the settings, so that a resumed run computes the same way.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from disttrain.config import TrainConfig
from disttrain.training.loss import all_scores
from disttrain.units import time_text

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

SHORT_RUN_S = 60.0  # a shorter run is not worth a measurement
BUDGET = 0.02  # share of the run's time for measurements
PROBE_BATCH = 128  # most images in a measured pass on a CPU; a larger batch would show nothing more
_WIN = 0.97  # a setting must take at most this share of the default's time to replace it
_NEAR = 1.25  # a single measurement cannot distinguish times within this factor of the fastest
_ROUNDS = 9  # in which settings with similar times are measured again
_COMPILE_S = 45.0  # to compile a network of some twenty layers for a GPU
_COMPILE_WIN = 0.95  # compiled if that takes at most this share of the eager time
_REPEATS = 3  # fewest passes of a measurement


@dataclass(frozen=True)
class Settings:
    """How the forward and backward pass is computed.

    Attributes:
        precision: the arithmetic.
        channels_last: whether the memory order is NHWC.
        compiled: whether torch.compile compiles the model.
        threads: CPU threads of this process.
    """

    precision: Precision
    channels_last: bool
    compiled: bool
    threads: int

    def __str__(self) -> str:
        order = "channels_last" if self.channels_last else "channels_first"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.precision}, {order}{', compiled' * self.compiled}, {threads}"


class Choice(NamedTuple):
    """An automatic choice and its reason."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}"


class Chosen(NamedTuple):
    """The settings of a run, and the reason for each."""

    settings: Settings
    reasons: dict[str, Choice]


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a run.

    Attributes:
        model: the network on its device, in fp32; not modified.
        batch: images in one forward pass.
        image: channels, height and width.
        classes: number of classes.
        passes: forward and backward passes in the rest of the run.
        world_size: number of ranks.
    """

    model: nn.Module
    batch: int
    image: tuple[int, int, int]
    classes: int
    passes: int
    world_size: int


def choose(
    config: TrainConfig, work: Workload, *, threads: int, saved: Mapping[str, Any] | None = None
) -> Chosen:
    """Chooses the settings of a run. Every rank calls this; all get the same settings.

    Args:
        config: the user's settings are kept, the others are chosen.
        work: what is computed.
        threads: CPU threads that this process may use.
        saved: the settings in the checkpoint, with its `device` and `world_size`, or None. They are kept if
            this machine allows it, so that the resumed run is the same to the last bit.
    """
    device = next(work.model.parameters()).device
    if config.reproducible and device.type == "cpu":
        threads = 1
    settings, reasons = _rules(config, device, threads, saved["precision"] if saved else None)
    unknown = next((key for key in _FIELDS if key not in reasons), None)
    if saved and (saved["device"], saved["world_size"]) == (device.type, work.world_size):
        kept = {} if unknown is None else {unknown: _FIELDS[unknown]}
        if saved["threads"] < threads and not config.reproducible:
            kept["threads"] = "threads"
        settings = replace(settings, **{field: saved[field] for field in kept.values()})
        reasons |= {key: Choice(_shown(settings, key), "as in the checkpoint") for key in kept}
    elif unknown is not None and config.reproducible:
        why = "train.reproducible: another run might measure other times"
        reasons[unknown] = Choice(_shown(settings, unknown), why)
    elif unknown is not None:
        settings, found = _measured(Probe(work), settings, unknown)
        reasons |= found
    why = "cores divided by processes, or OMP_NUM_THREADS"
    if config.reproducible and device.type == "cpu":
        why = "train.reproducible: the number of threads changes the order of sums"
    reasons.setdefault("threads", Choice(str(threads), why))
    return Chosen(settings, reasons)


def bucket_mib(parameters: int, device: torch.device) -> tuple[float, str]:
    """Returns the size of DDP's gradient buckets in MiB for the trained parameters, and why."""
    size = 4 * parameters / 2**20
    if device.type == "cpu" or size <= 4:
        # One reduction means fewer messages. On a CPU, computation and communication share the cores.
        return size + 1, f"one bucket for {size:.1f} MiB of gradients"
    bucket = min(25.0, size / 4)
    return bucket, f"{size:.1f} MiB of gradients; a bucket is reduced while the next is computed"


def allow_tf32(allowed: bool) -> None:
    """Sets whether a GPU computes fp32 matrix products and convolutions in tf32."""
    # The older of torch's two interfaces, because torch.export reads it and fails after use of the newer one.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of a forward pass in a precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


_FIELDS = {"channels_last": "channels_last", "compile": "compiled"}
"""Config keys that may be measured, the first on a CPU and the second on a GPU; and fields of `Settings`."""


def _rules(
    config: TrainConfig, device: torch.device, threads: int, fixed_precision: Precision | None
) -> tuple[Settings, dict[str, Choice]]:
    """Returns the default settings, and the reason for each setting that needs no measurement."""
    reasons: dict[str, Choice] = {}
    if config.precision != "auto":
        precision: Precision = config.precision
        reasons["precision"] = Choice(precision, f"train.precision = {precision}")
    elif fixed_precision is not None and (device.type == "cuda" or fixed_precision in {"fp32", "bf16"}):
        precision = fixed_precision
        reasons["precision"] = Choice(precision, "as in the checkpoint")
    elif device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
        reasons["precision"] = Choice(precision, f"a GPU with{'' if has_bf16 else 'out'} bf16")
    else:
        precision, reasons["precision"] = "fp32", Choice("fp32", "a CPU")
    channels_last = config.channels_last is not False
    if config.channels_last != "auto":
        reasons["channels_last"] = Choice(str(channels_last).lower(), "train.channels_last")
    elif device.type == "cuda":
        reasons["channels_last"] = Choice("true", "a GPU")
    compiled = config.compile is True
    if config.compile != "auto":
        reasons["compile"] = Choice(str(compiled).lower(), "train.compile")
    elif device.type == "cpu":
        reasons["compile"] = Choice("false", "a CPU, where it makes CNNs slower")
    return Settings(precision, channels_last, compiled, threads), reasons


def _measured(probe: Probe, plain: Settings, key: str) -> tuple[Settings, dict[str, Choice]]:
    """Chooses one key by measurement, and on a CPU the threads. Every rank calls this.

    `plain` has the default settings.

    Returns:
        The settings to use, and the reasons for the measured ones.
    """
    try:
        plain_s = probe.seconds(plain)
    except ProbeError as error:
        return plain, {key: Choice(_shown(plain, key), f"cannot be measured: {error}")}
    run_s = plain_s * probe.passes
    if run_s < SHORT_RUN_S:
        text = f"a run of about {run_s:.0f} s is too short to measure"
        return plain, {key: Choice(_shown(plain, key), text)}
    if key == "compile":
        return _compiled_or_not(probe, plain, plain_s)
    budget = BUDGET * run_s
    seconds = {plain: plain_s}
    other = replace(plain, channels_last=False)
    if probe.spent_s < budget:
        seconds[other] = _seconds_or_never(probe, other)
    best = _best(plain, seconds)
    while best.threads > 1 and probe.spent_s < budget:
        fewer = replace(best, threads=best.threads // 2)
        seconds[fewer] = _seconds_or_never(probe, fewer)
        if _best(plain, seconds) != fewer:
            break
        best = fewer
    _measure_in_turns(probe, seconds, budget)
    best, table = _best(plain, seconds), _table(seconds)
    reasons = {key: Choice(_shown(best, key), table)}
    if best.threads != plain.threads:
        reasons["threads"] = Choice(str(best.threads), table)
    return best, reasons


def _compiled_or_not(probe: Probe, plain: Settings, plain_s: float) -> tuple[Settings, dict[str, Choice]]:
    """Tries to compile if the run is so long that even a failed attempt costs little."""
    run_s, compiled, best = plain_s * probe.passes, replace(plain, compiled=True), plain
    if BUDGET * run_s < _COMPILE_S / 2:
        text = f"a run of about {run_s:,.0f} s is too short to compile"
    else:
        try:
            compiled_s = probe.seconds(compiled)
        except ProbeError as error:
            text = f"compiling fails: {error}"
        else:
            text = f"{time_text(compiled_s)} a pass, {time_text(plain_s)} eager"
            best = compiled if compiled_s <= _COMPILE_WIN * plain_s else plain
    return best, {"compile": Choice(_shown(best, "compile"), text)}


def _measure_in_turns(probe: Probe, seconds: dict[Settings, float], budget: float) -> None:
    """Measures the fastest settings again in turns, if their times are similar, and stores the medians.

    A single measurement depends on what else the machine does at that moment.
    """
    fastest = min(seconds.values())
    near = [settings for settings in seconds if seconds[settings] <= _NEAR * fastest]
    if len(near) == 1:
        return
    times = {settings: [seconds[settings]] for settings in near}
    round_s = probe.spent_s / len(seconds) * len(near)
    while len(times[near[0]]) <= _ROUNDS and probe.spent_s + round_s <= budget:
        near.reverse()  # so that no setting always follows the same other one
        for settings in near:
            times[settings].append(_seconds_or_never(probe, settings))
    seconds |= {settings: statistics.median(values) for settings, values in times.items()}


def _seconds_or_never(probe: Probe, settings: Settings) -> float:
    try:
        return probe.seconds(settings)
    except ProbeError:  # the model does not run with these settings
        return math.inf


def _best(plain: Settings, seconds: dict[Settings, float]) -> Settings:
    """Returns the fastest settings, or `plain` if the gain may be noise."""
    best = min(seconds, key=lambda settings: seconds[settings])
    return best if seconds[best] <= _WIN * seconds[plain] else plain


def _shown(settings: Settings, key: str) -> str:
    return str(getattr(settings, _FIELDS.get(key, key))).lower()


def _table(seconds: dict[Settings, float]) -> str:
    times = {settings: f"{time_text(value)} a pass" for settings, value in seconds.items()}
    return "; ".join(f"{one}: {'fails' if seconds[one] == math.inf else times[one]}" for one in seconds)


class ProbeError(Exception):
    """The model could not be measured; the message is the type of the error."""


class Probe:
    """Measures forward and backward passes of copies of a model, on all ranks at once.

    Attributes:
        device: of the model.
        batch: images in a pass.
        passes: passes of that size in the rest of the run.
        spent_s: seconds spent on measurements, the same on all ranks.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.device = next(work.model.parameters()).device
        self.batch = min(work.batch, PROBE_BATCH) if self.device.type == "cpu" else work.batch
        self.passes = work.passes * work.batch / self.batch
        self.spent_s = 0.0

    def seconds(self, settings: Settings, least_s: float = 0.05) -> float:
        """Returns the seconds of a pass: each rank's median, averaged over the ranks. Every rank calls this.

        Args:
            settings: how to compute.
            least_s: shortest time of the measurement on each rank, after two warm-up passes.

        Raises:
            ProbeError: it failed on a rank; raised on all ranks.
        """
        began = time.perf_counter()
        times, problem = [0.0], ""
        try:
            times = self._times(settings, least_s)
        except Exception as error:  # such as a model that cannot be copied, or an error of the compiler
            problem = type(error).__name__
        median, spent = statistics.median(times), time.perf_counter() - began
        seconds, spent, failed = self._mean([median, spent, float(problem != "")])
        self.spent_s += spent
        if failed:
            raise ProbeError(problem or "on another rank")
        return seconds

    def _times(self, settings: Settings, least_s: float) -> list[float]:
        times: list[float] = []
        with self._prepared(settings) as step:
            step()  # allocates memory, chooses kernels, compiles
            step()
            while len(times) < _REPEATS or sum(times) < least_s:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
                if times[0] > 1.0:  # one long step is precise enough
                    break
        return times

    @contextlib.contextmanager
    def _prepared(self, settings: Settings) -> Iterator[Callable[[], None]]:
        work, device = self._work, self.device
        threads = torch.get_num_threads()
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(0)
            memory = torch.channels_last if settings.channels_last else torch.contiguous_format
            model = copy.deepcopy(work.model).to(memory_format=memory)
            if settings.compiled:
                model.compile(dynamic=False)
            images = torch.randn(self.batch, *work.image, device=device).to(memory_format=memory)
            labels = torch.randint(work.classes, (self.batch,), device=device)

            def step() -> None:
                with autocast(device, settings.precision):
                    scores = all_scores(model(images))
                torch.stack([F.cross_entropy(part.float(), labels) for part in scores]).sum().backward()
                model.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            torch.set_num_threads(settings.threads)
            allow_tf32(settings.precision == "tf32")
            try:
                yield step
            finally:
                torch.set_num_threads(threads)

    def _mean(self, values: list[float]) -> list[float]:
        if self._work.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        result: list[float] = (total / self._work.world_size).tolist()
        return result
