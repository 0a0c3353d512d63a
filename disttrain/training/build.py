"""From a config and a data set to what a rank trains with. Every rank calls all of these."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.config import Config
from disttrain.data.batches import Loader, choose_place
from disttrain.data.cached import Cached, open_split
from disttrain.data.plan import Ids, Plan, make_plan, usable_ids
from disttrain.data.stages import open_stream
from disttrain.data.statistics import statistics
from disttrain.errors import (
    DataError,
)
from disttrain.models import build_for
from disttrain.models.pretrained import load_weights
from disttrain.parallel import cores_of_a_rank
from disttrain.preflight import split_batch
from disttrain.runs.checkpoint import load
from disttrain.shards.images import expect_images
from disttrain.shards.index import Index
from disttrain.shards.verify import survey
from disttrain.training.augment import Augment
from disttrain.training.average import MovingAverage
from disttrain.training.choices import Choice, Settings, Workload, allow_tf32, bucket_mib, choose
from disttrain.training.flops import flops_per_image, peak_flops_per_s
from disttrain.training.graph import StepGraph, graph_choice
from disttrain.training.group import wait_for_all
from disttrain.training.optim import build_optimizer
from disttrain.training.parts import Parts, Position, as_written
from disttrain.training.rank import Rank
from disttrain.training.rank_state import restore_rank_state, seed_own_code
from disttrain.training.restore import restore, restore_scaler, saved_position
from disttrain.units import mib

log = logging.getLogger("disttrain")


@dataclass(frozen=True)
class Data:
    """The samples of a run, as one rank sees them.

    Attributes:
        plan: the order of the training samples.
        train: serves the training split.
        val: serves the validation split.
        val_ids: samples of that which can be used, int64 [samples].
        val_skipped: how many cannot.
    """

    plan: Plan
    train: Loader
    val: Loader
    val_ids: Ids
    val_skipped: int


def build(
    config: Config,
    rank: Rank,
    group: PartialState,
    index: Index,
    checkpoint_path: Path | None,
    *,
    force: bool = False,
) -> tuple[Parts, Position, dict[str, Choice]]:
    """Makes model, optimizer, data and augmentation, in the state of the checkpoint if there is one.

    Every rank calls this. With `force`, config or data set may differ from the checkpoint's.

    Returns:
        The parts, where to begin, and what was chosen for the user and why.
    """
    device, image = group.device, (index.channels, index.height, index.width)
    say = print if rank.number == 0 else log.info
    choices: dict[str, Choice] = {}
    checkpoint = None if checkpoint_path is None else load(checkpoint_path)
    data = open_data(config, index, group, say, choices)
    model = initial_model(config, index, device, choices, resumed=checkpoint is not None)
    per_image = flops_per_image(model, image)
    steps_left = data.plan.steps_per_epoch * config.train.epochs
    steps_left -= checkpoint.value("step") if checkpoint else 0
    saved = checkpoint.value("arithmetic") if checkpoint else None
    accelerator, settings = prepare_arithmetic(config, group, model, index, steps_left, saved, choices)
    mean, std = statistics(config.data, index.mean, index.std)
    augment = Augment(
        config.augment,
        seed=config.seed,
        mean=mean,
        std=std,
        device=device,
        channels_last=settings.channels_last,
    )
    if checkpoint is None and hasattr(model, "init_from_images"):
        with contextlib.closing(data.train.batches(data.plan.ids, [slice(0, INIT_IMAGES)])) as batches:
            cast(Any, model).init_from_images(augment.plain(next(batches).to(device).images))
    ema = None if config.train.ema is None else MovingAverage(model, config.train.ema)
    optimizer, rates = build_optimizer(config.optim, config.schedule, model)
    position = Position()
    if checkpoint is not None:
        position = saved_position(checkpoint, config, index, data.plan, rank, force=force)
        restore(checkpoint, model, optimizer, ema, force=force)
        restore_scaler(checkpoint, accelerator.scaler, force=force)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # for its precision alone
    if accelerator.num_processes > 1:
        model, choices["bucket"] = wrap_ddp(model, device, timed_every=config.monitor.log_every_steps)
    choices["cuda_graph"] = graph_choice(config, device, group.num_processes, settings)
    parts = Parts(
        config=config,
        accelerator=accelerator,
        model=model,
        ema=ema,
        optimizer=optimizer,
        rates=rates,
        plan=data.plan,
        augment=augment,
        train_data=data.train,
        val_data=data.val,
        val_ids=data.val_ids,
        val_skipped=data.val_skipped,
        image_size=(index.height, index.width),
        settings=settings,
        flops_per_image=per_image,
        peak_flops_per_s=peak_flops_per_s(device, settings.precision)[0],
        compiled_batch=split_batch(config, group.num_processes) if settings.compiled else None,
        graph=StepGraph(optimizer, device) if choices["cuda_graph"].value == "true" else None,
    )
    if checkpoint is not None and parts.world_size > 2:
        warm_up_ddp_buckets(parts, image)
    seed_own_code(config.seed, rank.number)
    if checkpoint is not None:
        restore_rank_state(parts, checkpoint.part("ranks"))
    return parts, position, choices


def open_data(
    config: Config, index: Index, group: PartialState, say: Callable[[str], None], choices: dict[str, Choice]
) -> Data:
    """Returns the samples of a run; `choices` takes how they are served. Every rank calls this."""
    skipped = skipped_samples(config, index, group, say)
    plan = make_plan(config, index, skipped["train"])
    loaders = open_loaders(config, index, skipped, group, say, choices)
    wait_for_all("data")
    val_ids = usable_ids(index.splits["val"].samples, skipped["val"])
    return Data(plan, loaders["train"], loaders["val"], val_ids, len(skipped["val"]))


def initial_model(
    config: Config, index: Index, device: torch.device, choices: dict[str, Choice], *, resumed: bool
) -> nn.Module:
    """Returns the network on its device: with random weights, the same on all ranks, or those of a file.

    Args:
        config: says which network, and the file.
        index: the data set.
        device: of the rank.
        choices: takes what came from the file.
        resumed: whether the weights of a checkpoint come next, so that no file is read.
    """
    torch.manual_seed(config.seed)
    model = build_for(config.model, index).to(device)
    if config.model.weights is not None and not resumed:
        fresh = load_weights(model, Path(config.model.weights), len(index.classes))
        left = f", but {', '.join(fresh)}, which begin at random" if fresh else ""
        choices["weights"] = Choice(config.model.weights, f"all{left}")
    return model


def wrap_ddp(model: nn.Module, device: torch.device, *, timed_every: int) -> tuple[nn.Module, Choice]:
    """Wraps a model in DDP. Every rank calls this.

    Args:
        model: on its device.
        device: of the rank.
        timed_every: steps, of which DDP measures one.

    Returns:
        The wrapped model, and the size of its gradient buckets with the reason.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    bucket, reason = bucket_mib(trained, device)
    wrapped = DistributedDataParallel(
        model,
        # Accelerate would name the GPU by the number of the process on its node. A task that sees one
        # GPU alone has none with that number.
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket,
    )
    # Batch-norm statistics are averaged when they are used, not broadcast in every step. Set here because the
    # constructor's argument has a new name in each torch.
    wrapped.broadcast_buffers = False
    wrapped._set_ddp_runtime_logging_sample_rate(timed_every)
    return wrapped, Choice(f"{bucket:.3g} MiB", reason)


