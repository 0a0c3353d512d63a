"""Builds the training state of a rank from a config and a data set. Every rank calls all of these."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from disttrain.config import Config, ModelConfig, TrainConfig
from disttrain.data.batches import Loader, choose_cache, on_device, streaming_reason
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import open_reduced, open_split
from disttrain.data.epoch_plan import Ids, Plan, make_plan, usable_ids
from disttrain.data.stages import open_stream
from disttrain.data.statistics import IMAGENET_MEAN, statistics
from disttrain.errors import DataError
from disttrain.models import build_for, parameter_count
from disttrain.models.freezing import freeze_for_good
from disttrain.models.pretrained import Loaded, initial_network, some_names
from disttrain.parallel import cores_of_a_rank
from disttrain.preflight import split_batch
from disttrain.runs.agreement import compare_peers
from disttrain.runs.checkpoint import Checkpoint, load
from disttrain.shards.index import Index
from disttrain.shards.label_format import Labels
from disttrain.shards.verify import find_bad_samples
from disttrain.training.augment import Augment
from disttrain.training.autotune import (
    Choice,
    Chosen,
    Settings,
    Workload,
    allow_tf32,
    choose,
)
from disttrain.training.collectives import Group, gather
from disttrain.training.ema import MovingAverage
from disttrain.training.flops import flops_per_image, peak_flops_per_s
from disttrain.training.graph import StepGraph, graph_choice
from disttrain.training.group import wait_for_all
from disttrain.training.loss import class_weights
from disttrain.training.normalize import Normalize
from disttrain.training.optim import build_optimizer
from disttrain.training.rank import Rank
from disttrain.training.rank_state import restore_rank_state
from disttrain.training.restore import resume
from disttrain.training.rng import preserve_rng_state, seed_user_code
from disttrain.training.sampling import say_sampling, train_labels
from disttrain.training.state import Progress, TrainState, Validation, cudnn_heuristics
from disttrain.training.trial import try_training, unused_text
from disttrain.training.virtual_ranks import machine_facts
from disttrain.training.wrapping import (
    copy_from_rank_0,
    start_parameters,
    warm_up_ddp_buckets,
    wrap_ddp,
)
from disttrain.units import mib

log = logging.getLogger("disttrain")


INIT_IMAGES = 5000
"""The most training images that a model with `init_from_images` sees before the first step."""


@dataclass(frozen=True)
class Data:
    """The samples of a run, as one rank sees them.

    Attributes:
        plan: the order of the training samples.
        train: loads the training split.
        val: the validation split.
        cache: where the images are kept (`data.cache`), and why.
    """

    plan: Plan
    train: Loader
    val: Validation
    cache: Choice


def build(
    config: Config,
    rank: Rank,
    process_group: PartialState,
    index: Index,
    checkpoint_path: Path | None,
    *,
    force: bool = False,
) -> tuple[TrainState, Progress, dict[str, Choice]]:
    """Makes model, optimizer, data and augmentation, and loads the checkpoint if there is one.

    Every rank calls this. With `force`, the config or the data set may differ from the checkpoint's.

    Returns:
        The state, the progress to start from, and the automatic choices with their reasons.
    """
    group, device = Group.of(process_group), process_group.device
    checkpoint = None if checkpoint_path is None else load(checkpoint_path)
    data = build_data(config, index, group)
    model, loaded = initial_model(config, index, device, checkpoint)
    named = freeze_for_good(config.model, model)
    unused = unused_parameters(config, model, index, data.plan, group)
    per_image = flops_per_image(model, (index.channels, index.height, index.width))
    chosen = choose_arithmetic(config, group, model, index, data.plan, checkpoint)
    settings = chosen.settings
    accelerator = apply_arithmetic(settings, device, model)
    began = weights_choice(config, loaded, group) | frozen_choice(config.model, named, model)
    mean_std = statistics(config.data, index.mean, index.std)
    normalize = Normalize(*mean_std, index.width, channels_last=settings.channels_last, device=device)
    if checkpoint is None and hasattr(model, "init_from_images"):
        cast(Any, model).init_from_images(normalize(first_images(data, device)))
    optimizer, lr_schedules = build_optimizer(config.optim, config.schedule, model)
    state = TrainState(
        config=config,
        accelerator=accelerator,
        model=model,
        ema=None if config.train.ema is None else MovingAverage(model, config.train.ema),
        optimizer=optimizer,
        lr_schedules=lr_schedules,
        plan=data.plan,
        augment=Augment(on_device(config), seed=config.seed, normalize=normalize),
        train_data=data.train,
        val=data.val,
        image_size=(index.height, index.width),
        settings=settings,
        flops_per_image=per_image,
        class_weights=class_weights(config.train, index, device),
        peak_flops_per_s=peak_flops_per_s(device, settings.precision)[0],
        initial_weights=loaded,
    )
    progress = Progress() if checkpoint is None else resume(checkpoint, state, index, rank, force=force)
    start_parameters(state, named, progress.epoch + progress.samples / data.plan.samples_per_epoch)
    # Only sets the precision: the model is on its device, and the optimizer has its parameters.
    state.model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    choices = {"cache": data.cache, **began, **chosen.reasons, **join_ranks(state, group, unused)}
    choices["cuda_graph"] = graph_choice(config, device, group.world_size, settings)
    if choices["cuda_graph"].value == "true":
        state.graph = StepGraph(optimizer, device)
    begin_rank(state, checkpoint)
    return state, progress, choices


def begin_rank(state: TrainState, checkpoint: Checkpoint | None) -> None:
    """Seeds or restores what differs between the ranks. Every rank calls this, with the model wrapped."""
    seed_user_code(state.config.seed, state.rank)
    if checkpoint is not None:
        warm_up_ddp_buckets(state)
        restore_rank_state(state, checkpoint.part("ranks"))


def build_data(config: Config, index: Index, group: Group) -> Data:
    """Returns the samples of a run. Every rank calls this."""
    say = print if group.rank == 0 else log.info
    skipped = {split: skipped_samples(config, index, split, group, say) for split in ("train", "val")}
    pipeline = config.data.pipeline
    reduced = index.decoded_side is not None
    place, reason = choose_cache(
        config.data.cache,
        index.decoded_bytes,
        group.device,
        streamed=streaming_reason(index, pipeline),
        reduced=reduced,
    )
    loaders: dict[str, Loader] = {}
    decoded: Labels | None = None
    if place != "none" and not reduced:
        copies = {split: open_split(index, split, skipped[split], say) for split in skipped}
        loaders = {split: Cached(copy, group.device, place) for split, copy in copies.items()}
        decoded = copies["train"].labels
    else:
        workers = min(8, cores_of_a_rank()) if config.data.workers is None else config.data.workers
        size = config.train.batch_size // group.world_size
        copy = open_reduced(index, skipped["train"], say) if place == "host" else None
        decoded = None if copy is None else copy.labels
        streamed = partial(
            open_stream,
            index,
            device=group.device,
            batch_size=size,
            workers=workers,
            say=say,
            pipeline=pipeline,
        )
        loaders = {"train": (train := streamed("train", copy=copy)), "val": streamed("val")}
        reason += (
            f"; {config.data.streams} streams, {workers} decoding threads and at most "
            f"{mib(train.most_bytes, 1)} of decoded samples per process"
        )
    wait_for_all("data")
    labels = train_labels(config, index, skipped["train"], decoded, group)
    plan = make_plan(config, index, skipped["train"], labels)
    say_sampling(plan, say)
    val_ids = usable_ids(index.splits["val"].samples, skipped["val"])
    val = Validation(loaders["val"], val_ids, index.classes, len(skipped["val"]), index.multi_label)
    return Data(plan, loaders["train"], val, Choice(place, reason))


def skipped_samples(
    config: Config, index: Index, split: str, group: Group, say: Callable[[str], None]
) -> Ids:
    """Returns the ids of the samples of a split that any node cannot use. Every rank calls this."""
    if config.data.on_error != "skip":
        return np.empty(0, np.int64)
    found = find_bad_samples(index, split, say)
    wait_for_all(f"search for bad samples in {split}")
    found = np.unique(np.concatenate(gather(group, found)))
    if len(found) == index.splits[split].samples:
        raise DataError(
            f"{index.base or index.folder}: no sample of the {split} split can be used; "
            f"run `disttrain data verify {index.name}` to see why"
        )
    return found


def first_images(data: Data, device: torch.device) -> Tensor:
    """Returns the training images with the lowest ids, the same on every rank: uint8 [N, H, W, C]."""
    with contextlib.closing(data.train.batches(data.plan.ids, [slice(0, INIT_IMAGES)])) as batches:
        return next(batches).to(device).images


def initial_model(
    config: Config, index: Index, device: torch.device, checkpoint: Checkpoint | None
) -> tuple[nn.Module, Loaded | None]:
    """Returns the network on its device, and what its initial weights were loaded from.

    Random weights are the same on all ranks. A resumed run does not read `model.weights`, because the
    checkpoint replaces all weights; it knows from there what they were.
    """
    torch.manual_seed(config.seed)
    if checkpoint is None:
        return initial_network(config.model, index, device, log.info)
    saved = checkpoint.state.get("initial_weights")
    return build_for(config.model, index).to(device), Loaded(**saved) if saved else None


def weights_choice(config: Config, loaded: Loaded | None, group: Group) -> dict[str, Choice]:
    """Returns where the initial weights are from, and says if the normalization does not fit them."""
    if loaded is None:
        return {}
    reason = f"all but {some_names(loaded.fresh)}, which started at random" if loaded.fresh else "all"
    reason += f"; SHA-256 {loaded.sha256}"
    if loaded.mean == list(IMAGENET_MEAN) and config.data.normalize != "imagenet":
        remark = "these weights were trained with data.normalize = imagenet, but it is"
        say = print if group.rank == 0 else log.info
        say(f"model.weights: {remark} {config.data.normalize}")
    return {"weights": Choice(loaded.source, reason)}


def frozen_choice(config: ModelConfig, named: dict[str, nn.Parameter], model: nn.Module) -> dict[str, Choice]:
    """Returns how many parameters `model.freeze` freezes, and until when."""
    if not named:
        return {}
    frozen = sum(parameter.numel() for parameter in named.values())
    until = "" if config.unfreeze_epoch is None else f" until epoch {config.unfreeze_epoch:g}"
    return {"frozen": Choice(f"{frozen:,} of {parameter_count(model):,} parameters", f"model.freeze{until}")}


def unused_parameters(config: Config, model: nn.Module, index: Index, plan: Plan, group: Group) -> list[str]:
    """Returns the trainable parameters that get no gradient on some rank. Every rank calls this.

    They are not refused: such a model trains on one process, and so it does on several. There, DDP looks in
    each step for what got no gradient. That takes time, so it does it for these models only.

    Raises:
        UsageError: the model cannot be trained; see `try_training`.
    """
    with preserve_rng_state(group.device), cudnn_heuristics():
        own = try_training(config, model, index, plan, group.world_size)
    unused = list(dict.fromkeys(chain.from_iterable(gather(group, own))))
    if unused:
        say = print if group.rank == 0 else log.info
        say(f"model {config.model.name}: {unused_text(unused)}")
    return unused


def choose_arithmetic(
    config: Config, group: Group, model: nn.Module, index: Index, plan: Plan, checkpoint: Checkpoint | None
) -> Chosen:
    """Chooses precision, memory order, compilation and threads for the rest of the run.

    Every rank calls this. The model is on its device and stays as it is.
    """
    steps = plan.steps_per_epoch * config.train.epochs - (checkpoint.value("step") if checkpoint else 0)
    work = Workload(
        model,
        split_batch(config, group.world_size),
        (index.channels, index.height, index.width),
        len(index.classes),
        steps * config.train.accumulate,
        group.world_size,
    )
    saved = checkpoint.value("arithmetic") if checkpoint else None
    return choose(config.train, work, threads=torch.get_num_threads(), saved=saved)


def apply_arithmetic(settings: Settings, device: torch.device, model: nn.Module) -> Accelerator:
    """Applies the settings to the model (memory order, compilation) and to this process."""
    allow_tf32(settings.precision == "tf32")
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.compiled:
        model.compile(dynamic=False)
    # Settings of `accelerate launch` are not part of the experiment.
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=settings.precision if settings.precision in {"bf16", "fp16"} else "no",
    )


def join_ranks(state: TrainState, group: Group, unused: Sequence[str]) -> dict[str, Choice]:
    """Prepares the model for several ranks: wraps it in DDP, or copies its weights if DDP is not used.

    Every rank calls this.

    Args:
        state: of this rank.
        group: the ranks.
        unused: parameters that may get no gradient.

    Returns:
        What was chosen.

    Raises:
        UsageError: train.reproducible, and the ranks have different kinds of machines.
    """
    config, found = state.config, {}
    if unused:
        found["no gradient"] = Choice(", ".join(unused), "in a training pass before the start")
    if config.train.reproducible:
        machines = gather(group, machine_facts(group.device))
        compare_peers({f"rank {number}": facts for number, facts in enumerate(machines)})
        copy_from_rank_0(group, state.networks)
        found["virtual_ranks"] = virtual_ranks_choice(config.train, group)
    elif group.world_size > 1:
        every, some = config.monitor.log_every_steps, bool(unused)
        state.model, found["bucket"] = wrap_ddp(state.model, group.device, timed_every=every, unused=some)
    return found


def virtual_ranks_choice(config: TrainConfig, group: Group) -> Choice:
    """Returns the number of virtual ranks, and how many of them each rank takes."""
    number, each = config.virtual_ranks, -(-config.virtual_ranks // group.world_size)
    many = f"{each} on each" if number % group.world_size == 0 else f"at most {each} on each"
    return Choice(str(number), f"train.reproducible: {many} of {group.world_size} ranks")
