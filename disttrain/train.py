"""The training and evaluation loops.

Between two log points there is no device synchronisation, no collective but the reduction of the gradients
and no Python work per sample. This module knows nothing of terminals, NVML, Click or Slurm: it is handed
what it calls.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from disttrain import counter_rng
from disttrain.augment import Augment, Mix
from disttrain.config import Config
from disttrain.data.batches import Batch, Loader, Window
from disttrain.data.plan import Ids, Plan, digest, share
from disttrain.errors import DataError, StoppedError, TrainingError
from disttrain.optim import Rate, lr_factor, set_lr
from disttrain.pulse import Phase

Beat = Callable[[Phase, int, int], None]


def no_beat(*_: object, **__: object) -> None:
    """Tells nobody."""


_NOISE = 16  # the stream of random numbers that seeds dropout
_COUNTED_AT_ONCE = 16  # forward passes whose hits are counted together
_EVAL_BATCH = 1024  # images in a batch of evaluation, where it may be larger than in training


class Observer(Protocol):
    """Told what happens; every rank has one."""

    def train(self, record: dict[str, Any]) -> None:
        """Takes the means since the last log point: a record of metrics.jsonl."""

    def evaluate(self, record: dict[str, Any]) -> None:
        """Takes the result of an evaluation: a record of metrics.jsonl."""

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        """Takes the ids that this rank trains on in a step; epoch and step count from 1."""


class Saver(Protocol):
    """Saves checkpoints beside the training."""

    def save(self, best: bool) -> None:
        """Begins to save the state as it is now. Every rank calls this.

        Args:
            best: whether it is the best so far.
        """

    def check(self) -> None:
        """Raises the error of a save that has failed in the meantime."""

    def wait(self) -> None:
        """Returns when everything is saved, or raises the error that a save ended with."""


class Gauges(Protocol):
    """Readings of all ranks that travel with the loss in its one reduction."""

    def read(self) -> Sequence[float]:
        """Returns this rank's numbers, 0 in the places of others; NaN is unknown. As long on every rank."""

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        """Turns the numbers summed over the ranks into keys of the train record."""


@dataclass
class Position:
    """Where a run is; saved with every checkpoint.

    Attributes:
        epoch: epochs completed.
        samples: samples of the current epoch trained on, over all ranks.
        step: optimizer steps taken.
        samples_seen: samples trained on in the whole run, over all ranks.
        best_accuracy: best validation accuracy so far, 0..1.
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    samples_seen: int = 0
    best_accuracy: float | None = None


@dataclass
class Parts:
    """What one rank trains with, built by the worker.

    Attributes:
        model: as `Accelerator.prepare` returned it; wrapped in DDP when there are several ranks.
        ema: moving average of the bare model, or None.
        rates: the learning rate of each of its parameter groups.
        plan: the order of the training samples.
        train_data: the training split, served to this rank.
        val_data: the validation split, served to this rank.
        val_ids: the samples to evaluate on, int64 [samples].
        val_skipped: samples of the validation split that cannot be used.
        image_size: height and width in pixels.
        precision: the arithmetic of the forward and backward pass.
        compiled_batch: images in the forward pass that the model is compiled for, or None if it is not.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    ema: AveragedModel | None
    optimizer: Optimizer
    rates: Sequence[Rate]
    plan: Plan
    augment: Augment
    train_data: Loader
    val_data: Loader
    val_ids: Ids
    val_skipped: int
    image_size: tuple[int, int]
    precision: str = "fp32"
    compiled_batch: int | None = None
    rank: int = field(init=False)
    world_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes

    @property
    def bare_model(self) -> nn.Module:
        """The model without DDP."""
        model = self.model.module if self.world_size > 1 else self.model
        assert isinstance(model, nn.Module)
        return model


