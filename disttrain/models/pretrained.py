"""Initial weights from a file, such as torchvision's, or of timm; the number of classes may differ."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from disttrain.errors import UnsafeError, UsageError, reason
from disttrain.files import file_lock
from disttrain.urls import without_secrets
from disttrain.userdirs import cache_folder

_MOST_NAMES = 5
_PREFIXES = ("module.", "_orig_mod.")  # from DDP or AveragedModel; from torch.compile


def load_weights(model: nn.Module, path: Path, num_classes: int) -> list[str]:
    """Loads weights into a network. Layers for another number of classes keep their current weights.

    Args:
        model: changed in place.
        path: a state dict written by torch.save, or a safetensors file.
        num_classes: number of classes of the model.

    Returns:
        The names of the tensors that were not loaded, because their number of classes differs.

    Raises:
        UsageError: the file is missing, unreadable or from another network.
        UnsafeError: the file is a pickle of more than tensors.
    """
    saved = _read(path)
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    fresh = [
        name
        for name in own
        if name in saved
        and own[name].shape != saved[name].shape
        and own[name].shape[:1] == (num_classes,)
        and own[name].shape[1:] == saved[name].shape[1:]
    ]
    different = [
        f"{name} is {_shape(saved[name])} in the file and {_shape(own[name])} here"
        for name in own
        if name in saved and own[name].shape != saved[name].shape and name not in fresh
    ]
    problems = [f"has no {some_names(missing)}"] * bool(missing)
    problems += [f"also has {some_names(unexpected)}"] * bool(unexpected)
    problems += [some_names(different)] * bool(different)
    if problems:
        raise UsageError(f"model.weights: {path} is from another network: {'; '.join(problems)}")
    model.load_state_dict({name: own[name] if name in fresh else saved[name] for name in own})
    return fresh


def build_pretrained(
    name: str, build: Callable[[], nn.Module], say: Callable[[str], None]
) -> tuple[nn.Module, str]:
    """Builds a network of timm with its pretrained weights. Each node downloads them once.

    The first process of a node downloads them, into timm's cache. The others wait, and find them there.

    Args:
        name: of the network.
        build: builds it, with a download if the weights are not in the cache.
        say: gets a line if another process downloads.

    Returns:
        The network, and where its weights are from.

    Raises:
        UsageError: see `build_model`.
    """
    waited: list[None] = []

    def wait() -> None:
        waited.append(None)
        say(f"waiting for another process to download the weights of {name}")

    model: nn.Module | None = None
    with file_lock(cache_folder() / "weights" / name.replace(":", "-"), wait):
        if not waited:
            model = build()
    if model is None:
        model = build()
    facts: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    source = next((str(facts[key]) for key in ("file", "hf_hub_id", "url") if facts.get(key)), "timm")
    return model, without_secrets(source)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, those of tied weights under each name, and its header.

    As in safetensors' `save_model`, tied weights are saved once, and the header maps their other names to it.

    Raises:
        SafetensorError, OSError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        header: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    others = {name: kept for name, kept in header.items() if name != "format" and kept in tensors}
    return {name: tensors[kept] for name, kept in others.items()} | tensors, header


def some_names(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"model.weights: there is no file {path}; give a state dict of torch.save or safetensors"
        )
    try:
        if path.suffix == ".safetensors":
            saved: object = read_safetensors(path)[0]
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:2] != b"PK" and path.read_bytes()[:1] != b"\x80":
            raise UsageError(f"model.weights: {path} is not a state dict of torch.save") from None
        raise UnsafeError(
            f"model.weights: {path} holds more than tensors, which could run code: {reason(error)[:200]}; "
            "save only the state dict: torch.save(model.state_dict(), FILE)"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise UsageError(f"model.weights: {path} cannot be read: {reason(error)[:200]}") from None
    if isinstance(saved, dict) and isinstance(saved.get("state_dict"), dict):
        saved = saved["state_dict"]
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise UsageError(f"model.weights: {path} is not a state dict, which maps names to tensors")
    for prefix in _PREFIXES:
        if saved and all(name.startswith(prefix) for name in saved):
            saved = {name.removeprefix(prefix): value for name, value in saved.items()}
    return saved


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
