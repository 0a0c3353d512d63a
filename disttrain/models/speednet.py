"""The network that reaches 94 % on CIFAR-10 fastest."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from disttrain.errors import UsageError
from disttrain.models.layers import map_size


class Whitening(nn.Conv2d):
    """A frozen convolution whose outputs are uncorrelated over the patches of the training images.

    Takes float [B, in_channels, H, W]; returns float [B, 2 * in_channels * kernel**2, H - kernel + 1, ...].
    These are the projections on the eigenvectors of the patches' covariance, scaled to variance 1, and their
    negatives (Page 2018, section 8; Jordan 2024, section 3.1). Only the bias is trained.
    """

    def __init__(self, in_channels: int, kernel: int) -> None:
        super().__init__(in_channels, 2 * in_channels * kernel**2, kernel)
        self.weight.requires_grad = False
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def whiten(self, images: Tensor, eps: float = 5e-4) -> None:
        """Sets the filters.

        Args:
            images: normalized, float [N, in_channels, H, W].
            eps: added to the eigenvalues, so that constant patches do not become noise.
        """
        kernel = self.kernel_size[0]
        patches = (
            images.unfold(2, kernel, 1).unfold(3, kernel, 1).movedim(1, 3).reshape(-1, *self.weight[0].shape)
        )
        flat = patches.flatten(1).double()
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        filters = (vectors / (values + eps).sqrt()).T.flip(0).view(-1, *self.weight[0].shape)
        self.weight.copy_(torch.cat([filters, -filters]))


class _Norm(nn.BatchNorm2d):
    """Batch norm with a bias and no scale, in fp32 under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers = OrderedDict(
        conv1=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        pool=nn.MaxPool2d(2),
        norm1=_Norm(outputs),
        gelu1=nn.GELU(),
        conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        norm2=_Norm(outputs),
        gelu2=nn.GELU(),
    )
    for conv in (layers["conv1"], layers["conv2"]):
        assert isinstance(conv, nn.Conv2d)
        nn.init.dirac_(conv.weight[: conv.in_channels])  # at first, the first outputs copy the input
    return nn.Sequential(layers)


class SpeedNet(nn.Sequential):
    """Patch whitening and six wide convolutions (the network of airbench94, Jordan 2024).

    Takes images float [B, in_channels, H, W], 32x32 by design and 25x25 or larger; returns scores
    float [B, num_classes]. `configs/speedrun_cifar.yaml` has the settings it was designed for.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        widths: tuple[int, int, int] | list[int] = (64, 256, 256),
    ) -> None:
        if len(widths) != 3:
            raise UsageError(f"widths: expected three numbers of channels, got {len(widths)}")
        whitening = Whitening(in_channels, 2)
        blocks = nn.Sequential()
        channels = whitening.out_channels
        for width in widths:
            blocks.append(_block(channels, width))
            channels = width
        features = nn.Sequential(
            OrderedDict(whitening=whitening, gelu=nn.GELU(), blocks=blocks, pool=nn.MaxPool2d(3))
        )
        height, width = map_size(features, image_size)
        head = nn.Linear(channels * height * width, num_classes, bias=False)
        with torch.no_grad():
            head.weight /= (
                head.weight.std() * head.in_features
            )  # scores near 0, so that the loss starts at ln(classes)
        super().__init__(OrderedDict(features=features, flatten=nn.Flatten(), head=head))

    def init_from_images(self, images: Tensor) -> None:
        """Sets the whitening filters.

        Args:
            images: normalized training images, float [N, in_channels, H, W].
        """
        whitening = self.get_submodule("features.whitening")
        assert isinstance(whitening, Whitening)
        whitening.whiten(images)