def train(
    parts: Parts,
    position: Position,
    *,
    observer: Observer,
    gauges: Gauges,
    saver: Saver,
    stop_requested: Callable[[], bool],
    beat: Beat = no_beat,
) -> None:
    """Trains from `position` to the end of the run. Every rank calls this.

    Args:
        parts: what to train with.
        position: where to begin; kept up to date.
        observer: told of every log point and evaluation.
        gauges: readings that go into the train records.
        saver: saves checkpoints.
        stop_requested: whether this rank was asked to stop.
        beat: told what begins: phase, step and part of it; of the same sequence on every rank.

    Raises:
        TrainingError: the loss is not finite.
        StoppedError: a rank was asked to stop; a checkpoint was saved.
        DataError: the evaluation did not see every sample exactly once.
        StorageError: a checkpoint cannot be written.
    """
    parts.model.train()
    epochs = parts.config.train.epochs
    while position.epoch < epochs:
        train_epoch(parts, position, observer, gauges, saver, stop_requested, beat)
        saved = finish_epoch(parts, position, observer, saver, beat)
        if stop_requested_anywhere(parts, stop_requested()) and position.epoch < epochs:
            if not saved:
                saver.save(False)
            saver.wait()
            raise StoppedError(f"stopped after epoch {position.epoch}; saved, resumable")
    beat(Phase.SAVE, position.step, 2)
    saver.wait()


def train_epoch(
    parts: Parts,
    position: Position,
    observer: Observer,
    gauges: Gauges,
    saver: Saver,
    stop_requested: Callable[[], bool],
    beat: Beat,
) -> None:
    """Trains from `position` to the end of its epoch. Every rank calls this; arguments as for `train`."""
    config, plan, epoch, begin = parts.config, parts.plan, position.epoch, position.samples
    order = plan.order(epoch)
    steps = range(begin // plan.batch_size, plan.steps_per_epoch)
    parts.augment.start_epoch(epoch, order, *parts.image_size)
    seed = seeder(parts.accelerator.device)

    def beat_in(step: int) -> Callable[[Phase, int], None]:
        return lambda phase, part: beat(phase, step, part)

    meter = Meter(parts.accelerator.device)
    seen: list[Ids] = []
    with contextlib.closing(served(parts, epoch, steps, order)) as pieces:
        for index in steps:
            places = plan.batch(index)
            now = epoch + (places.start + places.stop) / 2 / plan.samples_per_epoch  # the middle of the step
            set_lr(parts.optimizer, [rate.at(now, config.train.epochs) for rate in parts.rates])
            # Dropout depends on the step and the rank alone, so that a resumed run draws the same.
            seed(counter_rng.derive(config.seed, _NOISE, position.step, parts.rank) >> 1)

            ids = train_step(parts, pieces, len(places), meter, beat_in(position.step + 1))

            seen.append(ids)
            position.step += 1
            position.samples = places.stop
            position.samples_seen += len(places)
            if config.train.trace_samples:
                observer.trace(epoch + 1, position.step, ids.tolist())
            last = places.stop == plan.samples_per_epoch
            save_due = position.step % (config.checkpoint.every_steps or position.step + 1) == 0
            log_due = position.step % config.monitor.log_every_steps == 0
            stopping = parts.world_size == 1 and stop_requested()
            if log_due or save_due or last or stopping:  # a save follows a look at the loss
                # Collective and device synchronisation: all ranks meet here.
                saver.check()
                beat(Phase.REPORT, position.step, 0)
                lr = config.optim.lr * lr_factor(config.schedule, now, config.train.epochs)
                stopping = log_point(parts, position, lr, meter, observer, gauges, stop_requested())
                if last or stopping:
                    prove(parts, seen, plan.ids_between(order, begin, places.stop))
                if (save_due or stopping) and not last:
                    beat(Phase.SAVE, position.step, 0)
                    saver.save(False)
                    meter.restart()
                if stopping and not last:
                    saver.wait()
                    raise StoppedError(f"stopped at step {position.step:,}; saved, resumable")
    position.epoch, position.samples = epoch + 1, 0


@dataclass(frozen=True)
class Piece:
    """What one rank puts through the model at once: its share of a global batch, or a part of it.

    Attributes:
        own: places of the epoch.
        partners: places of the samples that are mixed in, int64 [B], or None.
        mix: how they are mixed, or None.
        counts: whether it counts; a rank without a sample of its own takes part with a weight of zero.
        last: whether it is the rank's last one of the step.
    """

    own: range
    partners: Ids | None
    mix: Mix | None
    counts: bool
    last: bool

    @property
    def window(self) -> Window:
        """The places to load: own samples, then partners."""
        if self.partners is None:
            return slice(self.own.start, self.own.stop)
        return np.concatenate([np.arange(self.own.start, self.own.stop), self.partners])


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
        partners = None
        if mix is not None:
            offsets = np.arange(piece.start, piece.stop) - places.start + mix.shift
            partners = places.start + offsets % len(places)
        yield Piece(piece, partners, mix, counts, last=i == number - 1)


def served(parts: Parts, epoch: int, steps: range, order: Ids) -> Generator[tuple[Piece, Batch], None, None]:
    """Yields this rank's pieces of the steps of an epoch with their samples, which are loaded ahead."""
    pieces, ahead = itertools.tee(piece for index in steps for piece in step_pieces(parts, epoch, index))
    with contextlib.closing(parts.train_data.batches(order, (piece.window for piece in ahead))) as batches:
        yield from zip(pieces, batches, strict=True)


def train_step(
    parts: Parts,
    pieces: Iterator[tuple[Piece, Batch]],
    global_batch: int,
    meter: Meter,
    beat: Callable[[Phase, int], None] = no_beat,
) -> Ids:
    """Takes one optimizer step. Every rank calls this.

    The loss of a rank is its sum divided by the size of the global batch, times the world size, because DDP
    takes the mean over ranks: the gradient is that of the mean over the global batch, whatever the shares.

    Args:
        parts: what to train with.
        pieces: gives this rank's pieces of the step.
        global_batch: samples of the step over all ranks.
        meter: takes loss, hits and times.
        beat: told the phase and the part that begins.

    Returns:
        The ids that this rank trained on, int64 [B].
    """
    # In plain torch: the wrappers of Accelerate look for packages and signatures in every step.
    config, scaler = parts.config.train, parts.accelerator.scaler
    ids: list[Ids] = []
    last = False
    for number in itertools.count():
        beat(Phase.DATA, number)
        with meter.waiting():
            piece, batch = next(pieces)
            images, labels, partners = prepare(parts, piece, batch)
        last = piece.last
        beat(Phase.COMPUTE, 2 * number)
        with contextlib.nullcontext() if last else unreduced(parts):
            with contextlib.nullcontext() if len(images) == parts.compiled_batch else as_written(parts):
                logits = parts.model(images)
            loss = loss_sum(logits, labels, partners, piece.mix, config.label_smoothing)
            beat(Phase.COMPUTE, 2 * number + 1)  # the backward pass: here the ranks wait for each other
            scaled = loss * (parts.world_size / global_batch if piece.counts else 0.0)
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        if piece.counts:
            meter.add(loss, logits, labels)
            ids.append(batch.ids[: len(piece.own)])
        if last:
            break
    if config.grad_clip is not None:
        if scaler is not None:
            scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.model.parameters(), config.grad_clip)
    if scaler is None:
        parts.optimizer.step()
    else:
        scaler.step(parts.optimizer)
        scaler.update()
    parts.optimizer.zero_grad(set_to_none=True)
    if parts.ema is not None:
        parts.ema.update_parameters(parts.bare_model)
    meter.steps += 1
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def unreduced(parts: Parts) -> contextlib.AbstractContextManager[None]:
    """Leaves gradients on this rank, to be reduced with those of a later pass."""
    if parts.world_size == 1:
        return contextlib.nullcontext()
    assert isinstance(parts.model, DistributedDataParallel)
    return parts.model.no_sync()


