"""disttrain's own loop over one batch that is replayed, from the parts that its worker builds.

    python benchmarks/peers/ours_replay.py CONFIG [KEY=VALUE ...] [--warmup 20] [--steps 200]

Beside a run over real data it shows what loading costs: normalising and everything else stays.
monitor.log_every_steps sets the intervals whose median is the result.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Generator, Iterable
from pathlib import Path

from disttrain import worker
from disttrain.config import load_config
from disttrain.data.batches import Batch, Loader
from disttrain.errors import StoppedError
from disttrain.preflight import open_index
from disttrain.train import train


class Replay:
    """Serves the first batch of a loader in place of every other of that size."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def batches(self, order, windows: Iterable[slice]) -> Generator[Batch, None, None]:
        """Yields as many samples as each window has, under the ids that the plan has for it."""
        windows = iter(windows)
        first = next(windows)
        (batch,) = self._loader.batches(order, [first])
        yield batch
        for window in windows:
            ids = order[window]
            yield Batch(batch.images[: len(ids)], batch.labels[: len(ids)], ids)


class Observer:
    """Keeps the step times after the warm-up; the methods are those of disttrain.train.Observer."""

    def __init__(self, warmup: int, end: int) -> None:
        self.warmup, self.end = warmup, end
        self.times: list[float] = []
        self.done = False

    def train(self, record: dict) -> None:
        """Keeps the step time."""
        if record["step"] > self.warmup:
            self.times.append(record["step_time_s"])
        self.done = record["step"] >= self.end

    def evaluate(self, record: dict) -> None:
        """Does nothing."""

    def trace(self, epoch: int, step: int, ids) -> None:
        """Does nothing."""


class NoGauges:
    """Nothing to read; the methods are those of disttrain.train.Gauges."""

    def read(self) -> list[float]:
        """Returns no numbers."""
        return []

    def rows(self, totals) -> dict:
        """Returns no keys."""
        return {}


class NoSaver:
    """Saves nothing; the methods are those of disttrain.train.Saver."""

    def save(self, best: bool) -> None:
        """Does nothing."""

    def check(self) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    index = open_index(config, lambda text: None)
    group = worker.join(config, options.device)
    parts, position, _ = worker.build(config, worker.Rank(0, None), group, index, None)
    parts.train_data = Replay(parts.train_data)
    observer = Observer(options.warmup, options.warmup + options.steps)
    with contextlib.suppress(StoppedError):
        train(
            parts,
            position,
            observer=observer,
            gauges=NoGauges(),
            saver=NoSaver(),
            stop_requested=lambda: observer.done,
        )
    print(json.dumps({"step_time_s": statistics.median(observer.times), "steps": position.step}))


if __name__ == "__main__":
    main()
