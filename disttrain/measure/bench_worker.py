"""What every rank of `disttrain bench` runs: the parts of a training step, measured on the real thing.

Builds what a run builds, from the same functions, and leaves nothing behind: no run folder, no checkpoint.
What was measured is the answer to the job that `disttrain bench` has given (`disttrain.launch.jobs`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from disttrain.config import Config, load_config
from disttrain.launch.jobs import serve
from disttrain.preflight import check_device, open_index, split_batch
from disttrain.runs.runfolder import RunFolder
from disttrain.training.build import build
from disttrain.training.group import best_device, join
from disttrain.training.rank import Rank

if TYPE_CHECKING:
    import torch

    from disttrain.data.batches import Batch, Loader, Window
    from disttrain.data.plan import Ids
    from disttrain.shards.index import Index
    from disttrain.training.choices import Choice, Settings, Workload
    from disttrain.training.microbatch import MicroBatch
    from disttrain.training.parts import Parts
    from disttrain.training.saver import RunSaver


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measures as one rank of the group that the environment describes."""
    rank = Rank(int(os.environ.get("RANK", "0")), None)
    return measure(load_config(Path(request["config"])), rank, request["what"], request["seconds"])


def measure(config: Config, rank: Rank, what: str, seconds: float) -> dict[str, Any]:
    """Returns what was measured. Every rank calls this.

    Args:
        config: the experiment.
        rank: this process.
        what: "all", or "step" for the step time alone.
        seconds: that each measurement takes at least.
    """
    import torch

    device = best_device()
    check_device(config, device)
    group = join(config, device)
    try:
        index = open_index(config, lambda text: None)
        parts, _, choices = build(config, rank, group, index, None)
        work = workload(parts, index)
        bench = StepBench(parts, seconds)
        results: dict[str, Any] = {
            "processes": parts.world_size,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(group.device) if device == "cuda" else "CPU",
            "torch": torch.__version__,
            "batch": config.train.batch_size,
            "choices": {name: str(choice) for name, choice in choices.items()},
            "step_s": bench.step(parts.train_data),
        }
        if what == "all":
            results |= {
                "replayed_step_s": bench.step(Replay(parts.train_data, group.device)),
                "phases_s": bench.phases() | {"logging": bench.logging(config, index, choices)},
                "table": settings_table(work, seconds, compiling=config.train.compile is not False),
            }
            results |= flops(parts, results["step_s"])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return results


def workload(parts: Parts, index: Index) -> Workload:
    """Returns what one rank computes in a pass."""
    from disttrain.training.choices import Workload

    return Workload(
        parts.bare_model,
        split_batch(parts.config, parts.world_size),
        (index.channels, index.height, index.width),
        len(index.classes),
        1,
        parts.world_size,
    )


