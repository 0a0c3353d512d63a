"""disttrain trains image classifiers on one GPU, many GPUs or many nodes from one YAML file.

The names below are the public Python API, explained in docs/python.md. Each is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from disttrain.config import Config, load_config
    from disttrain.data.loader import OpenData, open_data
    from disttrain.errors import DisttrainError
    from disttrain.inference.classifier import Classifier, load_model
    from disttrain.inference.eval import evaluate
    from disttrain.inference.exporting import Exported, export
    from disttrain.inference.prediction import Prediction, predict
    from disttrain.launch.start import train

__all__ = [
    "Classifier",
    "Config",
    "DisttrainError",
    "Exported",
    "OpenData",
    "Prediction",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "load_model",
    "open_data",
    "predict",
    "train",
]

_HOMES = {
    "Classifier": "inference.classifier",
    "Config": "config",
    "DisttrainError": "errors",
    "Exported": "inference.exporting",
    "OpenData": "data.loader",
    "Prediction": "inference.prediction",
    "evaluate": "inference.eval",
    "export": "inference.exporting",
    "load_config": "config",
    "load_model": "inference.classifier",
    "open_data": "data.loader",
    "predict": "inference.prediction",
    "train": "launch.start",
}
"""Name -> its module. No name may also be a module's: importing that module would replace it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"disttrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
