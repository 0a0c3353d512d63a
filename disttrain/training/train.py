"""The training loop.

Between two log points there is no device synchronisation, no collective but the reduction of the gradients
and no Python work per sample; where steps are slow, and before their time is known, several ranks ask one
another about once a second whether one of them is to stop. (The gradient scaler of fp16 waits for the device
in each step, unless the optimizer is a single fused one.) This module knows nothing of terminals, NVML, Click
or Slurm: it is handed what it calls.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain import counter_rng
from disttrain.data.batches import Batch, Window
from disttrain.data.plan import Ids, digest, share
from disttrain.errors import DataError, StoppedError, TrainingError
from disttrain.parallel import in_order
from disttrain.training.augment import Mix
from disttrain.training.collectives import gather, reduce_sum, stop_requested_anywhere
from disttrain.training.evaluation import evaluate
from disttrain.training.flops import device_flops
from disttrain.training.optim import lr_factor, set_lr
from disttrain.training.parts import Hooks, Parts, Position, as_written, kernels_by_rule
from disttrain.training.phases import Phases, StepTimes
from disttrain.training.pulse import Phase
from disttrain.training.rank_state import drawing_apart

_NOISE = 16  # the stream of random numbers that seeds dropout
_MOST_SKIPPED_STEPS = 20  # in a row, by a gradient scaler that finds only overflows


def train(parts: Parts, position: Position, hooks: Hooks) -> None:
    """Trains from `position` to the end of the run. Every rank calls this.

    Args:
        parts: what to train with.
        position: where to begin; kept up to date.
        hooks: what to call.

    Raises:
        TrainingError: the loss is not finite, or the ranks have lost one another.
        StoppedError: a rank was asked to stop; a checkpoint was saved.
        DataError: the ranks did not see every sample exactly once.
        StorageError: a checkpoint cannot be written.
    """
    parts.model.train()
    epochs = range(position.epoch, parts.config.train.epochs)
    # The order of the next epoch is computed beside this one: a GPU would have nothing to do in that time.
    with contextlib.closing(in_order(parts.plan.order, epochs, threads=1, ahead=1)) as orders:
        while position.epoch < epochs.stop or position.evaluation_due:
            if not position.evaluation_due:
                train_epoch(parts, position, next(orders), hooks)
            finish_epoch(parts, position, hooks)
    hooks.phases.enter(Phase.SAVE, position.step, 1)
    hooks.saver.wait()
    hooks.phases.enter(Phase.END, position.step, 0)


def stop(position: Position, hooks: Hooks, where: str, *, saved: bool = False) -> None:
    """Saves, unless that was done, and ends the run. Every rank calls this.

    Raises:
        StoppedError: always.
    """
    hooks.phases.enter(Phase.SAVE, position.step, 0)
    if not saved:
        hooks.saver.save(best=False, stopping=True)
    hooks.saver.wait()
    raise StoppedError(f"stopped {where}; saved, resumable")


def train_epoch(parts: Parts, position: Position, order: Ids, hooks: Hooks) -> None:
    """Trains from `position` to the end of its epoch. Every rank calls this.

    Args:
        parts: what to train with.
        position: where to begin; kept up to date.
        order: the plan's order of the epoch, int64 [samples].
        hooks: what to call.

    Raises:
        TrainingError, StoppedError, DataError, StorageError: as `train` does.
    """
    config, plan, epoch, begin = parts.config, parts.plan, position.epoch, position.samples
    steps = range(begin // plan.batch_size, plan.steps_per_epoch)
    parts.augment.start_epoch(epoch, order, *parts.image_size)
    seed = seeder(parts.accelerator.device)
    meter = parts.meter
    meter.start()
    seen: list[Ids] = []
    with contextlib.closing(served(parts, epoch, steps, order)) as pieces:
        for index in steps:
            places = plan.batch(index)
            now = epoch + (places.start + places.stop) / 2 / plan.samples_per_epoch  # the middle of the step
            set_lr(parts.optimizer, [rate.at(now, config.train.epochs) for rate in parts.rates])
            # Dropout depends on the step and the rank alone, so that a resumed run draws the same.
            seed(counter_rng.derive(config.seed, _NOISE, position.step, parts.rank) >> 1)

            ids = train_step(parts, pieces, position.step + 1, len(places), hooks.phases)

            seen.append(ids)
            position.step += 1
            position.samples = places.stop
            position.samples_seen += len(places)
            if config.train.trace_samples:
                hooks.observer.trace(epoch + 1, position.step, ids.tolist())
            last = places.stop == plan.samples_per_epoch
            save_due = position.step % (config.checkpoint.every_steps or position.step + 1) == 0
            log_due = position.step % config.monitor.log_every_steps == 0
            stopping = False
            if log_due or save_due or last:  # a save follows a look at the loss
                # Collective and device synchronisation: all ranks meet here.
                hooks.phases.enter(Phase.REPORT, position.step, 0)
                hooks.saver.check()
                lr = config.optim.lr * lr_factor(config.schedule, now, config.train.epochs)
                stopping = log_point(parts, position, seen, lr, hooks)
                if save_due and not last:
                    hooks.phases.enter(Phase.SAVE, position.step, 0)
                    hooks.saver.save(best=False)
                    meter.restart()
            elif parts.look_due(meter.steps):
                # Collective where there are several ranks, about once a second.
                stopping = stop_requested_anywhere(parts, Phase.REPORT, position.step, hooks.stop_requested())
            if last or stopping:
                prove(parts, position.step, seen, plan.ids_between(order, begin, places.stop))
            if stopping and not last:
                check_loss(parts, position, seen, hooks)
                stop(position, hooks, f"at step {position.step:,}", saved=save_due)
    position.epoch, position.samples, position.evaluation_due = epoch + 1, 0, True


class Piece(NamedTuple):
    """What one rank puts through the model at once: its share of a global batch, or a part of it.

    Attributes:
        window: the places of the epoch to load: of its own samples, then of those that are mixed into them;
            a slice of length B, or int64 [2 B].
        samples: number of its own samples, B.
        mix: how they are mixed, or None.
        counts: whether it counts; a rank without a sample of its own takes part with a weight of zero.
        last: whether it is the rank's last one of the step.
    """

    window: Window
    samples: int
    mix: Mix | None
    counts: bool
    last: bool


def step_pieces(parts: Parts, epoch: int, index: int) -> Iterator[Piece]:
    """Yields this rank's pieces of step `index` of an epoch, at least one."""
    places = parts.plan.batch(index)
    own = share(places, parts.rank, parts.world_size)
    counts = len(own) > 0
    own = own or places[:1]  # a last batch smaller than the world
    mix = parts.augment.mix(epoch, index, len(places), *parts.image_size)
    number = min(parts.config.train.accumulate, len(own))
    for i in range(number):
        piece = share(own, i, number)
        window: Window = slice(piece.start, piece.stop)
        if mix is not None:
            samples = np.arange(piece.start, piece.stop)
            partners = places.start + (samples - places.start + mix.shift) % len(places)
            window = np.concatenate([samples, partners])
        yield Piece(window, len(piece), mix, counts, last=i == number - 1)


