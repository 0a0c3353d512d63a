"""What every rank of `disttrain bench` and `disttrain tune` runs: measurements on a real training state.

Builds the state with the same functions as a run, but writes no run folder and no checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from disttrain.bench.step_bench import Replay, StepBench, full_batches
from disttrain.bench.tune import OUT_OF_MEMORY
from disttrain.config import Config
from disttrain.errors import TrainingError
from disttrain.heartbeat import Phase
from disttrain.launch.jobs import serve
from disttrain.preflight import open_index, split_batch
from disttrain.training.autotune import Precision, Probe, ProbeError, Settings, Workload
from disttrain.training.build import build
from disttrain.training.collectives import reduce_sum
from disttrain.training.flops import device_flops, peak_flops_per_s
from disttrain.training.group import best_device, join, out_of_memory
from disttrain.training.optim import set_lr
from disttrain.training.phases import Phases
from disttrain.training.rank import Rank
from disttrain.training.virtual_ranks import step_function

if TYPE_CHECKING:
    from disttrain.shards.index import Index
    from disttrain.training.autotune import Choice
    from disttrain.training.state import TrainState


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measures as one rank of the process group that the environment describes. Every rank calls this."""
    config = Config.model_validate(request["config"])
    rank = Rank(int(os.environ.get("RANK", "0")), None)
    group = join(config, best_device())
    index = open_index(config, lambda text: None)
    try:
        state, _, choices = build(config, rank, group, index, None)
        if request["what"] == "rate":
            return raise_rate(state, request["low"], request["high"], request["steps"], request["diverged"])
        bench = StepBench(state, request["seconds"])
        found = {"step_s": bench.step(state.train_data), "threads": torch.get_num_threads()}
        if request["what"] == "all":
            return found | everything(bench, state, index, choices, found["step_s"], request["seconds"])
        on_gpu = group.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(group.device) / 2**30 if on_gpu else None
        return found | {"memory_gib": most}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"{OUT_OF_MEMORY}: {error}") from None


def everything(
    bench: StepBench,
    state: TrainState,
    index: Index,
    choices: dict[str, Choice],
    step_s: float,
    seconds: float,
) -> dict[str, Any]:
    """Returns the other results of `disttrain bench`, given the step time. Every rank calls this."""
    config, device = state.config, state.accelerator.device
    work = Workload(
        state.bare_model,
        split_batch(config, state.world_size),
        (index.channels, index.height, index.width),
        len(index.classes),
        1,
        state.world_size,
    )
    return {
        "processes": state.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "batch": config.train.batch_size,
        "choices": {name: str(choice) for name, choice in choices.items()},
        "replayed_step_s": bench.step(Replay(state.train_data, device)),
        "phases_s": bench.phases() | {"logging": bench.logging(index, choices)},
        "table": settings_table(work, seconds, compiling=config.train.compile is not False),
        **flops(state, step_s),
    }


def settings_table(work: Workload, seconds: float, *, compiling: bool) -> list[dict[str, Any]]:
    """Times forward and backward passes for precision x channels_last x compile. Every rank calls this."""
    probe = Probe(work)
    on_gpu = probe.device.type == "cuda"
    precisions: list[Precision] = ["fp32", "tf32", "bf16", "fp16"] if on_gpu else ["fp32", "bf16"]
    rows = []
    for compiled, precision, channels_last in itertools.product(
        (False, True) if compiling else (False,), precisions, (True, False)
    ):
        row: dict[str, Any] = {"precision": precision, "channels_last": channels_last, "compile": compiled}
        try:
            settings = Settings(precision, channels_last, compiled, torch.get_num_threads())
            row["pass_s"] = probe.seconds(settings, least_s=seconds / 4)
            row["images_per_s"] = probe.batch / row["pass_s"]
        except ProbeError as error:
            row |= {"pass_s": None, "error": str(error)}
        rows.append(row)
    return rows


def flops(state: TrainState, step_s: float) -> dict[str, Any]:
    """Returns the FLOPs of a training step, and their share of the device's peak."""
    precision = state.settings.precision
    peak, source = peak_flops_per_s(state.accelerator.device, precision)
    if state.accelerator.device.type == "cpu":
        peak, source = _measured_peak(precision)
    images_per_s = state.plan.batch_size / step_s / state.world_size
    found, _ = device_flops(state.flops_per_image, images_per_s, peak_per_s=peak)
    return {
        "flops_per_image": state.flops_per_image,
        "flops_per_s_and_device": found,
        "peak_flops_per_s": peak,
        "peak_source": source,
        "share_of_peak": None if peak is None or found is None else found / peak,
    }


def _measured_peak(precision: str) -> tuple[float, str]:
    """Returns the measured peak FLOP/s of this CPU in a precision, and how it was measured."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 1024
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best, f"a product of {side}x{side} matrices, measured here"


def raise_rate(
    state: TrainState, low: float, high: float, steps: int, diverged: float
) -> dict[str, list[float]]:
    """Trains while the learning rate rises by the same factor in each step. Every rank calls this.

    Stops early if the loss is above 2 x `diverged` x the lowest loss, or not finite, in two steps in a row.

    Returns:
        The rate of each step and its mean loss over all ranks, before the update.
    """
    rates: list[float] = []
    losses: list[float] = []
    phases, lr = Phases(), state.config.optim.lr
    take_step = step_function(state.config.train)
    shares = [rate.peak / lr for rate in state.lr_schedules]
    state.model.train()
    epochs = enumerate(map(state.plan.order, itertools.count()))
    with contextlib.closing(full_batches(state, epochs)) as batches:
        for step in range(steps):
            rate = low * (high / low) ** (step / max(1, steps - 1))
            set_lr(state.optimizer, [rate * share for share in shares])
            state.meter.restart()
            take_step(state, batches, step + 1, min(state.plan.batch_size, state.plan.samples), phases)
            loss, _ = state.meter.totals()
            total, samples = reduce_sum(state.group, Phase.REPORT, step + 1, [loss, state.meter.samples])
            rates.append(rate)
            losses.append(total / samples)
            # Two steps in a row, because a single batch may be an outlier.
            bad = [not math.isfinite(value) or value > 2 * diverged * min(losses) for value in losses[-2:]]
            if step and all(bad):
                break
    return {"rates": rates, "losses": losses}


if __name__ == "__main__":
    serve(answer)
