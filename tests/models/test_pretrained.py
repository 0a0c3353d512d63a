"""Weights from a file: of other classes, of wrapped networks, of another network, hostile ones."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disttrain.errors import DisttrainError, UnsafeError, UsageError
from disttrain.models import build_model
from disttrain.models.pretrained import fit_weights, read_weights
from kit.commands import Run


def resnet(num_classes: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(
        "torchvision:resnet18", num_classes=num_classes, in_channels=3, image_size=(64, 64), args={}
    )


def load_weights(model: torch.nn.Module, path: Path, num_classes: int) -> list[str]:
    return fit_weights(model, read_weights(path), str(path), num_classes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a network with 7 classes, as torchvision's files are."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(OrderedDict(resnet(7, seed=1).state_dict()), path)
    return path


def test_the_same_classes_take_all(weights: Path) -> None:
    model = resnet(7, seed=2)
    assert load_weights(model, weights, 7) == []
    saved = torch.load(weights)
    assert all(tensor.equal(saved[name]) for name, tensor in model.state_dict().items())


def test_other_classes_keep_their_own_last_layer(weights: Path) -> None:
    model = resnet(3, seed=2)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_weights(model, weights, 3) == ["fc.weight", "fc.bias"]
    saved = torch.load(weights)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(own[name] if name.startswith("fc.") else saved[name]), name


@pytest.mark.parametrize("wrapped", ["safetensors", "state_dict", "ddp", "compiled"])
def test_the_usual_ways_to_save(weights: Path, tmp_path: Path, wrapped: str) -> None:
    saved = torch.load(weights)
    path = tmp_path / ("w.safetensors" if wrapped == "safetensors" else "w.pt")
    match wrapped:
        case "safetensors":
            save_file(saved, path)
        case "state_dict":
            torch.save({"state_dict": saved, "epoch": 3}, path)
        case "ddp":
            torch.save({f"module.{name}": tensor for name, tensor in saved.items()}, path)
        case "compiled":
            torch.save({f"_orig_mod.{name}": tensor for name, tensor in saved.items()}, path)
    model = resnet(7, seed=2)
    assert load_weights(model, path, 7) == []
    assert model.state_dict()["conv1.weight"].equal(saved["conv1.weight"])


def changed(saved: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (saved | changes).items() if value is not None}


class _Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/disttrain-was-here",)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"conv1.weight": None}, UsageError, "has no conv1.weight"),
        ({"extra": torch.zeros(1)}, UsageError, "also has extra"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, UsageError,
         "conv1.weight is 64x1x7x7 in the file and 64x3x7x7 here"),
        ({"fc.weight": torch.zeros(7, 100)}, UsageError, "fc.weight is 7x100 in the file and 3x512 here"),
        ({"note": "text"}, UsageError, "is not a state dict, which maps"),
        ({"note": _Command()}, UnsafeError, "holds more than tensors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    weights: Path, tmp_path: Path, content: dict[str, Any], kind: type[DisttrainError], message: str
) -> None:
    path = tmp_path / "w.pth"
    torch.save(changed(torch.load(weights), **content), path)
    model = resnet(3, seed=2)
    before = model.state_dict()["conv1.weight"].clone()
    with pytest.raises(kind) as caught:
        load_weights(model, path, 3)
    assert message in str(caught.value)
    assert model.state_dict()["conv1.weight"].equal(before)
    assert not Path("/tmp/disttrain-was-here").exists()


@pytest.mark.parametrize("content", [None, b"", b"no weights", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"^model\.weights: "):
        load_weights(resnet(3, seed=2), path, 3)


def test_a_run_begins_with_the_weights_and_says_so(
    disttrain: Run, config_file: Path, trained_run: Path, tmp_path: Path
) -> None:
    file = (trained_run / "checkpoints/latest/model.safetensors").resolve()
    arguments = [
        f"model.weights={file}",
        "optim.lr=1e-12",
        "train.epochs=1",
        "--procs",
        "1",
        "--run-dir",
        "run",
    ]
    done = disttrain("run", config_file, *arguments)
    assert done.returncode == 0, done.stderr
    begun, went_on = load_file(file), load_file(tmp_path / "run/checkpoints/latest/model.safetensors")
    assert all(torch.allclose(begun[name], went_on[name], atol=1e-6) for name in begun)
    assert f"{file}: all" in (tmp_path / "run/env.json").read_text()

    missing = disttrain("run", config_file, "model.weights=none.pth", "--procs", "1")
    assert missing.returncode == 2
    assert missing.stderr.strip() == "disttrain: model.weights: none.pth does not exist; correct the path"
