"""The training loop.

Between two log points, nothing waits for the device, the gradient reduction is the only collective, and no
Python code runs per sample. There are two exceptions. With several ranks and slow steps, the ranks poll about
once a second whether one of them should stop. With fp16, the gradient scaler waits for the device in each
step, unless the optimizer is a single fused one. This module knows nothing of terminals, NVML, Click or
Slurm; it gets its callbacks as arguments.
"""

from __future__ import annotations

import contextlib

from disttrain.data.epoch_plan import Ids
from disttrain.errors import StoppedError
from disttrain.heartbeat import Phase
from disttrain.parallel import ordered_map
from disttrain.runs.evaluation import Evaluation
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import stop_requested_anywhere
from disttrain.training.evaluation import evaluate
from disttrain.training.exactly_once import check_exactly_once
from disttrain.training.log_metrics import log_metrics
from disttrain.training.microbatch import prefetch
from disttrain.training.nonfinite import check_loss
from disttrain.training.optim import lr_factor, set_lr
from disttrain.training.rng import preserve_rng_state
from disttrain.training.selection import is_best, stops_early
from disttrain.training.state import Progress, TrainState
from disttrain.training.virtual_ranks import step_function
from disttrain.training.wrapping import unfreeze_if_due


def train(state: TrainState, progress: Progress, callbacks: Callbacks) -> None:
    """Trains from `progress` to the end of the run, and keeps `progress` up to date. Every rank calls this.

    Raises:
        TrainingError: the loss is not finite, or the ranks are out of step.
        StoppedError: a rank was asked to stop; a checkpoint was saved.
        DataError: the ranks did not see every sample exactly once.
        StorageError: a checkpoint cannot be written.
    """
    state.model.train()
    epochs = range(progress.epoch, state.config.train.epochs)
    # A thread computes the order of the next epoch during this one, so that the GPU need not wait for it.
    with contextlib.closing(ordered_map(state.plan.order, epochs, threads=1, ahead=1)) as orders:
        while progress.evaluation_due or (progress.epoch < epochs.stop and not progress.stopped_early):
            if not progress.evaluation_due:
                train_epoch(state, progress, next(orders), callbacks)
            finish_epoch(state, progress, callbacks)
    callbacks.phases.enter(Phase.SAVE, progress.step, 1)
    callbacks.saver.wait()
    callbacks.phases.enter(Phase.END, progress.step, 0)


def stop(progress: Progress, callbacks: Callbacks, where: str, *, saved: bool = False) -> None:
    """Saves a checkpoint unless `saved`, and ends the run. Every rank calls this.

    Raises:
        StoppedError: always.
    """
    callbacks.phases.enter(Phase.SAVE, progress.step, 0)
    if not saved:
        callbacks.saver.save(best=False, stopping=True)
    callbacks.saver.wait()
    raise StoppedError(f"stopped {where}; saved, resumable")


def train_epoch(state: TrainState, progress: Progress, order: Ids, callbacks: Callbacks) -> None:
    """Trains from `progress` to the end of its epoch, in the given sample order. Every rank calls this.

    Raises:
        TrainingError, StoppedError, DataError, StorageError: see `train`.
    """
    config, plan, epoch, begin = state.config, state.plan, progress.epoch, progress.samples
    steps = range(begin // plan.batch_size, plan.steps_per_epoch)
    state.augment.start_epoch(epoch, order, *state.image_size)
    take_step = step_function(config.train)
    meter = state.meter
    meter.start()
    seen: list[Ids] = []
    with contextlib.closing(prefetch(state, epoch, steps, order)) as batches:
        for index in steps:
            places = plan.batch(index)
            unfreeze_if_due(state, epoch + places.start / plan.samples_per_epoch)
            now = epoch + (places.start + places.stop) / 2 / plan.samples_per_epoch  # the middle of the step
            set_lr(state.optimizer, [rate.at(now, config.train.epochs) for rate in state.lr_schedules])

            ids = take_step(state, batches, progress.step + 1, len(places), callbacks.phases)

            seen.append(ids)
            progress.step += 1
            progress.samples = places.stop
            progress.samples_seen += len(places)
            if config.train.trace_samples:
                callbacks.observer.trace(epoch + 1, progress.step, ids.tolist())
            last = places.stop == plan.samples_per_epoch
            save_due = progress.step % (config.checkpoint.every_steps or progress.step + 1) == 0
            log_due = progress.step % config.monitor.log_every_steps == 0
            stopping = False
            if log_due or save_due or last:  # the loss is checked before every save
                # Collective, and waits for the device.
                callbacks.phases.enter(Phase.REPORT, progress.step, 0)
                callbacks.saver.check()
                lr = config.optim.lr * lr_factor(config.schedule, now, config.train.epochs)
                stopping = log_metrics(state, progress, seen, lr, callbacks)
                if save_due and not last:
                    callbacks.phases.enter(Phase.SAVE, progress.step, 0)
                    callbacks.saver.save(best=False)
                    meter.restart()
            elif state.should_poll_stop(meter.steps):
                # With several ranks: a collective, about once a second.
                asked = callbacks.stop_requested()
                stopping = stop_requested_anywhere(state.group, Phase.REPORT, progress.step, asked)
            if last or stopping:
                expected = plan.ids_between(epoch, order, begin, places.stop)
                check_exactly_once(state, progress.step, seen, expected)
            if stopping and not last:
                check_loss(state, progress, seen, callbacks)
                stop(progress, callbacks, f"at step {progress.step:,}", saved=save_due)
    progress.epoch, progress.samples, progress.evaluation_due = epoch + 1, 0, True


def finish_epoch(state: TrainState, progress: Progress, callbacks: Callbacks) -> None:
    """Evaluates and saves if the config says so, and always at the end of the run. Every rank calls this.

    Raises:
        StoppedError: a rank was asked to stop.
    """
    config, done = state.config, f"epoch {progress.epoch}"
    last = progress.epoch == config.train.epochs
    best, found = False, None
    if last or progress.epoch % config.eval.every_epochs == 0:
        found = evaluate_epoch(state, progress, callbacks)
        if found is None:
            stop(progress, callbacks, f"in the evaluation after {done}")
            return
        callbacks.observer.evaluate(found.record)
        best = is_best(progress, found.record, config)
        last = last or progress.stopped_early
    progress.evaluation_due = False
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    due = last or best or progress.epoch % every_epochs == 0
    if every_steps is not None:
        due = due or progress.step % every_steps == 0
    callbacks.phases.enter(Phase.SAVE, progress.step, 0)
    if due:
        callbacks.saver.save(best=best, evaluation=found)
    asked = stop_requested_anywhere(state.group, Phase.SAVE, progress.step, callbacks.stop_requested())
    if asked and not last:
        stop(progress, callbacks, f"after {done}", saved=due)


def evaluate_epoch(state: TrainState, progress: Progress, callbacks: Callbacks) -> Evaluation | None:
    """Evaluates an epoch, and decides whether the run stops early. Every rank calls this.

    If only the last evaluation uses test-time augmentation, the decision is made without it, and the run is
    evaluated once more.

    Returns:
        The last evaluation, or None if a rank was asked to stop meanwhile.
    """
    config = state.config
    usual = config.eval.tta if config.eval.tta_when == "always" else "none"
    tta = config.eval.tta if progress.epoch == config.train.epochs else usual
    with preserve_rng_state(state.accelerator.device):
        found = evaluate(state, tta, progress, callbacks)
        if found is None or tta != usual or not stops_early(progress, found.record, config):
            return found
        return found if usual == config.eval.tta else evaluate(state, config.eval.tta, progress, callbacks)
