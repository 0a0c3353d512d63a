"""Networks of timm: names and arguments, initial weights, and what is done with a trained one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import UsageError
from disttrain.models import build_model, check_model_name
from disttrain.training.build import initial_model
from kit.commands import Run, succeeded
from kit.configs import load, mistake
from kit.server import Server

timm = pytest.importorskip("timm")


def build(name: str, args: dict[str, Any], channels: int = 3, size: int = 32, **how: bool) -> nn.Module:
    shape = (size, size)
    return build_model(name, num_classes=5, in_channels=channels, image_size=shape, args=args, **how)


@pytest.mark.parametrize(
    ("name", "channels", "size", "args"),
    [
        ("test_resnet", 1, 28, {}),
        ("test_resnet.r160_in1k", 3, 32, {"drop_rate": 0.1}),
        ("test_vit", 3, 64, {}),  # made for 160 pixels
    ],
)
def test_networks_fit_the_images(name: str, channels: int, size: int, args: dict[str, Any]) -> None:
    model = build(f"timm:{name}", args, channels, size)
    assert model.training
    assert model(torch.rand(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet81", {}, r"timm:resnet81: timm has no classifier of this name; did you mean resnet18\?"),
        ("test_resnet.r16_in1k", {}, r"no weights of this name; did you mean test_resnet\.r160_in1k\?"),
        ("test_resnet", {"drop_rat": 0.1}, r"model\.args\.drop_rat: .*mean drop_rate\?; accepted: "),
        ("test_resnet", {"num_classes": 2}, r"model\.args\.num_classes: set model\.num_classes"),
        ("test_resnet", {"in_chans": 2}, r"model\.args\.in_chans: comes from the data set"),
        ("test_resnet", {"checkpoint_path": "a"}, r"model\.args\.checkpoint_path: set model\.weights"),
        ("test_resnet", {"pretrained": "yes"}, r"model\.args\.pretrained: expected true or false, got 'yes'"),
        ("test_resnet", {"features_only": True}, "returns a value of type list .*; return them alone"),
    ],
)
def test_mistakes_end_in_one_clear_line(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(f"timm:{name}", args)


def test_without_timm_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    check_model_name("timm:resnet18.a1_in1k")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs timm; run pip install "disttrain\[timm\]"'):
        check_model_name("timm:resnet18.a1_in1k")


def test_two_sources_of_weights_are_refused(tmp_path: Path) -> None:
    changes = ("model.name=timm:test_resnet", "model.args.pretrained=true", "model.weights=a.pth")
    assert "model.args.pretrained also gives initial weights" in mistake(tmp_path / "tiny.yaml", *changes)


def test_a_resumed_run_needs_no_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1)
    other = timm.create_model("test_resnet", num_classes=1000)
    weights = tmp_path / "weights.pth"
    torch.save(other.state_dict(), weights)
    changes = ("model.name=timm:test_resnet", "model.args.pretrained=true")
    overlay = f"model.args.pretrained_cfg_overlay.file={weights}"
    config = load(tmp_path / "tiny.yaml", *changes, overlay)
    index: Any = SimpleNamespace(classes=("a", "b"), channels=3, height=32, width=32)
    device = torch.device("cpu")
    model, loaded = initial_model(config, index, device, None)
    assert torch.equal(model.conv1[0].weight, other.conv1[0].weight)
    assert loaded is not None
    assert (loaded.source, loaded.fresh) == (str(weights), ["fc.weight", "fc.bias"])
    weights.unlink()
    with pytest.raises(UsageError, match=r"pretrained weights: FileNotFoundError; set model\.weights to a"):
        initial_model(config, index, device, None)
    checkpoint: Any = SimpleNamespace(state={"initial_weights": loaded._asdict()})
    model, known = initial_model(config, index, device, checkpoint)
    assert not torch.equal(model.conv1[0].weight, other.conv1[0].weight)
    assert known == loaded


CONFIG = """
name: timm
data: {name: digits}
model:
  name: timm:test_resnet
  args: {pretrained: true, pretrained_cfg_overlay: {url: "URL/weights.pth", hf_hub_id: null}}
train: {epochs: 1, batch_size: 96, precision: fp32, channels_last: false}
optim: {name: sgd, lr: 0.05}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    found = Server(tmp_path / "served")
    yield found
    found.close()


@pytest.mark.nightly
def test_two_ranks_download_once_and_the_trained_network_is_of_use(
    disttrain: Run, tmp_path: Path, server: Server
) -> None:
    model = timm.create_model("test_resnet", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "served/weights.pth")
    (tmp_path / "timm.yaml").write_text(CONFIG.replace("URL", server.url))
    env = {"TORCH_HOME": str(tmp_path / "torch"), "DISTTRAIN_CACHE": str(tmp_path / "cache")}

    def succeeds(*command: str | Path) -> subprocess.CompletedProcess[str]:
        done = disttrain(*command, env=env)
        assert succeeded(done)
        return done

    succeeds("run", "timm.yaml", "--procs", "2", "--run-dir", "run")
    assert len(server.requests) == 1
    choices = json.loads((tmp_path / "run/env.json").read_text())["choices"]
    assert choices["weights"].startswith(f"{server.url}/weights.pth: all but fc.weight, fc.bias")
    (tmp_path / "served/weights.pth").unlink()
    (tmp_path / "torch/hub/checkpoints/weights.pth").unlink()
    succeeds("export", "run", "--format", "safetensors", "--output", "out/net.safetensors")
    assert "timm:test_resnet" in (tmp_path / "out/README.md").read_text()
    assert len(server.requests) == 1
