"""The evaluation loop: integers over the whole validation split, whatever the number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain.collectives import average_buffers, reduce_sum, stop_requested_anywhere
from disttrain.data.plan import share
from disttrain.errors import DataError
from disttrain.parts import Hooks, Parts, as_written
from disttrain.pulse import Phase

_LARGEST_BATCH = 1024  # images in a batch of evaluation, where it may be larger than in training


def evaluate(
    parts: Parts, tta: Literal["none", "flip", "multi_view"], *, step: int, hooks: Hooks
) -> dict[str, Any] | None:
    """Evaluates the model, or its moving average, on the validation split. Every rank calls this.

    Args:
        parts: what to evaluate with.
        tta: the test-time augmentation.
        step: optimizer steps taken so far.
        hooks: told of what begins, and gives the wish to stop.

    Returns:
        A record of metrics.jsonl: loss, accuracy 0..1, correct, total; with a test-time augmentation also
        the accuracy and the correct ones without it. None if a rank was asked to stop meanwhile.

    Raises:
        DataError: the ranks together did not see every sample.
    """
    average_buffers(parts, parts.bare_model)
    model: nn.Module = parts.bare_model
    if parts.ema is not None:
        average_buffers(parts, parts.ema.module)
        model = parts.ema.module
    device = parts.accelerator.device
    samples, world_size = len(parts.val_ids), parts.world_size
    own = share(range(samples), parts.rank, world_size)
    # Nothing is kept for a backward pass, so that more fits than in training.
    size = max(1, parts.plan.batch_size // (world_size * parts.config.train.accumulate))
    size = max(size, min(4 * size, _LARGEST_BATCH))
    windows = (slice(begin, min(begin + size, own.stop)) for begin in range(own.start, own.stop, size))
    most = len(share(range(samples), 0, world_size))  # of all ranks
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # correct, total, correct without augmentation
    loss = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with (
        torch.inference_mode(),
        as_written(parts),
        parts.accelerator.autocast(),
        contextlib.closing(parts.val_data.batches(parts.val_ids, windows)) as batches,
    ):
        for number in range(-(-most // size)):
            hooks.phases.enter(Phase.EVALUATE, step, number)
            # Collective: every rank, also one that has no batch left.
            if parts.look_due(number) and stop_requested_anywhere(
                parts, Phase.EVALUATE, step, hooks.stop_requested()
            ):
                return None
            batch = next(batches, None)
            if batch is None:
                continue
            plain: Tensor | None = None
            logits = torch.zeros((), device=device)
            for images, weight in views(parts.augment.plain(batch.images), tta):
                scores = model(images).float()
                plain = scores if plain is None else plain
                logits = logits + weight * scores
            loss += F.cross_entropy(logits, batch.labels, reduction="sum")
            assert plain is not None
            hits = [(scores.argmax(1) == batch.labels).sum() for scores in (logits, plain)]
            counts += torch.stack([hits[0], torch.tensor(len(batch.labels), device=device), hits[1]])
    model.train()
    sums = [*counts.tolist(), loss.item()]
    *integers, total_loss = reduce_sum(parts, Phase.EVALUATE, step, sums)
    correct, total, plain_correct = map(int, integers)
    if total != samples:
        raise DataError(
            f"evaluation saw {total:,} samples, the index has {samples:,}: this must not be; please report it"
        )
    record = {
        "kind": "eval",
        "loss": total_loss / total,
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "skipped": parts.val_skipped,
    }
    if tta != "none":
        record |= {"tta": tta, "plain_accuracy": plain_correct / total, "plain_correct": plain_correct}
    return record


def views(images: Tensor, tta: Literal["none", "flip", "multi_view"]) -> Iterator[tuple[Tensor, float]]:
    """Yields the images as each pass of a test-time augmentation sees them, with the weight of its scores.

    The first are the images as they are. multi_view is that of Jordan 2024 (airbench): the mirrored images
    too, and both shifted by a pixel to the upper left and to the lower right with half the weight.

    Args:
        images: [B, C, H, W].
        tta: the test-time augmentation.
    """
    if tta == "none":
        yield images, 1.0
        return
    shifted = []
    if tta == "multi_view":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    for seen, weight in ((images, 0.5 if shifted else 1.0), *((one, 0.25) for one in shifted)):
        yield seen, weight / 2
        yield seen.flip(3), weight / 2
