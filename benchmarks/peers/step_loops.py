"""Step times of disttrain's loop and of its peers, side by side in one process.

    python benchmarks/peers/step_loops.py CONFIG DATA [KEY=VALUE ...] [--rounds 15] [--steps 40] [--lightning]

Every round takes --steps steps with each loop, in an order drawn anew, so that what else the machine does and
what the loop before has left meet all alike:

hand       the shortest loop one would write by hand: uint8 images in memory in a random order, normalized
           step by step, fused optimizer, a running sum of the loss and nothing else
again      the same loop once more: what it differs by is the noise of the machine
replayed   the same with one batch, normalized before
ours       `disttrain.training.train.train_epoch` with the parts that the worker builds: metrics.jsonl and
           log points as in a run with -q
ours_replayed   the same with one batch of the loader
ungraphed  as ours, without a CUDA graph (on a GPU)
blind      the same without any observer and log point
watched    the same with the dashboard on a pseudo-terminal, as a user sees it
saving     the same with some checkpoints on the way, written to a temporary folder one after the other
lightning  Lightning at its best, over normalized images in memory that are cut by a batch sampler: no logger,
           checkpoints or progress bar (with --lightning, in an environment that has it)

The last line printed is JSON: for each loop the seconds of a step in every round, and how many checkpoints
a round of `saving` has.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import pty
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import normalized

from disttrain.bench.step_bench import Replay
from disttrain.config import Config, load_config
from disttrain.data.epoch_plan import Plan
from disttrain.models import build_model
from disttrain.monitor.observe import RunObserver
from disttrain.preflight import open_index
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index
from disttrain.training.autotune import Choice
from disttrain.training.build import build
from disttrain.training.callbacks import Callbacks
from disttrain.training.group import join
from disttrain.training.optim import build_optimizer
from disttrain.training.rank import Rank
from disttrain.training.saver import RunSaver
from disttrain.training.state import Progress, TrainState
from disttrain.training.train import train_epoch

SAVES = 4  # in a round that has enough steps: what one of them costs is more than the noise of a round


class Nothing:
    """An observer, gauges and a saver that do nothing."""

    def train(self, record: dict) -> None:
        """Does nothing."""

    def read(self) -> list[float]:
        """Returns no readings."""
        return []

    def rows(self, totals) -> dict:
        """Returns no keys."""
        return {}

    def check(self) -> None:
        """Does nothing."""


class Ours:
    """Our loop over the first steps of an epoch."""

    def __init__(self, config: Config, state: TrainState, index: Index, steps: int, scratch: Path) -> None:
        self.config, self.parts, self.index, self.steps, self.scratch = config, state, index, steps, scratch
        self.choices = {
            "precision": Choice(state.settings.precision, "given"),
            "cache": Choice("host", "given"),
        }
        batch = config.train.batch_size
        self.plan = Plan(config.seed, (steps * batch,), batch, False)
        self.rounds = 0
        self.save_every = steps // (SAVES + 1) + 1
        self.saves = (steps - 1) // self.save_every

    def epoch(self, observer, gauges, saver, **monitor_or_checkpoint: dict) -> float:
        """Trains and returns the seconds of a step."""
        state = self.parts
        tree = self.config.model_dump()
        for section, keys in monitor_or_checkpoint.items():
            tree[section] |= keys
        state.config, state.plan = Config.model_validate(tree), self.plan
        began = time.perf_counter()
        callbacks = Callbacks(observer, gauges, saver, lambda: False)
        train_epoch(state, Progress(epoch=self.rounds), self.plan.order(self.rounds), callbacks)
        seconds = time.perf_counter() - began
        self.rounds += 1
        return seconds / self.steps

    def observed(self, *, saving: bool = False, verbosity: int = -1) -> float:
        """Trains with metrics.jsonl and, unless quiet, the dashboard."""
        folder = RunFolder(self.scratch / f"{self.rounds}")
        folder.path.mkdir()
        progress = Progress()
        observer = RunObserver(
            self.config, folder, self.parts, progress, self.index, self.choices, verbosity=verbosity
        )
        saver = Nothing()
        keys = {}
        if saving:
            saver = RunSaver(
                self.parts, progress, self.index, folder, done=observer.saved, writing=contextlib.nullcontext
            )
            keys = {"checkpoint": {"every_steps": self.save_every}}
        with observer:
            seconds = self.epoch(observer, observer.gauges, saver, **keys)
            if saving:
                saver.wait()
        return seconds

    def replayed(self) -> float:
        """Trains on one batch of the loader."""
        device = self.parts.accelerator.device
        own, self.parts.train_data = self.parts.train_data, Replay(self.parts.train_data, device)
        try:
            return self.observed()
        finally:
            self.parts.train_data = own

    def ungraphed(self) -> float:
        """Trains with every kernel handed out by the host."""
        graph, self.parts.graph = self.parts.graph, None
        try:
            return self.observed()
        finally:
            self.parts.graph = graph

    def blind(self) -> float:
        """Trains without log points but the last one, which nobody sees."""
        nothing = Nothing()
        return self.epoch(nothing, nothing, nothing, monitor={"log_every_steps": self.steps})

    def watched(self) -> float:
        """Trains with the dashboard on a terminal."""
        with terminal():
            return self.observed(verbosity=0)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Makes standard output a terminal whose content is read and dropped."""
    outer, inner = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(outer, 65536):
                pass

    reader = threading.Thread(target=drain)
    reader.start()
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(inner, 1)
    os.close(inner)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        reader.join()
        os.close(outer)


