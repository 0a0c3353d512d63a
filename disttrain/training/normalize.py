"""Normalization: from stored pixels to the network's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Turns stored images, uint8 [B, H, W, C], into float32 [B, C, H, W]: offset + scale * value.

    Args:
        mean: mean per channel, of pixel values in 0..1.
        std: standard deviation per channel, of pixel values in 0..1; 0 leaves a constant channel unscaled.
        width: width of the images in pixels.
        channels_last: whether the result has NHWC memory order.
        device: where the images are.
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        width: int,
        *,
        channels_last: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        divisor = torch.tensor([value or 1.0 for value in std])
        factors = {"offset": -(torch.tensor(mean) / divisor), "scale": 1 / (255 * divisor)}
        for name, values in factors.items():
            # For a whole row of values: broadcasting over only three channels would be slower.
            self.register_buffer(name, values.repeat(width).to(device), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the normalized images."""
        values = images.reshape(-1, len(self.offset)).float()
        torch.addcmul(self.offset, values, self.scale, out=values)
        result = values.view(images.shape).permute(0, 3, 1, 2)
        return result if self.channels_last else result.contiguous()
