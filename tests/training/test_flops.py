"""The arithmetic of a model beside what torch counts while it computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from disttrain.models import CATALOG, build_model
from disttrain.training.flops import device_flops, flops_per_image, peak_flops_per_s

IMAGES = dict.fromkeys(("cnn_mnist", "lenet5"), (1, 28, 28))


def counted(model: nn.Module, image: tuple[int, int, int]) -> float:
    """Returns the operations of an image that torch counts in a training step of two."""
    model = copy.deepcopy(model).train()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.zeros(2, *image)), torch.zeros(2, dtype=torch.int64)).backward()
    return counter.get_total_flops() / 2


@pytest.mark.integration
@pytest.mark.parametrize("name", [*CATALOG, "torchvision:squeezenet1_1"])
def test_what_torch_counts(name: str) -> None:
    image = IMAGES.get(name, (3, 32, 32))
    model = build_model(name, num_classes=10, in_channels=image[0], image_size=image[1:], args={})
    assert flops_per_image(model, image) == counted(model, image)


def test_groups_divide_the_products() -> None:
    # torch counts the backward pass of a convolution as if it had one group.
    whole, grouped = (
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(400, 2))
        for groups in (1, 4)
    )
    head = 3 * 2 * 400 * 2
    assert flops_per_image(whole, (8, 5, 5)) == 2 * 2 * 25 * 16 * 8 * 9 + head
    assert flops_per_image(grouped, (8, 5, 5)) == 2 * 2 * 25 * 16 * 2 * 9 + head


def test_frozen_strided_and_repeated_layers() -> None:
    twice = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, dilation=2), nn.BatchNorm2d(8), twice, nn.ReLU(inplace=True), twice),
        *(nn.Flatten(), nn.Dropout(), nn.LazyLinear(6), nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 4)),
    )
    model(torch.zeros(2, 3, 17, 17))
    assert flops_per_image(model, (3, 17, 17)) == counted(model, (3, 17, 17))
    model[0].weight.requires_grad = model[0].bias.requires_grad = False
    model[1].requires_grad_(False)
    assert flops_per_image(model, (3, 17, 17)) == counted(model, (3, 17, 17))


def test_a_look_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert flops_per_image(model, (1, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].mean(1)


def test_layers_that_are_not_known_give_no_number() -> None:
    assert flops_per_image(Attention(), (4, 3, 3)) is None
    assert flops_per_image(nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten()), (1, 3, 3)) is None
    assert flops_per_image(nn.Flatten(), (1, 3, 3)) is None


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "tf32", 495),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "tf32", None),
        ("NVIDIA H100 NVL", "bf16", 836),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        # Names in which that of another is.
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA T400", "fp16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tera: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak, source = peak_flops_per_s(torch.device("cuda", 0), precision)
    assert peak == (None if tera is None else tera * 1e12)
    assert ("data sheet of" in source) == (tera is not None or precision == "tf32")


def test_a_cpu_has_no_data_sheet() -> None:
    assert peak_flops_per_s(torch.device("cpu"), "fp32")[0] is None


def test_speed_and_share_are_those_of_one_device() -> None:
    assert device_flops(3_000_000, 50_000, peak_per_s=1e12) == (150_000_000_000, 15.0)
    assert device_flops(3_000_000, 50_000, peak_per_s=None) == (150_000_000_000, None)
    assert device_flops(None, 50_000, peak_per_s=1e12) == (None, None)
