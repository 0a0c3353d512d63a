"""Augmentation of a batch on one CPU thread, with torchvision v2 image by image.

    python benchmarks/augmentation.py [--runs 5] [--json]

Each kind on random images of two sizes, all in turns in one process. The time is the processor time of the
thread, so that other work on the machine counts less. The images are there in the layout that each side
takes: [B, H, W, C] here, [C, H, W] for torchvision.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
import torch
from common import Claim, interleaved, machine, print_json_or
from torchvision.transforms import v2

from disttrain.config import AugmentConfig
from disttrain.host_memory import keep_freed_memory
from disttrain.training.auto_augment import Policy

BATCHES = {224: 64, 32: 1024}
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
KINDS: dict[str, tuple[dict, Callable[[], torch.nn.Module]]] = {
    "TrivialAugment": ({"trivial_augment": True}, v2.TrivialAugmentWide),
    "RandAugment": ({"rand_augment": {}}, v2.RandAugment),
    "colour jitter": ({"color_jitter": JITTER}, lambda: v2.ColorJitter(**JITTER)),
}


def measurements() -> dict[str, Callable[[], float]]:
    """Returns functions that give images per second of processor time."""
    found: dict[str, Callable[[], float]] = {}
    for size, batch in BATCHES.items():
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
        singles = list(images.permute(0, 3, 1, 2).contiguous())
        places = np.arange(batch)
        for name, (config, theirs) in KINDS.items():
            policy, epochs, transform = Policy(AugmentConfig.model_validate(config), 0), count(), theirs()
            found[f"{name} {size}"] = partial(
                rate, batch, lambda p=policy, i=images, e=epochs, w=places: p.change(i, next(e), w)
            )
            found[f"{name} {size}, torchvision"] = partial(
                rate, batch, lambda t=transform, s=singles: [t(image) for image in s]
            )
    return found


def rate(images: int, work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return images / (time.thread_time() - began)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--runs", type=int, default=5, help="rounds after the warm-up (default 5)")
    arguments.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = arguments.parse_args()
    keep_freed_memory()  # as a worker does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = interleaved(measurements(), options.runs)
    medians = {name: statistics.median(each) for name, each in values.items()}
    names = [name for name in medians if not name.endswith("torchvision")]
    claims = [Claim(name, name, f"{name}, torchvision", 1.0, "at least").result(medians) for name in names]

    def table() -> None:
        for claim in claims:
            rates = f"{claim['ours_median']:>9,.0f} {claim['peer_median']:>9,.0f} images/s"
            print(f"{claim['what']:<20} {rates}  ratio {claim['value']:.2f}")

    print_json_or(table, options, machine() | {"runs": options.runs}, values=values, claims=claims)


if __name__ == "__main__":
    main()