def warm_up_ddp_buckets(parts: Parts, image: tuple[int, int, int]) -> None:
    """Lets DDP order its gradient buckets, as it does after the first step of a run. Every rank calls this.

    The place of a gradient in its bucket decides in which order more than two ranks are summed up: without
    this, the first step of a run that goes on would differ in the last bit from one that was never stopped.

    Args:
        parts: of a run that goes on; only the generators of random numbers change.
        image: channels, height and width.
    """
    buffers = [(buffer, buffer.clone()) for buffer in parts.bare_model.buffers()]
    with as_written(parts):
        parts.model(torch.zeros(2, *image, device=parts.accelerator.device)).sum().backward()
    parts.drop_gradients()
    for buffer, saved in buffers:
        buffer.copy_(saved)


INIT_IMAGES = 5000
"""Training images at most that a model with `init_from_images` sees before the first step."""


def prepare_arithmetic(
    config: Config,
    group: PartialState,
    model: nn.Module,
    index: Index,
    steps: int,
    saved: dict[str, Any] | None,
    choices: dict[str, Choice],
) -> tuple[Accelerator, Settings]:
    """Chooses precision, memory order, compilation and threads and applies them to the model.

    Every rank calls this.

    Args:
        config: what the user has set.
        group: the process group.
        model: on its device; is put into the chosen memory order and compiled.
        index: the data set.
        steps: optimizer steps in the rest of the run.
        saved: the settings kept in the checkpoint that is gone on from, with their device and world size, or
            None.
        choices: takes what is chosen and why.

    Returns:
        The accelerator, and what was chosen.
    """
    batch = split_batch(config, group.num_processes)
    choice = choose(
        config.train,
        Workload(
            model,
            batch,
            (index.channels, index.height, index.width),
            len(index.classes),
            steps * config.train.accumulate,
            group.num_processes,
        ),
        threads=torch.get_num_threads(),
        saved=saved,
    )
    choices |= choice.reasons
    settings = choice.settings
    allow_tf32(settings.precision == "tf32")
    if group.device.type == "cpu":
        torch.set_num_threads(settings.threads)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.compiled:
        model.compile(dynamic=False)
    # A launcher's settings are not part of the experiment.
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    accelerator = Accelerator(
        cpu=group.device.type == "cpu",
        mixed_precision=settings.precision if settings.precision in {"bf16", "fp16"} else "no",
    )
    return accelerator, settings


