"""What `model.weights` names: a file, or weights that a library downloads. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from disttrain.config import ModelConfig
from disttrain.errors import UsageError

_LIBRARIES = ("torchvision", "timm")


class Source(NamedTuple):
    """Where initial weights come from."""

    kind: str
    """file, torchvision, timm or hf-hub."""
    name: str
    """The path of the file, the name of the library's weights (may be empty for timm), or the repository."""
    file: str | None = None
    """The file in the repository, if it is named."""


def weights_source(model: ModelConfig) -> Source | None:
    """Returns where the initial weights of a network come from, or None if they are random.

    Raises:
        UsageError: `model.weights` is for another network, or not of the form `hf-hub:OWNER/NAME[/FILE]`.
    """
    text = model.weights
    if text is None:
        own = model.name.startswith("timm:") and model.args.get("pretrained")
        return Source("timm", "") if own else None
    kind, _, name = text.partition(":")
    if kind == "hf-hub":
        parts = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", name)
        if parts is None:
            raise UsageError(
                f"model.weights: {text} is not an address; write hf-hub:OWNER/NAME or hf-hub:OWNER/NAME/FILE"
            )
        return Source(kind, parts[1], parts[2])
    if kind not in _LIBRARIES or (kind == "torchvision" and not name):
        return Source("file", text)
    if not model.name.startswith(f"{kind}:"):
        raise UsageError(
            f"model.weights: {text} is for networks of {kind}, but model.name is {model.name}; "
            f"choose {kind}:NAME, or give a file with weights"
        )
    tag = model.name.partition(".")[2]
    if name and tag and name != tag:
        raise UsageError(f"model.weights: {text} differs from the weights in model.name, {tag}; remove one")
    return Source(kind, name)


def tagged_name(model: ModelConfig) -> str:
    """Returns the name of a network with the tag of `timm:TAG` weights, since some differ by the tag."""
    found = re.fullmatch(r"timm:(\w+)", model.weights or "")
    return f"{model.name.partition('.')[0]}.{found[1]}" if found else model.name


def check_weights(model: ModelConfig) -> None:
    """Checks what can be known of `model.weights` before processes start, without a network.

    Raises:
        UsageError: the file does not exist, a package is missing, or see `weights_source`.
    """
    source = weights_source(model)
    if source is None:
        return
    if source.kind == "file" and not Path(source.name).is_file():
        raise UsageError(f"model.weights: {source.name} does not exist; correct the path")
    if source.kind == "hf-hub" and importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(
            f'model.weights: {model.weights} needs huggingface_hub; run pip install "disttrain[hf]"'
        )
