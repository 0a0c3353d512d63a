"""What every rank of `disttrain tune` runs: training steps at rising learning rates, or timed ones."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from disttrain.config import load_config
from disttrain.data.batches import Batch
from disttrain.errors import TrainingError
from disttrain.heartbeat import Phase
from disttrain.launch.jobs import serve
from disttrain.measure.bench_worker import StepBench
from disttrain.measure.tune import OUT_OF_MEMORY
from disttrain.preflight import check_device, open_index
from disttrain.training.build import build
from disttrain.training.collectives import reduce_sum
from disttrain.training.group import best_device, join, out_of_memory
from disttrain.training.microbatch import MicroBatch, prefetch
from disttrain.training.optim import set_lr
from disttrain.training.parts import Parts
from disttrain.training.phases import Phases
from disttrain.training.rank import Rank
from disttrain.training.step import train_step


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tries out as one rank of the group that the environment describes."""
    config = load_config(Path(request["config"]))
    device = best_device()
    check_device(config, device)
    rank = Rank(int(os.environ.get("RANK", "0")), None)
    group = join(config, device)
    index = open_index(config, lambda text: None)
    try:
        parts, _, _ = build(config, rank, group, index, None)
        if request["what"] == "rate":
            return raise_rate(parts, request["low"], request["high"], request["steps"], request["diverged"])
        step_s = StepBench(parts, request["seconds"]).step(parts.train_data)
        most = torch.cuda.max_memory_allocated(group.device) / 2**30 if device == "cuda" else None
        return {"step_s": step_s, "memory_gib": most}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"{OUT_OF_MEMORY}: {error}") from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def raise_rate(parts: Parts, low: float, high: float, steps: int, diverged: float) -> dict[str, list[float]]:
    """Trains while the learning rate rises by the same factor in each step. Every rank calls this.

    Args:
        parts: of a run that has just begun; changed.
        low: the first learning rate.
        high: the last one.
        steps: at most.
        diverged: ends when the loss is so many times the least one, or not finite.

    Returns:
        The rates and the mean loss of each step over all ranks, before the step was taken.
    """
    rates: list[float] = []
    losses: list[float] = []
    phases, lr = Phases(), parts.config.optim.lr
    shares = [rate.peak / lr for rate in parts.rates]
    parts.model.train()
    with contextlib.closing(_endless(parts)) as batches:
        for step in range(steps):
            rate = low * (high / low) ** (step / max(1, steps - 1))
            set_lr(parts.optimizer, [rate * share for share in shares])
            parts.meter.restart()
            train_step(parts, batches, step + 1, min(parts.plan.batch_size, parts.plan.samples), phases)
            loss, _ = parts.meter.totals()
            total, samples = reduce_sum(parts.group, Phase.REPORT, step + 1, [loss, parts.meter.samples])
            rates.append(rate)
            losses.append(total / samples)
            # Two steps in a row, because a single batch may be an odd one.
            bad = [not math.isfinite(value) or value > 2 * diverged * min(losses) for value in losses[-2:]]
            if step and all(bad):
                break
    return {"rates": rates, "losses": losses}


def _endless(parts: Parts) -> Generator[tuple[MicroBatch, Batch], None, None]:
    """Yields the micro-batches of full batches, epoch after epoch."""
    full = range(max(1, parts.plan.samples // parts.plan.batch_size))
    for epoch in itertools.count():
        order = parts.plan.order(epoch)
        parts.augment.start_epoch(epoch, order, *parts.image_size)
        with contextlib.closing(prefetch(parts, epoch, full, order)) as batches:
            yield from batches


if __name__ == "__main__":
    serve(answer)
