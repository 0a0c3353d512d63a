"""Shared by the training peers: arguments, the images in memory, the network and the timer.

Everything is as disttrain has it, so that the loop alone differs: the decoded images of the packed data set,
mean and standard deviation of its index, the network of the catalog, torch's fused optimizer.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NONE = np.empty(0, np.int64)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("model", help="a name of `disttrain models`")
    parser.add_argument("data", type=Path, help="folder of a packed data set")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--batch", type=int, default=64, help="global batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--warmup", type=int, default=20, help="warm-up steps")
    parser.add_argument("--steps", type=int, default=200, help="measured steps")
    return parser


def images_and_labels(data: Path, split: str = "train") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the images of a split, uint8 [N, H, W, C], labels, int64 [N], and mean and std, each [C]."""
    from disttrain.data.decoded_copy import open_split
    from disttrain.shards.index import load_index

    index = load_index(data.name, str(data.parent))
    decoded = open_split(index, split, NONE, lambda text: None)
    images, labels = torch.from_numpy(np.array(decoded.images)), torch.from_numpy(np.array(decoded.labels))
    return images, labels, torch.tensor(index.mean), torch.tensor(index.std)


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns float32 [B, C, H, W] in channels_last order, of uint8 [B, H, W, C]; the usual two lines."""
    return (images.to(torch.float32).div_(255).sub_(mean).div_(std)).permute(0, 3, 1, 2)


def network(name: str, images: Tensor) -> nn.Module:
    from disttrain.models import build_model

    size = (images.shape[1], images.shape[2])
    return build_model(name, num_classes=10, in_channels=images.shape[3], image_size=size, args={})


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


class Clock:
    """Takes the step times, in ten intervals of equal length after a warm-up.

    Args:
        warmup: steps before those that count.
        steps: that count.
        device: waited for at the ends of the intervals.
    """

    def __init__(self, warmup: int, steps: int, device: str = "cpu") -> None:
        self.warmup, self.interval = warmup, max(1, steps // 10)
        self.end = warmup + self.interval * max(1, steps // self.interval)
        self.done, self.times, self.began, self.device = 0, [], 0.0, device

    def step(self) -> bool:
        """Counts a step; returns whether it was the last one."""
        self.done += 1
        if self.done >= self.warmup and (self.done - self.warmup) % self.interval == 0:
            if self.device != "cpu":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.done > self.warmup:
                self.times.append((now - self.began) / self.interval)
            self.began = now
        return self.done >= self.end

    def report(self, **facts: object) -> None:
        """Prints the median of the intervals as one JSON line."""
        print(json.dumps({"step_time_s": statistics.median(self.times), "steps": self.done} | facts))