def served(parts: Parts, epoch: int, steps: range, order: Ids) -> Generator[tuple[Piece, Batch], None, None]:
    """Yields this rank's pieces of the steps of an epoch with their samples, which are loaded ahead."""
    pieces, ahead = itertools.tee(piece for index in steps for piece in step_pieces(parts, epoch, index))
    with contextlib.closing(parts.train_data.batches(order, (piece.window for piece in ahead))) as batches:
        yield from zip(pieces, batches, strict=True)


def train_step(
    parts: Parts,
    pieces: Iterator[tuple[Piece, Batch]],
    step: int,
    global_batch: int,
    phases: Phases,
) -> Ids:
    """Takes one optimizer step. Every rank calls this.

    The gradient is that of the mean over the global batch, whatever the shares: the sum of a rank's losses is
    weighted with the world size, because DDP takes the mean over ranks, divided by the size of the batch. The
    backward pass begins with that weight, which is no operation of its own.

    Args:
        parts: what to train with.
        pieces: gives this rank's pieces of the step.
        step: its number, from 1.
        global_batch: samples of the step over all ranks.
        phases: told of what begins.

    Returns:
        The ids that this rank trained on, int64 [B].
    """
    # In plain torch: the wrappers of Accelerate look for packages and signatures in every step.
    config, scaler, meter = parts.config.train, parts.accelerator.scaler, parts.meter
    ids: list[Ids] = []
    for number in itertools.count():
        began = phases.enter(Phase.DATA, step, number)
        piece, batch = next(pieces)
        meter.wait_s += phases.enter(Phase.TO_DEVICE, step, number) - began
        batch = batch.to(parts.accelerator.device)
        phases.enter(Phase.AUGMENT, step, number)
        images, labels, partners = prepare(parts, piece, batch)
        phases.enter(Phase.COMPUTE, step, 2 * number)
        graphed = parts.graph is not None and piece.samples == config.batch_size
        if parts.graph is not None and graphed:
            loss, logits = parts.graph(partial(whole_step, parts), images, labels)
        else:
            with contextlib.ExitStack() as stack:
                if not piece.last:
                    stack.enter_context(unreduced(parts))
                if global_batch < config.batch_size:
                    stack.enter_context(kernels_by_rule())
                with contextlib.nullcontext() if piece.samples == parts.compiled_batch else as_written(parts):
                    logits = parts.model(images)
                loss = loss_sum(logits, labels, partners, piece.mix, config.label_smoothing)
                phases.enter(Phase.COMPUTE, step, 2 * number + 1)  # here the ranks wait for one another
                weight = parts.world_size / global_batch if piece.counts else 0.0
                (loss if scaler is None else scaler.scale(loss)).backward(torch.full_like(loss, weight))
        if piece.counts:
            meter.add(loss, logits, labels)
            ids.append(batch.ids[: piece.samples])
        if piece.last:
            break
    phases.enter(Phase.OPTIMIZE, step)
    if not graphed:
        update(parts)
    if parts.ema is not None:
        parts.ema.n_averaged += 1
    meter.steps += 1
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def whole_step(parts: Parts, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Takes a step on a whole batch, as `train_step` does; all its effects are on the device.

    Args:
        parts: of a single rank.
        images: float32 [B, C, H, W].
        labels: int64 [B].

    Returns:
        The summed loss, float32 [], and the scores [B, classes].
    """
    logits = parts.model(images)
    loss = loss_sum(logits, labels, None, None, parts.config.train.label_smoothing)
    loss.backward(torch.full_like(loss, 1 / len(labels)))
    update(parts)
    return loss, logits


def update(parts: Parts) -> None:
    """Changes the weights by their gradients, which it drops, and the moving average by the weights."""
    clip, scaler = parts.config.train.grad_clip, parts.accelerator.scaler
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.model.parameters(), clip)
    if scaler is None:
        parts.optimizer.step()
    else:
        scaler.step(parts.optimizer)
        scaler.update()
    parts.drop_gradients()
    if parts.ema is not None:
        parts.ema.average(parts.bare_model)


def unreduced(parts: Parts) -> contextlib.AbstractContextManager[None]:
    """Leaves gradients on this rank, to be reduced with those of a later pass."""
    if parts.world_size == 1:
        return contextlib.nullcontext()
    assert isinstance(parts.model, DistributedDataParallel)
    return parts.model.no_sync()


def prepare(parts: Parts, piece: Piece, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the augmented images, their labels and, if mixed, the labels of their partners."""
    window, count, mix = piece.window, piece.samples, piece.mix
    if isinstance(window, slice):
        return parts.augment.train(batch.images, window), batch.labels, None
    assert mix is not None
    places = torch.from_numpy(window).to(parts.accelerator.device, non_blocking=True)
    mixed = parts.augment.train(batch.images, places)
    images, others = mixed[:count], mixed[count:]
    if mix.box is None:
        images.lerp_(others, 1 - mix.share)
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, batch.labels[:count], batch.labels[count:]


def prove(parts: Parts, step: int, seen: Sequence[Ids], expected: Ids) -> None:
    """Checks that all ranks together trained on exactly the expected samples. Every rank calls this.

    Args:
        parts: what was trained with.
        step: optimizer steps taken.
        seen: ids that this rank trained on.
        expected: ids that all ranks should have trained on, in any order.

    Raises:
        DataError: a sample was left out, repeated or replaced.
    """
    count, total = digest(np.concatenate(seen) if seen else np.empty(0, np.int64))
    # In halves, whose sums are exact in float64.
    sums = reduce_sum(parts, Phase.REPORT, step, [count, total & 0xFFFFFFFF, total >> 32])
    found = (int(sums[0]), (int(sums[1]) + (int(sums[2]) << 32)) % 2**64)
    if found != digest(expected):
        raise DataError(
            f"the ranks trained on {found[0]:,} samples, the plan has {len(expected):,}, or not on the same "
            "ones: this must not be; please report it"
        )


def loss_sum(
    logits: Tensor, labels: Tensor, partners: Tensor | None, mix: Mix | None, label_smoothing: float
) -> Tensor:
    """Returns the cross entropy summed over a batch.

    Args:
        logits: [B, classes].
        labels: int64 [B].
        partners: labels of the images mixed in, int64 [B], or None.
        mix: the weights of the two labels, or None.
        label_smoothing: share of the target spread over all classes.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    if mix is None or partners is None:
        return loss
    other = F.cross_entropy(logits.float(), partners, reduction="sum", label_smoothing=label_smoothing)
    return mix.share * loss + (1 - mix.share) * other


def log_point(parts: Parts, position: Position, seen: Sequence[Ids], lr: float, hooks: Hooks) -> bool:
    """Reduces the sums of all ranks once and reports them. Every rank calls this.

    Args:
        parts: what is trained with.
        position: where the run is.
        seen: ids that this rank trained on, the last step last.
        lr: learning rate of the last step.
        hooks: what to call.

    Returns:
        Whether any rank was asked to stop.

    Raises:
        TrainingError: the loss is not finite, or the gradients are not.
    """
    meter = parts.meter
    sums = meter.totals()  # Device synchronisation.
    hooks.phases.synchronized()
    times = hooks.phases.take(meter.steps, parts.model)
    elapsed_s, wait_s = meter.elapsed_s, meter.wait_s
    if parts.accelerator.device.type == "cuda":
        # The host hands out work ahead of the GPU: what it waits for meanwhile is no wait of the GPU.
        wait_s = min(elapsed_s, times.data_s * meter.steps)
    own = [*sums, meter.samples, wait_s, float(hooks.stop_requested()), elapsed_s]
    of_ranks = [0.0] * (len(times) * parts.world_size)
    of_ranks[parts.rank :: parts.world_size] = times
    totals = reduce_sum(parts, Phase.REPORT, position.step, [*own, *of_ranks, *hooks.gauges.read()])
    (loss, correct, samples, wait_s, stopping, elapsed_s), readings = totals[:6], totals[6:]
    of_ranks, readings = readings[: len(of_ranks)], readings[len(of_ranks) :]
    if not math.isfinite(loss):
        raise not_finite(parts, position, seen, hooks)
    check_scaler(parts)
    meter.step_time_s = elapsed_s / parts.world_size / meter.steps
    images_per_s = samples / (elapsed_s / parts.world_size)
    record = {
        "kind": "train",
        "step": position.step,
        "epoch": position.epoch + 1,
        "samples": position.samples_seen,
        "loss": loss / samples,
        "accuracy": correct / samples,
        "lr": lr,
        "images_per_s": images_per_s,
        "step_time_s": meter.step_time_s,
        "data_wait_pct": 100 * wait_s / elapsed_s,
        **step_times(of_ranks, parts.world_size),
        **device_flops(
            parts.flops_per_image, images_per_s / parts.world_size, peak_per_s=parts.peak_flops_per_s
        ),
        "skipped": len(parts.plan.skipped),
        **hooks.gauges.rows(readings),
    }
    hooks.observer.train(record)
    meter.restart()
    return stopping > 0


def step_times(seconds: Sequence[float], ranks: int) -> dict[str, Any]:
    """Returns the milliseconds of each phase of a step: the means of the ranks, and those of each rank.

    Args:
        seconds: of every rank in the first field of StepTimes, then of every rank in the next.
        ranks: how many there are.
    """
    rows = {
        name.removesuffix("_s"): [round(1000 * value, 4) for value in seconds[first : first + ranks]]
        for name, first in zip(StepTimes._fields, itertools.count(0, ranks), strict=False)
    }
    means = {name: round(sum(row) / ranks, 4) for name, row in rows.items()}
    return {"phases_ms": means, "ranks_ms": rows}


def check_loss(parts: Parts, position: Position, seen: Sequence[Ids], hooks: Hooks) -> None:
    """Looks at the losses since the last log point without reporting them. Every rank calls this.

    Raises:
        TrainingError: one is not finite.
    """
    loss, _ = parts.meter.totals()
    if not math.isfinite(reduce_sum(parts, Phase.REPORT, position.step, [loss])[0]):
        raise not_finite(parts, position, seen, hooks)


def not_finite(parts: Parts, position: Position, seen: Sequence[Ids], hooks: Hooks) -> TrainingError:
    """Finds the first step whose loss is not finite and writes its batch down. Every rank calls this.

    Returns:
        The error to raise.
    """
    steps = parts.meter.steps
    own = parts.meter.first_not_finite()
    first, rank = min(
        (steps if found is None else found, rank) for rank, found in enumerate(gather(parts, own))
    )
    back = steps - first  # from the end of the interval
    if not 0 < back <= len(seen):
        return TrainingError(
            f"the sum of the losses up to step {position.step:,} is not finite; lower optim.lr"
        )
    step = position.step - back + 1
    ids = np.concatenate(gather(parts, seen[-back]))
    where = hooks.observer.bad_batch(position.epoch + 1, step, ids.tolist())
    gather(parts, None)  # the first rank to fail takes the others down: not before rank 0 has written it
    return TrainingError(
        f"the loss is not finite at step {step:,} (epoch {position.epoch + 1}, on rank {rank} first); "
        f"its batch is written down in {where}; lower optim.lr, set train.grad_clip, or use "
        "train.precision=fp32"
    )


def check_scaler(parts: Parts) -> None:
    """Looks whether the gradient scaler of fp16 lets any step through. Waits for the device.

    Raises:
        TrainingError: it has skipped every step for long, because the gradients overflow at any scale.
    """
    scaler, meter = parts.accelerator.scaler, parts.meter
    if scaler is None:
        return
    scale = scaler.get_scale()
    halvings = math.log2(meter.scale / scale) if meter.scale else 0
    meter.scale = scale
    meter.skipped_steps = meter.skipped_steps + meter.steps if halvings >= meter.steps else 0
    if meter.skipped_steps >= _MOST_SKIPPED_STEPS:
        raise TrainingError(
            f"the gradients were not finite in the last {meter.skipped_steps} steps, at any loss scale "
            f"down to {scale:.3g}; lower optim.lr or use train.precision=bf16 or fp32"
        )


def finish_epoch(parts: Parts, position: Position, hooks: Hooks) -> None:
    """Evaluates and saves as the config says, and always after the last epoch. Every rank calls this.

    Raises:
        StoppedError: a rank was asked to stop.
    """
    config, done = parts.config, f"epoch {position.epoch}"
    last = position.epoch == config.train.epochs
    best = False
    if last or position.epoch % config.eval.every_epochs == 0:
        tta = config.eval.tta if last or config.eval.tta_when == "always" else "none"
        with drawing_apart(parts.accelerator.device):
            record = evaluate(parts, tta, step=position.step, hooks=hooks)
        if record is None:
            stop(position, hooks, f"in the evaluation after {done}")
            return
        record |= {"step": position.step, "epoch": position.epoch}
        hooks.observer.evaluate(record)
        best = position.best_accuracy is None or record["accuracy"] > position.best_accuracy
        if best:
            position.best_accuracy = record["accuracy"]
    position.evaluation_due = False
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    due = last or best or position.epoch % every_epochs == 0
    if every_steps is not None:
        due = due or position.step % every_steps == 0
    hooks.phases.enter(Phase.SAVE, position.step, 0)
    if due:
        hooks.saver.save(best=best)
    asked = stop_requested_anywhere(parts, Phase.SAVE, position.step, hooks.stop_requested())
    if asked and not last:
        stop(position, hooks, f"after {done}", saved=due)


def seeder(device: torch.device) -> Callable[[int], object]:
    """Returns a function that seeds the random numbers of a device.

    torch.manual_seed seeds every kind of device there is and takes a tenth of a millisecond for it.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].manual_seed
    return torch.default_generator.manual_seed
