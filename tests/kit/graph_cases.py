"""Experiments that are trained with and without a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from disttrain.config import Config
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.shards.index import Index
from disttrain.training.callbacks import Callbacks
from disttrain.training.state import Progress, TrainState
from disttrain.training.train import train

CASES: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "dropout": {"model": {"name": "alexnet_cifar"}},
    "adam, average, clipping": {
        "optim": {"name": "adam", "lr": 1e-3, "momentum": None},
        "train": {"ema": 0.9, "grad_clip": 0.5, "label_smoothing": 0.1},
    },
    "augmented": {
        "augment": {"crop_padding": 2, "flip": True, "cutout": 8, "trivial_augment": True},
        "optim": {"name": "adamw", "lr": 1e-3, "momentum": None},
    },
    "muon and groups": {
        "model": {"name": "speednet"},
        "optim": {
            "name": "muon",
            "lr": 0.02,
            "momentum": 0.6,
            "normalize_weights": True,
            "groups": [
                {
                    "parameters": ".*bias",
                    "name": "sgd",
                    "lr": 1.0,
                    "schedule": {"name": "linear", "end_epoch": 1},
                }
            ],
        },
    },
}
"""Settings of a config, by what they try."""


def config_of(index: Index, batch_size: int, *changes: dict[str, Any]) -> Config:
    """Returns the config of two epochs on a data set; each change is sections of settings."""
    tree: dict[str, Any] = {
        "name": "graph",
        "data": {"name": index.name, "root": str(Path(index.folder).parent)},
        "model": {"name": "lenet_bn"},
        "train": {"epochs": 2, "batch_size": batch_size},
        "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
        "schedule": {"name": "cosine"},
    }
    for change in changes:
        for section, values in change.items():
            tree[section] = tree.get(section, {}) | values
    return Config.model_validate(tree)


def train_through(state: TrainState, progress: Progress) -> list[TrainRecord | EvalRecord]:
    """Trains to the end without saving; returns the records."""
    records: list[TrainRecord | EvalRecord] = []
    quiet: Any = SimpleNamespace(
        train=records.append,
        evaluate=records.append,
        read=list,
        rows=lambda totals: {},
        save=lambda **_: None,
        check=lambda: None,
        wait=lambda: None,
    )
    train(state, progress, Callbacks(quiet, quiet, quiet, lambda: False))
    return records