class Replay:
    """Serves the first batch of a loader again and again, under the ids that the plan has for each.

    Args:
        loader: gives the batch.
        device: where it stays.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def batches(self, order: Ids, windows: Iterable[Window]) -> Generator[Batch, None, None]:
        """Yields as many samples of the first window as each window has."""
        from disttrain.data.batches import Batch

        windows = iter(windows)
        first = next(windows)
        with contextlib.closing(self._loader.batches(order, [first])) as batches:
            batch = next(batches).to(self._device)
        yield batch
        for window in windows:
            ids = order[window]
            yield Batch(batch.images[: len(ids)], batch.labels[: len(ids)], ids)


class StepBench:
    """Measures training steps; every rank makes one and calls its methods in the same order.

    Args:
        parts: of a run; the model is trained in the process.
        seconds: that each measurement takes at least.
    """

    def __init__(self, parts: Parts, seconds: float) -> None:
        self._parts = parts
        self._seconds = seconds
        self._order = parts.plan.order(0)
        parts.augment.start_epoch(0, self._order, *parts.image_size)
        parts.model.train()

    def step(self, loader: Loader) -> float:
        """Returns the seconds of a training step of the ordinary loop with samples from a loader."""
        from disttrain.training.phases import Phases
        from disttrain.training.step import train_step

        parts = self._parts

        def run(batches: Iterator[tuple[MicroBatch, Batch]]) -> None:
            train_step(parts, batches, 1, parts.plan.batch_size, Phases())

        return self._repeat(loader, run)

    def phases(self) -> dict[str, float]:
        """Returns the seconds of each phase of a step, one after the other with nothing overlapping."""
        import torch

        from disttrain.training.microbatch import prepare
        from disttrain.training.step import loss_sum, no_sync

        parts, config = self._parts, self._parts.config.train
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
                batch = batch.to(parts.accelerator.device)
                now = clocked("to_device", now)
                images, labels, partners = prepare(parts, micro, batch)
                now = clocked("augmentation", now)
                with contextlib.nullcontext() if reduced else no_sync(parts):
                    logits = parts.model(images)
                    loss = loss_sum(logits, labels, partners, micro.mix, config.label_smoothing)
                    now = clocked("forward", now)
                    loss.backward(torch.full_like(loss, parts.world_size / config.batch_size))
                    clocked("backward and reduction" if reduced else "backward", now)

        def alone(batches: Iterator[tuple[MicroBatch, Batch]]) -> None:
            passes(batches, reduced=False)
            now = time.perf_counter()
            parts.optimizer.step()
            parts.drop_gradients()
            clocked("optimizer", now)

        def together(batches: Iterator[tuple[MicroBatch, Batch]]) -> None:
            passes(batches, reduced=True)
            parts.drop_gradients()

        names = ("data", "to_device", "augmentation", "forward", "backward", "optimizer")
        self._repeat(parts.train_data, alone, before=sums.clear)
        steps = self._steps
        result = {name: sums[name] / steps for name in names}
        if parts.world_size > 1:
            self._repeat(parts.train_data, together, before=sums.clear)
            result["communication"] = max(
                0.0, sums["backward and reduction"] / self._steps - result["backward"]
            )
        return result

    def logging(self, config: Config, index: Index, choices: dict[str, Choice]) -> float:
        """Returns the seconds of a log point, metrics written and shown, divided by the steps between two."""
        from disttrain.monitor.observe import RunObserver
        from disttrain.training.log_point import log_point
        from disttrain.training.parts import Hooks, Position

        position = Position(step=1, samples_seen=1)
        every = config.monitor.log_every_steps
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            observer = RunObserver(config, run, self._parts, position, index, choices, verbosity=-1)

            nothing_saved = cast("RunSaver", None)
            hooks = Hooks(observer, observer.gauges, nothing_saved, lambda: False)

            def point() -> None:
                self._parts.meter.samples, self._parts.meter.steps = 1, every
                log_point(self._parts, position, [], 0.1, hooks)

            with observer:
                return self._timed(point) / every

    def _repeat(
        self,
        loader: Loader,
        step: Callable[[Iterator[tuple[MicroBatch, Batch]]], None],
        before: Callable[[], None] = lambda: None,
    ) -> float:
        """Takes full steps with samples from a loader for the time of a measurement.

        Returns:
            Seconds a step.
        """
        from disttrain.training.microbatch import prefetch

        parts, plan = self._parts, self._parts.plan
        parts.meter.restart()
        full = max(1, plan.samples // plan.batch_size)
        own, parts.train_data = parts.train_data, loader
        warm_up, taken, began = 2, 0, 0.0
        try:
            more = True
            while more:
                with contextlib.closing(prefetch(parts, 0, range(full), self._order)) as batches:
                    for _ in range(full):
                        if taken == warm_up:
                            self._synchronize()
                            before()
                            began = time.perf_counter()
                        step(batches)
                        taken += 1
                        if taken > warm_up + 2 and taken % 4 == 0:  # the ranks agree now and then
                            more = self._all(time.perf_counter() - began < self._seconds)
                            if not more:
                                break
            self._synchronize()
        finally:
            parts.train_data = own
        self._steps = taken - warm_up
        return (time.perf_counter() - began) / self._steps

    def _timed(self, call: Callable[[], object]) -> float:
        """Returns the seconds of one call."""
        call()
        self._synchronize()
        count, began, more = 0, time.perf_counter(), True
        while more:
            call()
            count += 1
            if count % 4 == 0:
                more = self._all(time.perf_counter() - began < self._seconds / 4)
        self._synchronize()
        return (time.perf_counter() - began) / count

    def _all(self, more: bool) -> bool:
        from disttrain.heartbeat import Phase
        from disttrain.training.collectives import reduce_sum

        return reduce_sum(self._parts.group, Phase.COMPUTE, 0, [float(more)])[0] == self._parts.world_size

    def _synchronize(self) -> None:
        import torch

        if self._parts.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._parts.accelerator.device)


def settings_table(work: Workload, seconds: float, *, compiling: bool) -> list[dict[str, Any]]:
    """Returns forward and backward for precision x channels_last x compile. Every rank calls this.

    Args:
        work: what is computed.
        seconds: that a measurement takes.
        compiling: also compile, which takes long.
    """
    from disttrain.training.choices import Probe, ProbeError

    probe = Probe(work)
    rows = []
    for settings in _all_settings(probe.device.type == "cuda", compiling):
        row: dict[str, Any] = {
            "precision": settings.precision,
            "channels_last": settings.channels_last,
            "compile": settings.compiled,
        }
        try:
            row["pass_s"] = probe.seconds(settings, least_s=seconds / 4)
            row["images_per_s"] = probe.batch / row["pass_s"]
        except ProbeError as error:
            row |= {"pass_s": None, "error": str(error)}
        rows.append(row)
    return rows


def _all_settings(on_gpu: bool, compiling: bool) -> Iterator[Settings]:
    import torch

    from disttrain.training.choices import Settings

    for compiled in (False, True) if compiling else (False,):
        for precision in ("fp32", "tf32", "bf16", "fp16") if on_gpu else ("fp32", "bf16"):
            for channels_last in (True, False):
                yield Settings(precision, channels_last, compiled, torch.get_num_threads())


def flops(parts: Parts, step_s: float) -> dict[str, Any]:
    """Returns the arithmetic of a training step and how near it comes to what the device can do."""
    from disttrain.training.flops import device_flops, peak_flops_per_s

    precision = parts.settings.precision
    peak, source = peak_flops_per_s(parts.accelerator.device, precision)
    if parts.accelerator.device.type == "cpu":
        peak, source = _measured_peak(precision)
    images_per_s = parts.plan.batch_size / step_s / parts.world_size
    found = device_flops(parts.flops_per_image, images_per_s, peak_per_s=peak)["device_flops_per_s"]
    return {
        "flops_per_image": parts.flops_per_image,
        "flops_per_s_and_device": found,
        "peak_flops_per_s": peak,
        "peak_source": source,
        "share_of_peak": None if peak is None or found is None else found / peak,
    }


def _measured_peak(precision: str) -> tuple[float, str]:
    """Returns the operations per second that this CPU does in a precision, and how that was found."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 1024
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best, f"a product of {side}x{side} matrices, measured here"


if __name__ == "__main__":
    serve(answer)
