"""What is trained with and without a CUDA graph: settings of a config."""

from __future__ import annotations

from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "dropout": {"model": {"name": "alexnet_cifar"}},
    "adam, average, clipping": {
        "optim": {"name": "adam", "lr": 1e-3, "momentum": None},
        "train": {"ema": 0.9, "grad_clip": 0.5, "label_smoothing": 0.1},
    },
    "augmented": {
        "augment": {"crop_padding": 2, "flip": True, "cutout": 8},
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