def skipped_samples(
    config: Config, index: Index, group: PartialState, say: Callable[[str], None]
) -> dict[str, Ids]:
    """Returns the ids of each split that cannot be used on any node. Every rank calls this."""
    skipped = {split: np.empty(0, np.int64) for split in ("train", "val")}
    if config.data.on_error == "skip":
        for split in skipped:
            found = survey(index, split, say)
            wait_for_all(f"survey of {split}")
            if group.num_processes > 1:
                found = np.unique(np.concatenate(gather_object([found])))
            skipped[split] = found
            if len(found) == index.splits[split].samples:
                raise DataError(
                    f"{index.base or index.folder}: no sample of the {split} split can be used; "
                    f"`disttrain data verify {index.name}` tells why"
                )
    return skipped


def open_loaders(
    config: Config,
    index: Index,
    skipped: dict[str, Ids],
    group: PartialState,
    say: Callable[[str], None],
    choices: dict[str, Choice],
) -> dict[str, Loader]:
    """Returns what serves each split to this rank; `choices` takes how and why."""
    device = group.device
    place, reason = choose_place(
        config.data.cache, index.decoded_bytes, device, streamed=config.data.pipeline is not None
    )
    if place != "none":
        choices["cache"] = Choice(place, reason)
        return {
            split: Cached(open_split(index, split, skipped[split], say), device, place)
            for split in ("train", "val")
        }
    workers = config.data.workers
    if workers is None:
        workers = min(8, cores_of_a_rank())
    expect_images(index.splits["train"].samples * config.train.epochs // group.num_processes)
    size = config.train.batch_size // group.num_processes
    loaders = {
        split: open_stream(
            index, split, device, batch_size=size, workers=workers, say=say, pipeline=config.data.pipeline
        )
        for split in ("train", "val")
    }
    how = (
        f"; {config.data.streams} streams, {workers} decoding threads per process, at most "
        f"{mib(loaders['train'].most_bytes, 1)} of decoded samples under way in each"
    )
    choices["cache"] = Choice(place, reason + how)
    return dict(loaders)
