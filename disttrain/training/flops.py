"""Floating-point operations of a model, and how many a device does per second and at its peak (MFU)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.models import try_out

PEAK_TFLOPS = {
    # From the makers' data sheets, dense: bf16 or fp16, tf32, fp32. The first name that matches counts.
    "H200 NVL": (836, 418, 60),
    "H200": (989, 495, 67),
    "H100 NVL": (836, 418, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 495, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10": (125, 62.5, 31.2),
    "V100-PCIE": (112, None, 14),
    "V100": (125, None, 15.7),
    "T4": (65, None, 8.1),
}
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHEAP = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


def flops_per_image(model: nn.Module, image: tuple[int, int, int]) -> int | None:
    """Returns the floating-point operations of the matrix products in training on one image.

    A multiplication and an addition count as two. Counted are convolutions and linear layers: the forward
    pass, and the backward pass for trained weights and for inputs that depend on trained weights.
    Recomputation is not counted: the number describes the model, not how it runs.
    (torch.utils.flop_counter imports slowly, and counts grouped convolutions as full ones in the backward
    pass.)

    The model computes the scores of a blank image for this; it is not changed.

    Args:
        model: on its device, neither compiled nor wrapped.
        image: channels, height and width.

    Returns:
        The number, or None if the model has parameters in other kinds of layers.
    """
    layers = [
        module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    ]
    if not layers or not all(isinstance(layer, (*_PRODUCTS, *_CHEAP)) for layer in layers):
        return None
    total = 0

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        products = output.numel() * math.prod(layer.weight.shape[1:])
        total += 2 * products * (1 + layer.weight.requires_grad + inputs[0].requires_grad)

    handles = [layer.register_forward_hook(count) for layer in layers if isinstance(layer, _PRODUCTS)]
    device = next(model.parameters()).device
    try:
        try_out(model, torch.zeros(1, *image, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return total


def device_flops(
    per_image: int | None, images_per_s: float, *, peak_per_s: float | None
) -> tuple[int | None, float | None]:
    """Returns the model's operations per second on a device, and their share of its peak in percent (MFU).

    Args:
        per_image: from `flops_per_image`.
        images_per_s: images per second of one device in training.
        peak_per_s: from `peak_flops_per_s`.
    """
    if per_image is None:
        return None, None
    found = per_image * images_per_s
    return round(found), None if peak_per_s is None else round(100 * found / peak_per_s, 2)


def peak_flops_per_s(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Returns the peak operations per second of a GPU in a precision, or None, and its source."""
    if device.type != "cuda":
        return None, "no data sheet for a CPU"
    name = torch.cuda.get_device_name(device)
    for known, (half, tf32, single) in PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):  # an L40 is not an L4
            tera = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": single}[precision]
            return (None if tera is None else tera * 1e12), f"data sheet of {known}"
    return None, f"no figure for {name}"