def prepare(parts: Parts, piece: Piece, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the augmented images, their labels and, if mixed, the labels of their partners."""
    window = piece.window
    if isinstance(window, slice):
        return parts.augment.train(batch.images, window), batch.labels, None
    places = torch.from_numpy(window).to(parts.accelerator.device, non_blocking=True)
    mixed = parts.augment.train(batch.images, places)
    count, mix = len(piece.own), piece.mix
    assert mix is not None
    images, others = mixed[:count], mixed[count:]
    if mix.box is None:
        images.lerp_(others, 1 - mix.share)
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, batch.labels[:count], batch.labels[count:]


def prove(parts: Parts, seen: Sequence[Ids], expected: Ids) -> None:
    """Checks that all ranks together trained on exactly the expected samples. Every rank calls this.

    Args:
        parts: what was trained with.
        seen: ids that this rank trained on.
        expected: ids that all ranks should have trained on, in any order.

    Raises:
        DataError: a sample was left out, repeated or replaced.
    """
    count, total = digest(np.concatenate(seen) if seen else np.empty(0, np.int64))
    # In halves, whose sums are exact in float64.
    sums = reduce_sum(parts, [count, total & 0xFFFFFFFF, total >> 32])
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


class Meter:
    """Sums since the last log point: loss and hits on the device, times on the host.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self.samples = 0
        self.steps = 0
        self.wait_s = 0.0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds the summed loss and the hits of a part of a batch, without a synchronisation.

        Most are only noted, and counted some steps at once.
        """
        self._pending.append((loss.detach(), logits.detach(), labels))
        self.samples += len(labels)
        if len(self._pending) == _COUNTED_AT_ONCE:
            self._count()

    def totals(self) -> list[float]:
        """Returns the sum of the losses and the hits; waits for the device."""
        self._count()
        totals: list[float] = self._sums.tolist()
        return totals

    def _count(self) -> None:
        if self._pending:
            losses, logits, labels = zip(*self._pending, strict=True)
            hits = (torch.cat(logits).argmax(1) == torch.cat(labels)).sum()
            self._sums += torch.stack([torch.stack(losses).sum(dtype=torch.float64), hits])
            self._pending.clear()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - began

    def restart(self) -> None:
        """Begins a new interval."""
        self._pending.clear()
        self._sums.zero_()
        self.samples, self.steps, self.wait_s = 0, 0, 0.0
        self.started = time.perf_counter()


def log_point(
    parts: Parts,
    position: Position,
    lr: float,
    meter: Meter,
    observer: Observer,
    gauges: Gauges,
    stop_requested: bool,
) -> bool:
    """Reduces the sums of all ranks once and reports them. Every rank calls this.

    Returns:
        Whether any rank was asked to stop.

    Raises:
        TrainingError: the loss is not finite.
    """
    own = [*meter.totals(), meter.samples, meter.wait_s, float(stop_requested)]
    interval_s = time.perf_counter() - meter.started  # after the synchronisation that the sums need
    totals = reduce_sum(parts, [*own, *gauges.read()])
    loss, correct, samples, wait_s, stopping, *readings = totals
    record = {
        "kind": "train",
        "step": position.step,
        "epoch": position.epoch + 1,
        "samples": position.samples_seen,
        "loss": loss / samples,
        "accuracy": correct / samples,
        "lr": lr,
        "images_per_s": samples / interval_s,
        "step_time_s": interval_s / meter.steps,
        "data_wait_pct": 100 * wait_s / (interval_s * parts.world_size),
        "skipped": len(parts.plan.skipped),
        **gauges.rows(readings),
    }
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is not finite ({loss}) in the {meter.steps} steps up to step {position.step:,} "
            f"(epoch {position.epoch + 1}); lower optim.lr, set train.grad_clip, or use train.precision=fp32"
        )
    observer.train(record)
    meter.restart()
    return stopping > 0


def finish_epoch(parts: Parts, position: Position, observer: Observer, saver: Saver, beat: Beat) -> bool:
    """Evaluates and saves as the config says, and always after the last epoch. Every rank calls this.

    Returns:
        Whether a checkpoint was saved.
    """
    config = parts.config
    last = position.epoch == config.train.epochs
    best = False
    if last or position.epoch % config.eval.every_epochs == 0:
        tta = config.eval.tta if last or config.eval.tta_when == "always" else "none"
        record = evaluate(parts, tta, partial(beat, Phase.EVALUATE, position.step))
        record |= {"step": position.step, "epoch": position.epoch}
        observer.evaluate(record)
        best = position.best_accuracy is None or record["accuracy"] > position.best_accuracy
        if best:
            position.best_accuracy = record["accuracy"]
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    due = last or best or position.epoch % every_epochs == 0
    if every_steps is not None:
        due = due or position.step % every_steps == 0
    if due:
        beat(Phase.SAVE, position.step, 1)
        saver.save(best)
    return due


def evaluate(
    parts: Parts, tta: Literal["none", "flip", "multi_view"], beat: Callable[[int], None] = no_beat
) -> dict[str, Any]:
    """Evaluates the model, or its moving average, on the validation split. Every rank calls this.

    Args:
        parts: what to evaluate with.
        tta: the test-time augmentation.
        beat: told the number of the batch that begins.

    Returns:
        A record of metrics.jsonl: loss, accuracy 0..1, correct, total; with a test-time augmentation also
        the accuracy and the correct ones without it.

    Raises:
        DataError: the ranks together did not see every sample.
    """
    beat(0)
    average_buffers(parts, parts.bare_model)
    model: nn.Module = parts.bare_model
    if parts.ema is not None:
        average_buffers(parts, parts.ema.module)
        model = parts.ema.module
    device = parts.accelerator.device
    own = share(range(len(parts.val_ids)), parts.rank, parts.world_size)
    # Nothing is kept for a backward pass, so that more fits than in training.
    size = max(1, parts.plan.batch_size // (parts.world_size * parts.config.train.accumulate))
    size = max(size, min(4 * size, _EVAL_BATCH))
    windows = (slice(begin, min(begin + size, own.stop)) for begin in range(own.start, own.stop, size))
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # correct, total, correct without augmentation
    loss = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with (
        torch.inference_mode(),
        as_written(parts),
        parts.accelerator.autocast(),
        contextlib.closing(parts.val_data.batches(parts.val_ids, windows)) as batches,
    ):
        for number, batch in enumerate(batches, 1):
            beat(number)
            plain: Tensor | None = None
            logits = torch.zeros((), device=device)
            for images, weight in views(parts.augment.plain(batch.images), tta):
                scores = model(images).float()
                plain = scores if plain is None else plain
                logits = logits + weight * scores
            loss += F.cross_entropy(logits, batch.labels, reduction="sum")
            assert plain is not None
            hits = [(scores.argmax(1) == batch.labels).sum() for scores in (logits, plain)]
            counts += torch.stack([hits[0], torch.tensor(len(batch.labels), device=device), hits[1]])
    model.train()
    if parts.world_size > 1:  # collective: every rank
        dist.all_reduce(counts)
        dist.all_reduce(loss)
    correct, total, plain_correct = counts.tolist()
    if total != len(parts.val_ids):
        raise DataError(
            f"evaluation saw {total:,} samples, the index has {len(parts.val_ids):,}: this must not be; "
            "please report it"
        )
    record = {
        "kind": "eval",
        "loss": loss.item() / total,
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "skipped": parts.val_skipped,
    }
    if tta != "none":
        record |= {"tta": tta, "plain_accuracy": plain_correct / total, "plain_correct": plain_correct}
    return record


def views(images: Tensor, tta: Literal["none", "flip", "multi_view"]) -> Iterator[tuple[Tensor, float]]:
    """Yields the images as each pass of a test-time augmentation sees them, with the weight of its scores.

    The first are the images as they are. multi_view is that of Jordan 2024 (airbench): the mirrored images
    too, and both shifted by a pixel to the upper left and to the lower right with half the weight.

    Args:
        images: [B, C, H, W].
        tta: the test-time augmentation.
    """
    if tta == "none":
        yield images, 1.0
        return
    shifted = []
    if tta == "multi_view":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    for seen, weight in ((images, 0.5 if shifted else 1.0), *((one, 0.25) for one in shifted)):
        yield seen, weight / 2
        yield seen.flip(3), weight / 2


@contextlib.contextmanager
def as_written(parts: Parts) -> Iterator[None]:
    """Runs a model that is compiled for one size of batch without its compilation."""
    if parts.compiled_batch is None:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def seeder(device: torch.device) -> Callable[[int], object]:
    """Returns a function that seeds the random numbers of a device.

    torch.manual_seed seeds every kind of device there is and takes a tenth of a millisecond for it.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].manual_seed
    return torch.default_generator.manual_seed


def average_buffers(parts: Parts, model: nn.Module) -> None:
    """Makes the batch-norm statistics the mean over the ranks. Every rank calls this."""
    if parts.world_size == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:
        flat = torch.cat([buffer.reshape(-1).float() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= parts.world_size
        pieces = flat.split([buffer.numel() for buffer in buffers])
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.copy_(piece.view_as(buffer))


def reduce_sum(parts: Parts, values: Sequence[float]) -> list[float]:
    """Sums numbers over the ranks in float64. Every rank calls this."""
    if parts.world_size == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=parts.accelerator.device)
    dist.all_reduce(totals)
    result: list[float] = totals.tolist()
    return result


def stop_requested_anywhere(parts: Parts, requested: bool) -> bool:
    """Tells whether any rank was asked to stop. Every rank calls this."""
    return reduce_sum(parts, [float(requested)])[0] > 0
