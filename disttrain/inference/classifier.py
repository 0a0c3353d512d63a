"""A trained network with what its images need, ready for use: from a run folder or from an exported file."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from disttrain.errors import CheckpointError
from disttrain.inference.run import FACTS, Facts, open_run
from disttrain.models import build_model
from disttrain.runs.checkpoint import load
from disttrain.training.autotune import allow_tf32, autocast
from disttrain.training.normalize import Normalize

METADATA = "disttrain"
"""The key of the header of a safetensors file under which the `Facts` stand, as JSON."""


class Classifier(nn.Module):
    """A network with its normalization inside.

    It takes images as they are stored, uint8 [B, H, W, C], and gives the scores (logits) of the classes,
    float32 [B, classes]; their softmax are probabilities.

    Args:
        network: reads normalized images [B, C, H, W].
        facts: what it is and what its images are.
        precision: that it was trained and evaluated in.
        channels_last: the memory order of its images and filters.

    Attributes:
        input: its normalization.
        source: the checkpoint or file its weights are from, for people.
        step: optimizer steps it was trained for, where that is known.
    """

    def __init__(
        self, network: nn.Module, facts: Facts, *, precision: str = "fp32", channels_last: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.facts = facts
        self.precision = precision
        self.source = ""
        self.step: int | None = None
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self.input = Normalize(facts.mean, facts.std, facts.width, channels_last=channels_last)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the scores."""
        return self.facts.classes

    @property
    def device(self) -> torch.device:
        """Where it computes; images must be there."""
        return self.input.offset.device

    def normalize(self, images: Tensor) -> Tensor:
        """Returns uint8 [B, H, W, C] images as the network reads them, float32 [B, C, H, W].

        Raises:
            ValueError: images of another type or size.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.facts.shape:
            height, width, channels = self.facts.shape
            raise ValueError(
                f"expected uint8 images [B, {height}, {width}, {channels}], got {images.dtype} "
                f"{list(images.shape)}; disttrain.predict takes files of any size"
            )
        result: Tensor = self.input(images)
        return result

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of the classes, float32 [B, classes], for uint8 images [B, H, W, C]."""
        scores: Tensor = self.network(self.normalize(images))
        return scores.float()

    @property
    def evaluated_in(self) -> str:
        """The precision inside `as_evaluated`, which is fp32, tf32, bf16 or fp16."""
        on_gpu = self.device.type == "cuda"
        return self.precision if on_gpu or self.precision == "bf16" else "fp32"

    @contextlib.contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Computes inside in the precision that the run was evaluated in, as far as the device has it."""
        if self.device.type == "cuda":
            allow_tf32(self.evaluated_in == "tf32")
        with autocast(self.device, self.evaluated_in):
            yield


def load_model(
    source: str | Path, checkpoint: str | Path = "best", *, device: str | torch.device = "cpu"
) -> Classifier:
    """Returns the network of a run, or of a file that `disttrain export` has written, in eval mode.

    The weights are the moving average where the run has one (`train.ema`), as in its evaluations.

    Args:
        source: a run folder, or an exported safetensors file.
        checkpoint: of the run: best, latest, or a path.
        device: where it is to compute.

    Raises:
        UsageError: there is no such run.
        CheckpointError: there is no such checkpoint, or it is damaged or does not fit.
    """
    source = Path(source)
    if source.is_file():
        return _load_exported(source).to(device).eval()
    trained = open_run(source, checkpoint)
    saved = load(trained.checkpoint)
    weights = saved.parts["model"]
    if "ema" in saved.parts:
        prefix = "module."
        weights = {
            name.removeprefix(prefix): value
            for name, value in saved.parts["ema"].items()
            if name.startswith(prefix)
        }
    arithmetic = saved.state["arithmetic"]
    same_device = torch.device(device).type == arithmetic["device"]
    classifier = _build(
        trained.facts,
        weights,
        str(trained.checkpoint),
        precision=arithmetic["precision"],
        channels_last=same_device and arithmetic["channels_last"],
    )
    classifier.step = saved.state["step"]
    return classifier.to(device).eval()


def _load_exported(path: Path) -> Classifier:
    try:
        with safe_open(path, "pt") as file:
            facts = FACTS.validate_json((file.metadata() or {})[METADATA])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError, KeyError, pydantic.ValidationError):
        raise CheckpointError(
            f"{path}: is not a file of `disttrain export --format safetensors`; give one, or a run folder"
        ) from None
    return _build(facts, weights, str(path))


def _build(facts: Facts, weights: Mapping[str, Any], source: str, **settings: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn at random
        network = build_model(
            facts.model,
            num_classes=len(facts.classes),
            in_channels=facts.channels,
            image_size=(facts.height, facts.width),
            args=facts.args,
        )
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"{source}: does not fit the network {facts.model}: {reason}") from None
    classifier = Classifier(network, facts, **settings)
    classifier.source = source
    return classifier
