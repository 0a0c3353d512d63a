"""The loss of a batch: that of the scores, and of auxiliary scores if the network returns some.

In multi-label data, labels are uint8 [B, classes], and each class is a yes or no of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain.config import TrainConfig
from disttrain.preflight import relative_class_weights
from disttrain.shards.index import Index
from disttrain.training.augment import Mix

_GAMMA = 2.0  # Lin et al. 2017, section 5.1
_LEAST = 1e-12  # of 1 - p; float32 has nothing between 1 - 6e-8 and 1
_ONE, _SEVERAL = 0.4, 0.3  # weight of an auxiliary loss: Inception v3 in torchvision; Szegedy et al. 2014


def all_scores(output: Any) -> list[Any]:
    """Returns the scores, then the auxiliary scores if the output in training mode is a tuple of both."""
    return [part for part in output if part is not None] if isinstance(output, tuple) else [output]


def class_weights(train: TrainConfig, index: Index, device: torch.device) -> Tensor | None:
    """Returns the weights of `train.class_weights`, float32 [classes] on the device; None if all are 1."""
    weights = relative_class_weights(train, index)
    return None if weights is None else torch.tensor(weights, device=device)


def loss_and_scores(
    output: Tensor | tuple[Tensor | None, ...],
    labels: Tensor,
    partners: Tensor | None,
    mix: Mix | None,
    config: TrainConfig,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the loss summed over a batch, float32 [], and the scores [B, classes].

    Args:
        output: of the network: scores, or a tuple of scores and auxiliary scores, each [B, classes].
        labels: see `Batch`.
        partners: labels of the images mixed in, or None.
        mix: has the weights of the two labels, or None.
        config: has the kind of loss, the label smoothing and the weight of auxiliary losses.
        class_weights: float32 [classes], or None for 1.
    """
    scores, *others = all_scores(output)
    loss = loss_sum(scores, labels, partners, mix, config, class_weights)
    weight = config.aux_weight
    if weight is None:
        weight = _ONE if len(others) == 1 else _SEVERAL
    for other in others:
        loss = loss + weight * loss_sum(other, labels, partners, mix, config, class_weights)
    return loss, scores


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor | None,
    mix: Mix | None,
    config: TrainConfig,
    class_weights: Tensor | None,
) -> Tensor:
    """Returns the loss of the scores summed over a batch, float32 [].

    For the arguments see `loss_and_scores`; logits are [B, classes]. The loss for each label of a mixed image
    has the weight of that label's class.
    """
    loss = _sum_for(logits.float(), labels, config, class_weights)
    if mix is None or partners is None:
        return loss
    return mix.lam * loss + (1 - mix.lam) * _sum_for(logits.float(), partners, config, class_weights)


def _sum_for(logits: Tensor, labels: Tensor, config: TrainConfig, class_weights: Tensor | None) -> Tensor:
    smoothing = config.label_smoothing
    if labels.ndim == 2:
        return _multi_label(logits, labels.float(), config, class_weights)
    if config.loss == "cross_entropy" and class_weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    if config.loss == "focal":
        losses = _focal(logits, labels, _gamma(config), smoothing)
    else:
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (losses if class_weights is None else losses * class_weights[labels]).sum()


def _gamma(config: TrainConfig) -> float:
    return _GAMMA if config.focal_gamma is None else config.focal_gamma


def _multi_label(logits: Tensor, targets: Tensor, config: TrainConfig, weights: Tensor | None) -> Tensor:
    """Returns the binary cross entropy, or the focal loss, summed over the samples, float32 [].

    The loss of a sample is the mean over the classes. The weight of a class is that of the samples that have
    it. Label smoothing moves the targets of 0 and 1 towards 0.5.
    """
    if config.label_smoothing:
        targets = targets.lerp(torch.full_like(targets, 0.5), config.label_smoothing)
    present, absent = F.logsigmoid(logits), F.logsigmoid(-logits)  # log p and log (1 - p)
    if config.loss == "focal":
        gamma = _gamma(config)
        present = (-present.expm1()).clamp(min=_LEAST) ** gamma * present
        absent = (-absent.expm1()).clamp(min=_LEAST) ** gamma * absent
    if weights is not None:
        present = weights * present
    return -(targets * present + (1 - targets) * absent).mean(1).sum()


def evaluation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy, in multi-label data the binary one, summed over a batch: float32 []."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / labels.shape[1]


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns whether each sample is predicted correctly, in multi-label data all its labels: bool [B]."""
    if labels.ndim == 1:
        return logits.argmax(1) == labels
    return ((logits > 0) == (labels > 0)).all(1)


def _focal(logits: Tensor, labels: Tensor, gamma: float, label_smoothing: float) -> Tensor:
    """Returns the focal loss of each sample (Lin et al. 2017), float32 [B].

    It is the sum over the classes of target * (1 - p) ** gamma * -log p, where smoothing spreads the target.
    """
    logs = logits.log_softmax(1)
    # The gradient of a power below 1 is infinite at 0, where p has been rounded to 1.
    terms = (-logs.expm1()).clamp(min=_LEAST) ** gamma * logs
    losses = F.nll_loss(terms, labels, reduction="none")
    return (1 - label_smoothing) * losses - label_smoothing * terms.mean(1) if label_smoothing else losses
