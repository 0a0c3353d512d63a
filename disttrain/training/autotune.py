"""What is chosen for the user on this machine: arithmetic, memory order, compilation, threads, bucket size.

The arithmetic is part of the experiment and chosen by a rule; the others too where one is known, else by a
measurement of the real model. Measuring ends when it has cost a fiftieth of
what the run will take, and a run that is shorter than a minute is not measured at all. All ranks measure
together and decide alike. What is chosen and why is kept in env.json, and the arithmetic in every checkpoint,
so that a run that goes on stays the same run.
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
from disttrain.units import time_text

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

SHORT_RUN_S = 60.0  # a run of this length is not worth a measurement
BUDGET = 0.02  # share of the run that measuring may take
PROBE_BATCH = 128  # images at most in a pass that is measured; a longer one tells nothing more
_WIN = 0.97  # a setting must take at most this share of the time of the plain one to be preferred to it
_NEAR = 1.25  # times the fastest: what a single measurement cannot tell from it
_ROUNDS = 9  # in which settings that are near one another are measured again
_COMPILE_S = 45.0  # what compiling a network of some twenty layers for a GPU takes
_COMPILE_WIN = 0.95  # at most this share of the time, or not compiled
_REPEATS = 3  # passes of a measurement at least


@dataclass(frozen=True)
class Settings:
    """How the forward and backward pass is computed; none of it is part of the experiment.

    Attributes:
        precision: the arithmetic.
        channels_last: NHWC memory order.
        compiled: by torch.compile.
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
    """What was chosen for the user, and why."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}"


class Chosen(NamedTuple):
    """The settings of a run, and each of them with its reason."""

    settings: Settings
    reasons: dict[str, Choice]


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a run.

    Attributes:
        model: the network on its device, in fp32; it is not changed.
        batch: images in one forward pass.
        image: channels, height and width.
        classes: outputs.
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
    """Decides how a run computes. Every rank calls this; all get the same answer.

    Args:
        config: what the user has set is kept, the rest is chosen.
        work: what is computed.
        threads: CPU threads that this process may use.
        saved: settings of the run that is gone on with, with their `device` and `world_size`, or None. They
            are kept as far as they fit here, so that the run stays the same to the last bit.
    """
    device = next(work.model.parameters()).device
    settings, reasons = _rules(config, device, threads, saved["precision"] if saved else None)
    unknown = next((key for key in _FIELDS if key not in reasons), None)
    if saved and (saved["device"], saved["world_size"]) == (device.type, work.world_size):
        kept = {} if unknown is None else {unknown: _FIELDS[unknown]}
        if saved["threads"] < threads:
            kept["threads"] = "threads"
        settings = replace(settings, **{field: saved[field] for field in kept.values()})
        reasons |= {key: Choice(_shown(settings, key), "as in the checkpoint") for key in kept}
    elif unknown is not None and config.reproducible:
        why = "train.reproducible: another run might measure otherwise"
        reasons[unknown] = Choice(_shown(settings, unknown), why)
    elif unknown is not None:
        settings, found = _measured(Probe(work), settings, unknown)
        reasons |= found
    reasons.setdefault("threads", Choice(str(threads), "cores divided by processes, or OMP_NUM_THREADS"))
    return Chosen(settings, reasons)


def bucket_mib(parameters: int, device: torch.device) -> tuple[float, str]:
    """Returns the size of DDP's gradient buckets in MiB for so many trained parameters, and why."""
    size = 4 * parameters / 2**20
    if device.type == "cpu" or size <= 4:
        # One reduction: fewer messages; on CPUs there is no engine beside the cores that could overlap.
        return size + 1, f"one bucket for {size:.1f} MiB of gradients"
    bucket = min(25.0, size / 4)
    return bucket, f"{size:.1f} MiB of gradients in buckets that are reduced while others are computed"


def allow_tf32(allowed: bool) -> None:
    """Lets a GPU compute fp32 products and convolutions in tf32, or not."""
    # The older of torch's two ways: torch.export asks in this way, and fails if the other one was used.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of a forward pass in a precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


_FIELDS = {"channels_last": "channels_last", "compile": "compiled"}
"""Keys that may be measured, the first on a CPU and the second on a GPU, with their fields of `Settings`."""


