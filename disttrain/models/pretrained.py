"""Initial weights from a file or a library, which downloads them; the number of classes may differ."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
import socket
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from disttrain.errors import DisttrainError, UnsafeError, UsageError, error_text, reason
from disttrain.files import file_lock
from disttrain.models import build_for
from disttrain.models.weights import Source, weights_source
from disttrain.urls import without_secrets
from disttrain.user_code import did_you_mean
from disttrain.userdirs import cache_folder

if TYPE_CHECKING:
    from disttrain.config import ModelConfig
    from disttrain.shards.index import Index

T = TypeVar("T")

TIMEOUT_S = 30.0
"""The longest that a server of weights may not answer."""

_MOST_NAMES = 5
_PREFIXES = ("module.", "_orig_mod.")  # from DDP or AveragedModel; from torch.compile


class Loaded(NamedTuple):
    """The initial weights of a run, for its records."""

    source: str
    """The path, the URL, or the repository."""
    sha256: str
    """Of the tensors that were loaded, in the order of the network; see `_digest`."""
    fresh: list[str]
    """The tensors that started at random, because their number of classes differs."""
    mean: list[float] | None = None
    """The mean of the images that the weights were trained with, if it is known."""


def initial_network(
    model: ModelConfig, index: Index, device: torch.device, say: Callable[[str], None]
) -> tuple[nn.Module, Loaded | None]:
    """Builds the network of a config, with the weights of `model.weights` or random ones.

    The first process of a node downloads weights into the library's cache. The others find them there.

    Args:
        model: the network.
        index: its data set.
        device: where to put it.
        say: gets a line if another process downloads.

    Raises:
        UsageError: the weights cannot be had, or are from another network.
        UnsafeError: a file of them is a pickle of more than tensors.
    """
    source = weights_source(model)
    if source is not None and source.kind == "timm":
        network = _download(model, "timm", say, partial(build_for, model, index, pretrained=True))
        facts: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        place = next((str(facts[key]) for key in ("file", "hf_hub_id", "url") if facts.get(key)), "timm")
        heads = facts.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        same = facts.get("num_classes") == len(index.classes)
        fresh = [] if same else [name for name in network.state_dict() if name.startswith(heads)]
        mean = facts.get("mean")
        return network.to(device), _loaded(network, without_secrets(place), fresh, mean)
    network = build_for(model, index).to(device)
    if source is None:
        return network, None
    mean = None
    if source.kind == "torchvision":
        saved, place, mean = _torchvision_state(model, source.name, say)
    elif source.kind == "hf-hub":
        path = _download(model, f"https://huggingface.co/{source.name}", say, partial(_hub_file, source))
        saved, place = read_weights(path), f"hf-hub:{source.name}/{path.name}"
    else:
        saved, place = read_weights(Path(source.name)), source.name
    fresh = fit_weights(network, saved, place, len(index.classes))
    return network, _loaded(network, place, fresh, mean)


def _loaded(network: nn.Module, place: str, fresh: list[str], mean: Any) -> Loaded:
    return Loaded(place, _digest(network, fresh), fresh, None if mean is None else list(mean))


def _digest(network: nn.Module, fresh: Collection[str]) -> str:
    """Returns the SHA-256 of name, shape and bytes of each tensor of a network but the fresh ones."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        if name not in fresh:
            tensor = value.detach().cpu().contiguous()
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _download(model: ModelConfig, place: str, say: Callable[[str], None], get: Callable[[], T]) -> T:
    """Returns what `get` returns after a download by its library, which only one process of a node does.

    Raises:
        UsageError: it failed, or the server did not answer.
    """
    waited: list[None] = []

    def wait() -> None:
        waited.append(None)
        say(f"waiting for another process to download the weights of {model.name}")

    before = socket.getdefaulttimeout()  # the libraries set none for connecting to a server
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with file_lock(
            cache_folder() / "weights" / re.sub(r"\W+", "-", f"{model.name} {model.weights}"), wait
        ):
            if not waited:
                return get()
        return get()
    except DisttrainError:
        raise
    except Exception as error:  # those of three libraries
        raise UsageError(
            f"model.weights: {model.weights or model.name} cannot be had from {place}: "
            f"{error_text(error)[:200]}; "
            "on a machine without a network, set model.weights to a file that you have copied to it"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _torchvision_state(
    model: ModelConfig, tag: str, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], str, list[float] | None]:
    """Returns the state dict of a network of torchvision with its own weights, their URL and mean."""
    models: Any = importlib.import_module("torchvision.models")
    name = model.name.partition(":")[2]
    known = models.get_model_weights(name).__members__
    if tag not in known:
        raise UsageError(
            f"model.weights: torchvision has no weights {tag} for {name}{did_you_mean(tag, known)}; "
            f"it has {', '.join(known)}"
        )
    weights = known[tag]

    def get() -> nn.Module:  # torchvision's builder knows how to read the file of each network
        return models.get_model(name, weights=weights, progress=False)  # type: ignore[no-any-return]

    mean = getattr(weights.transforms(), "mean", None)
    return _download(model, weights.url, say, get).state_dict(), weights.url, mean


def _hub_file(source: Source) -> Path:
    """Returns a file of the Hugging Face hub in its cache; without a name, its weights, safetensors first.

    Raises:
        UsageError: the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = ("model.safetensors", "pytorch_model.bin") if source.file is None else (source.file,)
    for name in names:
        try:
            return Path(hf_hub_download(source.name, name))
        except LocalEntryNotFoundError:  # nothing is known of the repository, because there is no network
            raise
        except EntryNotFoundError:
            continue
    remedy = "name the file with hf-hub:OWNER/NAME/FILE" if source.file is None else "correct its name"
    raise UsageError(f"model.weights: {source.name} has no {' and no '.join(names)}; {remedy}")


def fit_weights(model: nn.Module, saved: dict[str, Tensor], place: str, num_classes: int) -> list[str]:
    """Loads weights into a network. Layers for another number of classes keep their current weights.

    Args:
        model: changed in place.
        saved: tensors by name.
        place: where they are from, for messages.
        num_classes: number of classes of the model.

    Returns:
        The names of the tensors that were not loaded, because their number of classes differs.

    Raises:
        UsageError: they are from another network.
    """
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
        raise UsageError(f"model.weights: {place} is from another network: {'; '.join(problems)}")
    model.load_state_dict({name: own[name] if name in fresh else saved[name] for name in own})
    return fresh


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a state dict, of torch.save or safetensors, without the prefixes of wrappers.

    Raises:
        UsageError: the file is missing, unreadable or no state dict.
        UnsafeError: the file is a pickle of more than tensors.
    """
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
