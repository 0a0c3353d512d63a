"""Measures the time of a training step and of its phases, with the training state of a run."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from disttrain.data.batches import Batch
from disttrain.heartbeat import Phase
from disttrain.monitor.observe import RunObserver
from disttrain.runs.runfolder import RunFolder
from disttrain.training.callbacks import Callbacks
from disttrain.training.collectives import reduce_sum
from disttrain.training.log_metrics import log_metrics
from disttrain.training.microbatch import augment_micro_batch, prefetch
from disttrain.training.phases import Phases
from disttrain.training.state import Progress
from disttrain.training.step import forward, no_sync
from disttrain.training.virtual_ranks import step_function

if TYPE_CHECKING:
    from disttrain.data.batches import Loader, Window
    from disttrain.data.epoch_plan import Ids
    from disttrain.shards.crops import Crops
    from disttrain.shards.index import Index
    from disttrain.training.autotune import Choice
    from disttrain.training.microbatch import MicroBatch
    from disttrain.training.saver import RunSaver
    from disttrain.training.state import TrainState


class Replay:
    """A loader that repeats the first batch of another one from device memory, with the ids of the plan."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def batches(
        self, order: Ids, windows: Iterable[Window], crops: Crops | None = None
    ) -> Generator[Batch, None, None]:
        """Yields a batch of the size of each window, with the samples of the first window."""
        windows = iter(windows)
        first = next(windows)
        with contextlib.closing(self._loader.batches(order, [first], crops)) as batches:
            batch = next(batches).to(self._device)
        yield batch
        for window in windows:
            ids = order[window]
            yield Batch(batch.images[: len(ids)], batch.labels[: len(ids)], ids)


def full_batches(
    state: TrainState, epochs: Iterable[tuple[int, Ids]]
) -> Generator[tuple[MicroBatch, Batch], None, None]:
    """Yields the micro-batches of full batches, epoch after epoch, each given with its order."""
    full = range(max(1, state.plan.samples // state.plan.batch_size))
    for epoch, order in epochs:
        state.augment.start_epoch(epoch, order, *state.image_size)
        with contextlib.closing(prefetch(state, epoch, full, order)) as batches:
            yield from batches


class StepBench:
    """Measures training steps. Every rank creates one and calls its methods in the same order.

    Each measurement takes at least `seconds`. It trains the model of `state`.
    """

    def __init__(self, state: TrainState, seconds: float) -> None:
        self._state = state
        self._seconds = seconds
        state.model.train()

    def step(self, loader: Loader) -> float:
        """Returns the seconds of a step of the normal training loop with samples from a loader."""
        state, size = self._state, self._state.plan.batch_size
        take_step = step_function(state.config.train)
        return self._repeat(loader, lambda batches: take_step(state, batches, 1, size, Phases()))

    def phases(self) -> dict[str, float]:
        """Returns the seconds of each phase of a step, with a synchronization after each, without overlap."""
        state, config = self._state, self._state.config.train
        sums: dict[str, float] = {}

        def clocked(name: str, since: float) -> float:
            self._synchronize()
            now = time.perf_counter()
            sums[name] = sums.get(name, 0.0) + now - since
            return now

        def passes(batches: Iterator[tuple[MicroBatch, Batch]], *, reduced: bool) -> None:
            last = False
            while not last:
                now = time.perf_counter()
                micro, batch = next(batches)
                last = micro.last
                now = clocked("data", now)
                batch = batch.to(state.accelerator.device)
                now = clocked("to_device", now)
                inputs = augment_micro_batch(state, micro, batch)
                now = clocked("augmentation", now)
                for _, images, labels, partners, _ in inputs:
                    with contextlib.nullcontext() if reduced else no_sync(state):
                        loss, _ = forward(state, micro, images, labels, partners)
                        now = clocked("forward", now)
                        loss.backward(torch.full_like(loss, state.world_size / config.batch_size))
                        now = clocked("backward and reduction" if reduced else "backward", now)

        def without_reduction(batches: Iterator[tuple[MicroBatch, Batch]]) -> None:
            passes(batches, reduced=False)
            now = time.perf_counter()
            state.optimizer.step()
            state.drop_gradients()
            clocked("optimizer", now)

        def with_reduction(batches: Iterator[tuple[MicroBatch, Batch]]) -> None:
            passes(batches, reduced=True)
            state.drop_gradients()

        names = ("data", "to_device", "augmentation", "forward", "backward", "optimizer")
        self._repeat(state.train_data, without_reduction, before=sums.clear)
        result = {name: sums[name] / self._steps for name in names}
        if isinstance(state.model, DistributedDataParallel):
            self._repeat(state.train_data, with_reduction, before=sums.clear)
            reduced = sums["backward and reduction"] / self._steps
            result["communication"] = max(0.0, reduced - result["backward"])
        return result

    def logging(self, index: Index, choices: dict[str, Choice]) -> float:
        """Returns the seconds of a log point, divided by the steps between two log points."""
        config, progress = self._state.config, Progress(step=1, samples_seen=1)
        every = config.monitor.log_every_steps
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            observer = RunObserver(config, run, self._state, progress, index, choices, verbosity=-1)

            nothing_saved = cast("RunSaver", None)
            callbacks = Callbacks(observer, observer.gauges, nothing_saved, lambda: False)

            def point() -> None:
                self._state.meter.samples, self._state.meter.steps = 1, every
                log_metrics(self._state, progress, [], 0.1, callbacks)

            with observer:
                point()  # warm-up
                self._synchronize()
                count, began = 0, time.perf_counter()
                while count == 0 or count % 4 or self._all(time.perf_counter() - began < self._seconds / 4):
                    point()
                    count += 1
                self._synchronize()
                return (time.perf_counter() - began) / count / every

    def _repeat(
        self,
        loader: Loader,
        step: Callable[[Iterator[tuple[MicroBatch, Batch]]], object],
        before: Callable[[], None] = lambda: None,
    ) -> float:
        """Runs full steps with samples from a loader for at least `seconds`; returns the seconds per step."""
        state = self._state
        state.meter.restart()
        # The order is not timed: a run computes it in a thread.
        epochs = itertools.repeat((0, state.plan.order(0)))
        own, state.train_data = state.train_data, loader
        warm_up, taken, began = 2, 0, 0.0
        try:
            more = True
            with contextlib.closing(full_batches(state, epochs)) as batches:
                while more:
                    if taken == warm_up:
                        self._synchronize()
                        before()
                        began = time.perf_counter()
                    step(batches)
                    taken += 1
                    if taken > warm_up + 2 and taken % 4 == 0:  # the ranks agree on whether to stop
                        more = self._all(time.perf_counter() - began < self._seconds)
            self._synchronize()
        finally:
            state.train_data = own
        self._steps = taken - warm_up
        return (time.perf_counter() - began) / self._steps

    def _all(self, more: bool) -> bool:
        return reduce_sum(self._state.group, Phase.COMPUTE, 0, [float(more)])[0] == self._state.world_size

    def _synchronize(self) -> None:
        if self._state.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._state.accelerator.device)
