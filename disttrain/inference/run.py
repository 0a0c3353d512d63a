"""Opens a trained run: its config, the facts about its model, and a checkpoint.

`classifier` loads the network. Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field

from disttrain.config import Config, load_config
from disttrain.data.statistics import statistics
from disttrain.errors import CheckpointError, UsageError
from disttrain.runs.manifest import pointed_to
from disttrain.runs.runfolder import RunFolder
from disttrain.user_code import UserCodeError

_Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Facts:
    """The model and the format of its images: enough to build it and to prepare images for it.

    Attributes:
        model: `model.name` of the config.
        args: `model.args` of the config.
        classes: names of the classes, in the order of the logits.
        channels: 1 for gray, 3 for RGB.
        height: of the images, in pixels.
        width: of the images, in pixels.
        mean: per channel, subtracted from pixel values in 0..1.
        std: per channel, the divisor after that; 0 for a constant channel, which is not divided.
        data: name of the data set that it was trained on.
        crop_pct: side of the square in the center that is resized to the size of the images, as a share of
            the shorter side. None: the largest part with the aspect ratio of the images.
        multi_label: an image has any number of the classes.
    """

    model: str
    args: dict[str, Any]
    classes: tuple[str, ...]
    channels: Literal[1, 3]
    height: _Count
    width: _Count
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    crop_pct: float | None = None
    multi_label: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.height, self.width, self.channels


FACTS = pydantic.TypeAdapter(Facts)
"""Reads and writes `Facts` as JSON."""


class Trained(NamedTuple):
    """A run and one of its checkpoints."""

    folder: RunFolder
    config: Config
    facts: Facts
    checkpoint: Path


def open_run(run: Path, checkpoint: str | Path = "best") -> Trained:
    """Returns a run with one of its checkpoints: best, latest, or a path.

    Raises:
        UsageError: this is not a run folder, or it is damaged.
        CheckpointError: the checkpoint does not exist.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise UsageError(
            f"{run}: is not a run folder (it has no config.yaml); give one, such as runs/NAME/TIME"
        )
    config = load_config(folder.config)
    path = Path(checkpoint)
    if checkpoint in ("best", "latest"):
        path = pointed_to(folder.checkpoints / checkpoint)
    if not (path / "MANIFEST.json").is_file():
        there = [name for name in ("best", "latest") if (folder.checkpoints / name).exists()]
        hint = f"give --checkpoint {' or '.join(there)}" if there else "the run has saved none yet"
        raise CheckpointError(f"{path}: there is no checkpoint; {hint}")
    return Trained(folder, config, _facts(folder, config), path.resolve())


@contextlib.contextmanager
def saying_where_code_lies(folder: RunFolder | None) -> Iterator[None]:
    """Adds to an error about the user's own code in which folder the run was trained, and what to do.

    Args:
        folder: of the run; None for a file, which does not say where it was trained.
    """
    try:
        yield
    except UserCodeError as error:
        remedy = f"put the folder that has {error.module} into PYTHONPATH"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            trained_in = Path(json.loads(folder.env.read_bytes())["directory"]) if folder else None
            if trained_in is not None:
                top = error.module.partition(".")[0]
                there = (trained_in / f"{top}.py").exists() or (trained_in / top).is_dir()
                remedy = f"the run was trained in {trained_in}; " + (
                    f"use this folder: PYTHONPATH={shlex.quote(str(trained_in))} disttrain ..."
                    if there
                    else f"it has no {top} on this machine, so {remedy}"
                )
        raise UsageError(f"{error}; {remedy}") from error.__cause__


def _facts(folder: RunFolder, config: Config) -> Facts:
    try:
        data = json.loads(folder.env.read_bytes())["data"]
        channels, height, width = data["shape"]
        mean, std = statistics(config.data, data["mean"], data["std"])
        return FACTS.validate_python(
            {
                "model": config.model.name,
                "args": config.model.args,
                "classes": data["classes"],
                "channels": channels,
                "height": height,
                "width": width,
                "mean": mean,
                "std": std,
                "data": data["name"],
                "crop_pct": None if config.data.image_size is None else config.eval.crop_pct,
                "multi_label": data.get("multi_label", False),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder.env}: does not describe the images of the run ({type(error).__name__}); "
            "resume the run, which writes the file again"
        ) from None
