"""A trained model that takes raw images, loaded from a run folder or an exported file."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from disttrain.errors import CheckpointError
from disttrain.inference.run import FACTS, Facts, open_run, saying_where_code_lies
from disttrain.models import build_model
from disttrain.models.pretrained import read_safetensors
from disttrain.runs.checkpoint import load
from disttrain.training.autotune import allow_tf32, autocast
from disttrain.training.normalize import Normalize

METADATA = "disttrain"
"""The key in the header of a safetensors file that holds the `Facts` as JSON."""


class Classifier(nn.Module):
    """A network that normalizes its images itself.

    It takes images as stored, uint8 [B, H, W, C], and returns the logits of the classes, float32 [B,
    classes]. `probabilities` turns these into probabilities.

    Args:
        network: takes normalized images [B, C, H, W].
        facts: the model, its classes and the format of its images.
        precision: in which it was trained and evaluated.
        channels_last: whether images and filters are in channels-last memory order.

    Attributes:
        input: the normalization.
        source: the checkpoint or file of the weights, for messages.
        step: optimizer steps that it was trained for, or None if unknown.
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
        """The names of the classes, in the order of the logits."""
        return self.facts.classes

    @property
    def device(self) -> torch.device:
        """The device of the network; images must be on it too."""
        return self.input.offset.device

    def normalize(self, images: Tensor) -> Tensor:
        """Returns the normalized images, float32 [B, C, H, W], for uint8 images [B, H, W, C].

        Raises:
            ValueError: the images have another dtype or size.
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
        """Returns the logits of the classes, float32 [B, classes], for uint8 images [B, H, W, C]."""
        scores: Tensor = self.network(self.normalize(images))
        return scores.float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities of the classes, float32 [B, classes].

        They are the softmax of the logits. Those of multi-label data are the sigmoid: each class on its own.
        """
        return logits.sigmoid() if self.facts.multi_label else logits.softmax(1)

    @property
    def evaluated_in(self) -> str:
        """The precision that `as_evaluated` uses, which is fp32, tf32, bf16 or fp16."""
        on_gpu = self.device.type == "cuda"
        return self.precision if on_gpu or self.precision == "bf16" else "fp32"

    @contextlib.contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Uses the precision of the run's evaluations inside, as far as the device supports it."""
        if self.device.type == "cuda":
            allow_tf32(self.evaluated_in == "tf32")
        with autocast(self.device, self.evaluated_in):
            yield


def load_model(
    source: str | Path, checkpoint: str | Path = "best", *, device: str | torch.device = "cpu"
) -> Classifier:
    """Returns the model of a run, or of a file written by `disttrain export`, in eval mode.

    The weights are the moving average if the run has one (`train.ema`), as in its evaluations.

    Args:
        source: a run folder, or an exported safetensors file.
        checkpoint: checkpoint of the run: best, latest, or a path.
        device: device to load the model on.

    Raises:
        UsageError: the run does not exist.
        CheckpointError: the checkpoint does not exist, is damaged, or does not fit the network.
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
    with saying_where_code_lies(trained.folder):
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
        weights, header = read_safetensors(path)
        facts = FACTS.validate_json(header[METADATA])
    except (SafetensorError, OSError, KeyError, pydantic.ValidationError):
        raise CheckpointError(
            f"{path}: is not a file of `disttrain export --format safetensors`; give one, or a run folder"
        ) from None
    with saying_where_code_lies(None):
        return _build(facts, weights, str(path))


def _build(facts: Facts, weights: Mapping[str, Any], source: str, **settings: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # drawing the initial weights must not change the caller's RNG
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