def hand_loops(config: Config, state: TrainState, index: Index, steps: int) -> dict[str, Callable[[], float]]:
    """Returns the hand-written loop, twice, and the same with a replayed batch."""
    device, batch = state.accelerator.device, config.train.batch_size
    images, labels = state.train_data._images, state.train_data._labels
    mean, std = torch.tensor(index.mean, device=device), torch.tensor(index.std, device=device)
    model = fresh_model(config, state, index)
    optimizer, _ = build_optimizer(config.optim, config.schedule, model)
    bf16 = state.settings.precision == "bf16"

    def arithmetic() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def take_steps(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        synchronize(device)
        began = time.perf_counter()
        total = torch.zeros((), device=device)
        for _, (inputs, targets) in zip(range(steps), batches, strict=False):
            with arithmetic():
                loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        total.item()
        return (time.perf_counter() - began) / steps

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in torch.randperm(len(images), device=device).split(batch):
            yield normalized(images.index_select(0, ids), mean, std), labels.index_select(0, ids)

    one = next(batches())

    def replayed() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield one

    return {
        "hand": lambda: take_steps(batches()),
        "again": lambda: take_steps(batches()),
        "replayed": lambda: take_steps(replayed()),
    }


def lightning_loop(config: Config, state: TrainState, index: Index, steps: int) -> Callable[[], float]:
    """Returns Lightning's loop."""
    import lightning
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device, warm_up = state.accelerator.device, 3

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = fresh_model(config, state, index)

        def training_step(self, batch, number: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(config.optim, config.schedule, self.model)[0]

    class Clock(lightning.Callback):
        began = seconds = 0.0

        def on_train_batch_end(self, trainer, module, outputs, batch, number: int) -> None:
            if number + 1 in {warm_up, warm_up + steps}:
                synchronize(device)
                now = time.perf_counter()
                self.seconds, self.began = (now - self.began) / steps, now

    split = state.train_data
    inputs = normalized(split._images, torch.tensor(index.mean), torch.tensor(index.std))
    dataset = TensorDataset(inputs, split._labels)
    sampler = BatchSampler(RandomSampler(dataset), config.train.batch_size, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=0)
    module = Classifier()

    def run() -> float:
        clock = Clock()
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if state.settings.precision == "bf16" else "32-true",
            max_steps=warm_up + steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, loader)
        return clock.seconds

    return run


def fresh_model(config: Config, state: TrainState, index: Index) -> nn.Module:
    size = (index.height, index.width)
    model = build_model(
        config.model.name,
        num_classes=len(index.classes),
        in_channels=index.channels,
        image_size=size,
        args=config.model.args,
    )
    return model.to(state.accelerator.device, memory_format=torch.channels_last)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lightning", action="store_true")
    options = parser.parse_intermixed_args()
    fixed = ["train.channels_last=true", "train.compile=false"]
    config = load_config(options.config, [*options.overrides, *fixed])
    index = open_index(config, lambda text: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group = join(config, device)
    state, _, _ = build(config, Rank(0, None), group, index, None)
    with tempfile.TemporaryDirectory() as scratch:
        ours = Ours(config, state, index, options.steps, Path(scratch))
        loops = hand_loops(config, state, index, options.steps) | {
            "ours": ours.observed,
            "ours_replayed": ours.replayed,
            "blind": ours.blind,
            "watched": ours.watched,
            "saving": lambda: ours.observed(saving=True),
        }
        if state.graph is not None:
            loops["ungraphed"] = ours.ungraphed
        if options.lightning:
            loops["lightning"] = lightning_loop(config, state, index, options.steps)
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        order = random.Random(0)
        gc.collect()
        gc.freeze()  # what was imported, as a run does before its first step
        for number in range(options.rounds + 1):
            for name in order.sample(list(loops), len(loops)):  # what a loop leaves behind meets all alike
                taken = loops[name]()
                if number:
                    seconds[name].append(taken)
    print(json.dumps({"seconds": seconds, "saves": ours.saves}))


if __name__ == "__main__":
    main()
