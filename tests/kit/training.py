"""Training on one rank without a launcher: a tiny network, random images, and who records what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from disttrain.config import Config
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import DecodedSplit
from disttrain.data.epoch_plan import Plan
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.training.augment import Augment
from disttrain.training.autotune import Settings
from disttrain.training.callbacks import Callbacks
from disttrain.training.ema import MovingAverage
from disttrain.training.normalize import Normalize
from disttrain.training.optim import LrSchedule, build_optimizer
from disttrain.training.state import Progress, TrainState, Validation
from disttrain.training.train import train

CLASSES = 4

MEAN, STD = 0.4, 0.3

NAMES = tuple(map(str, range(CLASSES)))


class Recorder:
    """Observer and gauges that remember what they were told."""

    def __init__(self) -> None:
        self.trains: list[TrainRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.traces: list[tuple[int, int, list[int]]] = []
        self.after_log: Callable[[], None] = lambda: None

    def train(self, record: TrainRecord) -> None:
        self.trains.append(record)
        self.after_log()

    def evaluate(self, record: EvalRecord) -> None:
        self.evaluations.append(record)

    def trace(self, epoch: int, step: int, ids: Sequence[int]) -> None:
        self.traces.append((epoch, step, list(ids)))

    def bad_batch(self, epoch: int, step: int, ids: Sequence[int]) -> str:
        self.bad = (epoch, step, list(ids))
        return "errors/bad.json"

    def read(self) -> list[float]:
        return [1.5, float("nan")]

    def rows(self, totals: Sequence[float]) -> dict[str, Any]:
        return {"gpus": list(totals)}


def network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * 36, CLASSES),
    )


def split(samples: int, seed: int) -> DecodedSplit:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (samples, 6, 6, 1), dtype=np.uint8)
    return DecodedSplit(images, generator.integers(0, CLASSES, samples))


def make_state(
    model: nn.Module | None = None,
    samples: int = 40,
    val_samples: int = 23,
    drop: bool = False,
    augment: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    **train_options: Any,
) -> TrainState:
    """Builds what the worker builds, around a tiny network and random images; other sections by `with_`."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "seed": 5,
            "data": {"name": "random", "remainder": "drop" if drop else "keep"},
            "model": {"name": "tiny"},
            "augment": augment or {},
            "train": {"epochs": 2, "batch_size": 16} | train_options,
            "optim": {"name": "sgd", "lr": 0.1} | (optim or {}),
        }
    )
    accelerator = Accelerator(cpu=True)
    model = network() if model is None else model
    channels_last = config.train.channels_last is not False
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    decay = config.train.ema
    average = None if decay is None else MovingAverage(model, decay)
    optimizer, lr_schedules = build_optimizer(config.optim, config.schedule, model)
    model = accelerator.prepare(model)
    device = accelerator.device
    return TrainState(
        config=config,
        accelerator=accelerator,
        model=model,
        ema=average,
        optimizer=optimizer,
        lr_schedules=lr_schedules,
        plan=Plan(config.seed, (samples,), config.train.batch_size, drop),
        augment=Augment(
            config.augment,
            seed=config.seed,
            normalize=Normalize((MEAN,), (STD,), 6, channels_last=channels_last),
        ),
        train_data=Cached(split(samples, 1), device, "host"),
        val=Validation(Cached(split(val_samples, 2), device, "host"), np.arange(val_samples), NAMES),
        image_size=(6, 6),
        settings=Settings("fp32", channels_last, compiled=False, threads=1),
    )


def with_(state: TrainState, **sections: dict[str, Any]) -> TrainState:
    """Changes keys of other sections of the config, such as `schedule` or `checkpoint`."""
    tree = state.config.model_dump()
    for name, keys in sections.items():
        tree[name] |= keys
    state.config = Config.model_validate(tree)
    state.lr_schedules = [
        LrSchedule(state.config.optim.lr, state.config.schedule) for _ in state.lr_schedules
    ]
    return state


def run(
    state: TrainState,
    progress: Progress | None = None,
    *,
    save: Callable[..., None] = lambda **_: None,
    check: Callable[[], None] = lambda: None,
    stop_after: int | None = None,
    recorder: Recorder | None = None,
) -> Recorder:
    """Trains; is asked to stop when `stop_after` steps were taken."""
    progress = Progress() if progress is None else progress
    recorder = Recorder() if recorder is None else recorder
    saver = SimpleNamespace(save=save, check=check, wait=lambda: None)
    train(
        state,
        progress,
        Callbacks(recorder, recorder, saver, lambda: stop_after is not None and progress.step >= stop_after),
    )
    return recorder


QUIET = Callbacks(Recorder(), Recorder(), SimpleNamespace(), lambda: False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def batch_of(seed: int, ids: Sequence[int], samples: int = 40) -> tuple[Tensor, Tensor]:
    """Returns normalized images [B, 1, 6, 6] and labels."""
    data = split(samples, seed)
    images = (torch.tensor(data.images[list(ids)]).float() / 255 - MEAN) / STD
    return images.permute(0, 3, 1, 2), torch.tensor(data.labels[list(ids)])
