"""The loss of a batch: cross entropy of the scores, and of auxiliary scores if the network returns some."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from disttrain.config import TrainConfig
from disttrain.training.augment import Mix

_ONE, _SEVERAL = 0.4, 0.3  # weight of an auxiliary loss: Inception v3 in torchvision; Szegedy et al. 2014


def all_scores(output: Any) -> list[Any]:
    """Returns the scores, then the auxiliary scores if the output in training mode is a tuple of both."""
    return [part for part in output if part is not None] if isinstance(output, tuple) else [output]


def loss_and_scores(
    output: Tensor | tuple[Tensor | None, ...],
    labels: Tensor,
    partners: Tensor | None,
    mix: Mix | None,
    config: TrainConfig,
) -> tuple[Tensor, Tensor]:
    """Returns the loss summed over a batch, float32 [], and the scores [B, classes].

    Args:
        output: of the network: scores, or a tuple of scores and auxiliary scores, each [B, classes].
        labels: int64 [B].
        partners: labels of the images mixed in, int64 [B], or None.
        mix: has the weights of the two labels, or None.
        config: has the label smoothing and the weight of auxiliary losses.
    """
    scores, *others = all_scores(output)
    loss = loss_sum(scores, labels, partners, mix, config.label_smoothing)
    weight = config.aux_weight
    if weight is None:
        weight = _ONE if len(others) == 1 else _SEVERAL
    for other in others:
        loss = loss + weight * loss_sum(other, labels, partners, mix, config.label_smoothing)
    return loss, scores


def loss_sum(
    logits: Tensor, labels: Tensor, partners: Tensor | None, mix: Mix | None, label_smoothing: float
) -> Tensor:
    """Returns the cross entropy summed over a batch.

    Args:
        logits: [B, classes].
        labels: int64 [B].
        partners: labels of the images mixed in, int64 [B], or None.
        mix: has the weights of the two labels, or None.
        label_smoothing: share of the target that is spread over all classes.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    if mix is None or partners is None:
        return loss
    other = F.cross_entropy(logits.float(), partners, reduction="sum", label_smoothing=label_smoothing)
    return mix.lam * loss + (1 - mix.lam) * other
