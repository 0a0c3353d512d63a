"""The plan of a run, as `disttrain run --dry-run` prints it. Starts nothing."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from disttrain.config import Config
from disttrain.launch.plan import LaunchPlan, rank_map, shell_line
from disttrain.launch.prepare import Ready
from disttrain.preflight import split_batch
from disttrain.shards.index import Index
from disttrain.units import mib
from disttrain.userdirs import decoded_folder

if TYPE_CHECKING:
    from disttrain.data.epoch_plan import Plan


def plan_lines(plan: LaunchPlan, config: Config, ready: Ready) -> list[tuple[str, str]]:
    """Returns (label, text) lines on command, ranks, batches, steps, data, model, checkpoints and resume."""
    from disttrain.data.epoch_plan import make_plan

    index, start = ready.index, ready.start
    train, accumulate = config.train, config.train.accumulate
    per_pass = split_batch(config, plan.world_size)
    data = make_plan(config, index)
    model, checkpoint_bytes = _model(config, index, data, plan.world_size)

    share = f"{plan.world_size} rank{'s' * (plan.world_size > 1)} x {per_pass * accumulate}"
    if accumulate > 1:
        share += f" ({accumulate} passes of {per_pass})"
    if train.reproducible:
        share = f"{train.virtual_ranks} virtual ranks x {per_pass}"
    full, rest = divmod(data.samples, train.batch_size)
    fate = "left out in each epoch" if data.drop_remainder else "a smaller last batch, averaged correctly"
    remainder = f"{rest:,} samples: {fate}" if rest else "none"
    shards = ", ".join(
        f"{name} {split.samples:,} in {len(split.shards)} shard{'s' * (len(split.shards) > 1)} "
        f"({mib(sum(shard.bytes for shard in split.shards), 1)})"
        for name, split in index.splits.items()
    )
    cropped = index.image_size is not None and index.decoded_side is None
    if cropped or config.data.cache == "none":
        shuffled = f"shuffled among {data.shuffle_buffer:,} samples"
        shards_line = f"{data.streams} streams, {shuffled}, read and decoded in every epoch"
    else:
        decoded = f"{mib(index.decoded_bytes, 1)} in {decoded_folder()}"
        which = "all shards" if index.decoded_side is None else "the train split"
        shards_line = f"every node decodes {which} once: {decoded}"
        if config.data.cache == "auto":
            shards_line += ", or streams them if that does not fit"
    lines = [("command", shell_line(plan))]
    lines += [("ranks", f"rank {rank} -> {host} -> {device}") for rank, host, device in rank_map(plan)]
    lines += [
        ("threads", f"{plan.threads} per process on {socket.gethostname()}"),
        ("batch", f"{train.batch_size:,} global = {share}"),
        ("steps", f"{data.steps_per_epoch:,} per epoch x {train.epochs:,} epochs = "
                  f"{data.steps_per_epoch * train.epochs:,}; {full:,} full batches, remainder: {remainder}"
                  + "; fewer epochs if train.stop_early ends the run" * (train.stop_early is not None)),
        ("data", f"{index.name}: {shards}, images {_images(index)}"),
        ("shards", shards_line),
        ("model", f"{config.model.name}, {model}"),
        ("checkpoint", f"{mib(checkpoint_bytes, 2)} each, {config.checkpoint.keep} + the best"),
        ("run folder", str(plan.run_dir)),
    ]  # fmt: skip
    if start is not None:
        begin = [] if start.checkpoint is None else [f"resuming from {start.checkpoint}"]
        lines += [("resume", text) for text in (*start.notes, *start.changes, *begin)]
    return lines


def _images(index: Index) -> str:
    shape = f"{index.channels}x{index.height}x{index.width}"
    return shape if index.image_size is None else f"{shape}, cropped from {index.sizes_text()}"


def _model(config: Config, index: Index, data: Plan, world_size: int) -> tuple[str, int]:
    """Tries the model; returns its number of parameters, with a note, and the bytes of a checkpoint."""
    from disttrain.models import build_for, parameter_count
    from disttrain.models.freezing import freeze_for_good
    from disttrain.runs.checkpoint import bytes_needed
    from disttrain.training.optim import build_optimizer, state_bytes
    from disttrain.training.trial import try_training, unused_text

    model = build_for(config.model, index)
    freeze_for_good(config.model, model)
    unused = try_training(config, model, index, data, world_size)
    optimizer, _ = build_optimizer(config.optim, config.schedule, model)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if config.train.ema is not None:
        state["ema"] = model.state_dict()
    text = f"{parameter_count(model):,} parameters"
    if unused:
        text += f"; {unused_text(unused)}"
    return text, bytes_needed(state) + state_bytes(optimizer)