def _rules(
    config: TrainConfig, device: torch.device, threads: int, fixed_precision: Precision | None
) -> tuple[Settings, dict[str, Choice]]:
    """Returns the settings by the rules, and the reason of each that is not to be measured."""
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
    """Decides one key by measuring, and on a CPU the threads; `plain` is by the rules. Every rank calls this.

    Returns:
        The settings to use, and the reasons of what was decided.
    """
    try:
        plain_s = probe.seconds(plain)
    except ProbeError as error:
        return plain, {key: Choice(_shown(plain, key), f"cannot be measured: {error}")}
    run_s = plain_s * probe.passes
    if run_s < SHORT_RUN_S:
        text = f"a run of about {run_s:.0f} s does not repay measuring"
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
    """Compiles if the run is so long that even a vain attempt costs little."""
    run_s, compiled, best = plain_s * probe.passes, replace(plain, compiled=True), plain
    if BUDGET * run_s < _COMPILE_S / 2:
        text = f"a run of about {run_s:,.0f} s does not repay compiling"
    else:
        try:
            compiled_s = probe.seconds(compiled)
        except ProbeError as error:
            text = f"compiling fails: {error}"
        else:
            text = f"{time_text(compiled_s)} a pass, {time_text(plain_s)} as written"
            best = compiled if compiled_s <= _COMPILE_WIN * plain_s else plain
    return best, {"compile": Choice(_shown(best, "compile"), text)}


def _measure_in_turns(probe: Probe, seconds: dict[Settings, float], budget: float) -> None:
    """Replaces the times of the fastest settings by medians over rounds, if several are near one another.

    A setting that is measured once has met what else the machine did in that moment.
    """
    fastest = min(seconds.values())
    near = [settings for settings in seconds if seconds[settings] <= _NEAR * fastest]
    if len(near) == 1:
        return
    times = {settings: [seconds[settings]] for settings in near}
    round_s = probe.spent_s / len(seconds) * len(near)
    while len(times[near[0]]) <= _ROUNDS and probe.spent_s + round_s <= budget:
        near.reverse()  # so that none always comes after the same other one
        for settings in near:
            times[settings].append(_seconds_or_never(probe, settings))
    seconds |= {settings: statistics.median(values) for settings, values in times.items()}


def _seconds_or_never(probe: Probe, settings: Settings) -> float:
    try:
        return probe.seconds(settings)
    except ProbeError:  # the model does not run in this way
        return math.inf


def _best(plain: Settings, seconds: dict[Settings, float]) -> Settings:
    """Returns the fastest settings, or the plain ones where the gain is no more than noise can be."""
    best = min(seconds, key=lambda settings: seconds[settings])
    return best if seconds[best] <= _WIN * seconds[plain] else plain


def _shown(settings: Settings, key: str) -> str:
    return str(getattr(settings, _FIELDS.get(key, key))).lower()


def _table(seconds: dict[Settings, float]) -> str:
    times = {settings: f"{time_text(value)} a pass" for settings, value in seconds.items()}
    return "; ".join(f"{one}: {'fails' if seconds[one] == math.inf else times[one]}" for one in seconds)


class ProbeError(Exception):
    """A model could not be measured; the message names the kind of error."""


class Probe:
    """Measures forward and backward passes of copies of a model, on all ranks at once.

    Attributes:
        device: of the model.
        batch: images in a pass.
        passes: of that size in the rest of the run.
        spent_s: seconds that measuring has taken, the same on all ranks.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.device = next(work.model.parameters()).device
        self.batch = min(work.batch, PROBE_BATCH) if self.device.type == "cpu" else work.batch
        self.passes = work.passes * work.batch / self.batch
        self.spent_s = 0.0

    def seconds(self, settings: Settings, least_s: float = 0.05) -> float:
        """Returns the seconds of one pass: the mean over the ranks of the median. Every rank calls this.

        Args:
            settings: how to compute.
            least_s: that the measurement takes on each rank, after two passes to warm up.

        Raises:
            ProbeError: it failed on a rank; raised on all of them.
        """
        began = time.perf_counter()
        times, problem = [0.0], ""
        try:
            times = self._times(settings, least_s)
        except Exception as error:  # a model that cannot be copied, say, or what a compiler says of it
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
            step()  # memory is allocated, kernels are chosen, code is compiled
            step()
            while len(times) < _REPEATS or sum(times) < least_s:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
                if times[0] > 1.0:  # a long step is its own mean
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
                    scores = model(images)
                F.cross_entropy(scores.float(), labels).backward()
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
