"""Prints the table of docs/scaling.md, or the same table for your own GPUs and network.

python docs/scaling_tables.py
python docs/scaling_tables.py --images-per-s 30000 --fixed-ms 3 --link-us 20 --link-gbit-per-s 25
"""

import argparse
import sys
from pathlib import Path

from disttrain.models import build_model, parameter_count
from disttrain.training.autotune import bucket_mib

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from scaling_model import INFINIBAND, NVLINK, Link, Ranks, Step, efficiency

MODELS = {
    "cnn_mnist": (1, 28),
    "lenet_bn": (3, 32),
    "alexnet_cifar": (3, 32),
    "resnet18": (3, 32),
    "vgg16": (3, 32),
}
PER_NODE = 8
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)
BATCH = 4096
SPEEDS = (5000.0, 50000.0)
FIXED_S = 0.002


def table(speeds: tuple[float, ...] = SPEEDS, fixed_s: float = FIXED_S, between: Link = INFINIBAND) -> str:
    """Returns the efficiency of each network on up to 1,024 GPUs, as Markdown.

    Args:
        speeds: images/s of one GPU, without the fixed cost of a step.
        fixed_s: cost of a step in seconds that does not depend on the batch size.
        between: the link between nodes of 8 GPUs.
    """
    import torch

    lines = [
        "| network | gradients | images/s of a GPU | "
        + " | ".join(f"{n:,}" for n in COUNTS)
        + " | 50 % up to |",
        "|---|---|---|" + "---|" * (len(COUNTS) + 1),
    ]
    for name, (channels, size) in MODELS.items():
        model = build_model(name, num_classes=10, in_channels=channels, image_size=(size, size), args={})
        parameters = parameter_count(model)
        bucket, _ = bucket_mib(parameters, torch.device("cuda"))
        for speed in speeds:
            shares = [
                efficiency(
                    Step(fixed_s, 1 / speed),
                    BATCH,
                    4 * parameters,
                    bucket * 2**20,
                    Ranks(max(1, n // PER_NODE), min(n, PER_NODE), NVLINK, between),
                )
                for n in COUNTS
            ]
            most = max(n for n, share in zip(COUNTS, shares, strict=True) if share >= 0.5)
            cells = [name, f"{4 * parameters / 2**20:,.2f} MiB", f"{speed:,.0f}"]
            cells += [f"{100 * share:.0f} %" for share in shares] + [f"{most:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images-per-s", type=float, nargs="+", default=SPEEDS)
    parser.add_argument("--fixed-ms", type=float, default=1000 * FIXED_S)
    parser.add_argument("--link-us", type=float, default=1e6 * INFINIBAND.latency_s)
    parser.add_argument("--link-gbit-per-s", type=float, default=8e-9 * INFINIBAND.bytes_per_s)
    options = parser.parse_args()
    link = Link(options.link_us / 1e6, options.link_gbit_per_s / 8e-9)
    print(table(tuple(options.images_per_s), options.fixed_ms / 1000, link), end="")
