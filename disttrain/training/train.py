"""The training loop.

Between two log points there is no device synchronisation, no collective but the reduction of the gradients
and no Python work per sample; where steps are slow, and before their time is known, several ranks ask one
another about once a second whether one of them is to stop. (The gradient scaler of fp16 waits for the device
in each step, unless the optimizer is a single fused one.) This module knows nothing of terminals, NVML, Click
or Slurm: it is handed what it calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from disttrain import counter_rng
from disttrain.data.plan import Ids
from disttrain.errors import StoppedError
from disttrain.heartbeat import Phase
from disttrain.parallel import in_order
from disttrain.training.collectives import stop_requested_anywhere
from disttrain.training.evaluation import evaluate
from disttrain.training.exactly_once import check_exactly_once
from disttrain.training.log_point import log_point
from disttrain.training.microbatch import prefetch
from disttrain.training.nonfinite import check_loss
from disttrain.training.optim import lr_factor, set_lr
from disttrain.training.parts import Hooks, Parts, Position
from disttrain.training.rank_state import drawing_apart
from disttrain.training.step import train_step

_NOISE = 16  # the stream of random numbers that seeds dropout


def train(parts: Parts, position: Position, hooks: Hooks) -> None:
    """Trains from `position`, which is kept up to date, to the end of the run. Every rank calls this.

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
    """Trains from `position` to the end of its epoch, whose order is given. Every rank calls this.

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
    with contextlib.closing(prefetch(parts, epoch, steps, order)) as batches:
        for index in steps:
            places = plan.batch(index)
            now = epoch + (places.start + places.stop) / 2 / plan.samples_per_epoch  # the middle of the step
            set_lr(parts.optimizer, [rate.at(now, config.train.epochs) for rate in parts.rates])
            # Dropout depends on the step and the rank alone, so that a resumed run draws the same.
            seed(counter_rng.derive(config.seed, _NOISE, position.step, parts.rank) >> 1)

            ids = train_step(parts, batches, position.step + 1, len(places), hooks.phases)

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
                asked = hooks.stop_requested()
                stopping = stop_requested_anywhere(parts.group, Phase.REPORT, position.step, asked)
            if last or stopping:
                check_exactly_once(parts, position.step, seen, plan.ids_between(order, begin, places.stop))
            if stopping and not last:
                check_loss(parts, position, seen, hooks)
                stop(position, hooks, f"at step {position.step:,}", saved=save_due)
    position.epoch, position.samples, position.evaluation_due = epoch + 1, 0, True


def finish_epoch(parts: Parts, position: Position, hooks: Hooks) -> None:
    """Evaluates and saves as the config says, and always after the last epoch. Every rank calls this.

    Raises:
        StoppedError: a rank was asked to stop.
    """
    config, done = parts.config, f"epoch {position.epoch}"
    last = position.epoch == config.train.epochs
    best, found = False, None
    if last or position.epoch % config.eval.every_epochs == 0:
        tta = config.eval.tta if last or config.eval.tta_when == "always" else "none"
        with drawing_apart(parts.accelerator.device):
            found = evaluate(parts, tta, step=position.step, hooks=hooks)
        if found is None:
            stop(position, hooks, f"in the evaluation after {done}")
            return
        record = found.record
        record.step, record.epoch = position.step, position.epoch
        hooks.observer.evaluate(record)
        best = position.best_accuracy is None or record.accuracy > position.best_accuracy
        if best:
            position.best_accuracy = record.accuracy
    position.evaluation_due = False
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    due = last or best or position.epoch % every_epochs == 0
    if every_steps is not None:
        due = due or position.step % every_steps == 0
    hooks.phases.enter(Phase.SAVE, position.step, 0)
    if due:
        hooks.saver.save(best=best, evaluation=found)
    asked = stop_requested_anywhere(parts.group, Phase.SAVE, position.step, hooks.stop_requested())
    if asked and not last:
        stop(position, hooks, f"after {done}", saved=due)


def seeder(device: torch.device) -> Callable[[int], object]:
    """Returns a function that seeds the random numbers of a device.

    torch.manual_seed seeds every kind of device there is and takes a tenth of a millisecond for it.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].manual_seed
    return torch.default_generator.manual_seed
