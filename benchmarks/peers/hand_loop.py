"""Peer: the shortest training loop one would write by hand, over uint8 images in memory.

    python benchmarks/peers/hand_loop.py MODEL FOLDER [--replay] [--batch 64] [--precision bf16] [--steps 200]

Each epoch is a random permutation; each step takes the images of its part, normalises them and trains, with a
fused optimizer, a running sum of the loss and nothing else. --replay trains on one batch, normalised before.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from training import Clock, arguments, images_and_labels, network, normalised, optimizer


def batches(
    images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for ids in torch.randperm(len(images), device=images.device).split(size):
            yield normalised(images.index_select(0, ids), mean, std), labels.index_select(0, ids)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--replay", action="store_true", help="one batch again and again")
    options = parser.parse_args()
    device = options.device
    images, labels, mean, std = (tensor.to(device) for tensor in images_and_labels(options.data))
    model = network(options.model, images).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    steps = optimizer(options.optimizer, model)
    source = batches(images, labels, mean, std, options.batch)
    replayed = next(source) if options.replay else None
    clock, total = Clock(options.warmup, options.steps, device), torch.zeros((), device=device)
    while True:
        batch, targets = replayed or next(source)
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = F.cross_entropy(model(batch), targets)
        loss.backward()
        steps.step()
        steps.zero_grad(set_to_none=True)
        total += loss.detach()
        if clock.step():
            break
    clock.report(mean_loss=total.item() / clock.done)


if __name__ == "__main__":
    main()
