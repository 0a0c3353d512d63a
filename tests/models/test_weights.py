"""`model.weights`: the sources by their names, and what is said where nothing can be downloaded."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disttrain.config import ModelConfig
from disttrain.errors import UsageError
from disttrain.models import pretrained
from disttrain.models.pretrained import Loaded, initial_network
from disttrain.models.weights import Source, check_weights, tagged_name, weights_source

CPU = torch.device("cpu")
INDEX: Any = SimpleNamespace(classes=("a", "b"), channels=3, height=64, width=64)


def model(name: str, weights: str | None, **args: Any) -> ModelConfig:
    return ModelConfig(name=name, weights=weights, args=args)


def loaded(name: str, weights: str) -> tuple[torch.nn.Module, Loaded]:
    network, found = initial_network(model(name, weights), INDEX, CPU, print)
    assert found is not None
    return network, found


@pytest.mark.parametrize(
    ("name", "weights", "source"),
    [
        ("resnet18", None, None),
        ("resnet18", "a/b.pth", Source("file", "a/b.pth")),
        ("resnet18", "torchvision:", Source("file", "torchvision:")),
        ("torchvision:resnet50", "torchvision:IMAGENET1K_V2", Source("torchvision", "IMAGENET1K_V2")),
        ("timm:resnet50", "timm", Source("timm", "")),
        ("timm:resnet50", "timm:a1_in1k", Source("timm", "a1_in1k")),
        ("timm:resnet50.a1_in1k", "timm:a1_in1k", Source("timm", "a1_in1k")),
        ("resnet18", "hf-hub:me/my-net.1", Source("hf-hub", "me/my-net.1")),
        ("resnet18", "hf-hub:me/net/a/b.safetensors", Source("hf-hub", "me/net", "a/b.safetensors")),
    ],
)
def test_sources(name: str, weights: str | None, source: Source | None) -> None:
    assert weights_source(model(name, weights)) == source


def test_pretrained_of_timm_is_its_own_source() -> None:
    assert weights_source(model("timm:resnet50", None, pretrained=True)) == Source("timm", "")
    assert weights_source(model("timm:resnet50", None, pretrained=False)) is None
    assert tagged_name(model("timm:resnet50", "timm:a1_in1k")) == "timm:resnet50.a1_in1k"
    assert tagged_name(model("timm:resnet50.a1_in1k", "timm")) == "timm:resnet50.a1_in1k"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "none.pth", "none.pth does not exist; correct the path"),
        ("resnet18", "hf-hub:net", "hf-hub:net is not an address; write hf-hub:OWNER/NAME"),
        ("resnet18", "timm", "timm is for networks of timm, but model.name is resnet18; choose timm:NAME"),
        ("timm:resnet18", "torchvision:DEFAULT", "is for networks of torchvision, but"),
        ("timm:resnet18.a1_in1k", "timm:a2_in1k", "differs from the weights in model.name, a1_in1k"),
        ("resnet18", "hf-hub:me/net", r'needs huggingface_hub; run pip install "disttrain\[hf\]"'),
    ],
)
def test_mistakes_are_found_before_any_process_starts(
    name: str, weights: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"^model\.weights: .*{message}"):
        check_weights(model(name, weights))


def test_a_misspelt_name_of_torchvision_or_timm_has_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"weights IMAGENET1K_V2 for resnet18; did you mean IMAGENET1K_V1\?"):
        loaded("torchvision:resnet18", "torchvision:IMAGENET1K_V2")
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"no weights of this name; did you mean resnet18\.a1_in1k\?"):
        loaded("timm:resnet18", "timm:a1_in1")


@pytest.fixture
def silent_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A network in which every server takes a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(pretrained, "TIMEOUT_S", 0.2)
        yield


@pytest.mark.usefixtures("silent_proxy")
def test_a_server_that_does_not_answer_is_named_with_the_way_by_file() -> None:
    with pytest.raises(UsageError) as caught:
        loaded("torchvision:resnet18", "torchvision:DEFAULT")
    begin, _, remedy = str(caught.value).partition("; ")
    assert begin.startswith(
        "model.weights: torchvision:DEFAULT cannot be had from "
        "https://download.pytorch.org/models/resnet18-f37072fd.pth: "
    )
    assert "on a machine without a network, set model.weights to a file" in remedy
    assert socket.getdefaulttimeout() is None
