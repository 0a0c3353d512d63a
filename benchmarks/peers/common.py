"""Shared by the peers: arguments, shards, the usual transforms, the timer and the printed JSON line.

It needs torch and torchvision only, because mosaic_streaming.py runs it in another environment.
"""

import argparse
import json
import tarfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

BATCH_SIZE = 512
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description.partition("\n")[0])
    arguments.add_argument("data", type=Path, help="folder with train-*.tar")
    arguments.add_argument("--samples", type=int, help="stop after this many samples (default: one epoch)")
    arguments.add_argument("--threads", type=int, help="number of torch threads (default: torch's own)")
    return arguments


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def shards(data: Path) -> list[Path]:
    found = sorted(data.glob("train-*.tar"))
    if not found:
        raise SystemExit(f"{data} holds no train-*.tar; prepare cifar10 first")
    return found


def encoded_samples(data: Path) -> Iterator[tuple[bytes, int]]:
    """Yields each training sample's JPEG bytes and label, in the shards' order."""
    for path in shards(data):
        label, jpeg = None, None
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    label = int(content)
                else:
                    jpeg = content
                if label is not None and jpeg is not None:
                    yield jpeg, label
                    label, jpeg = None, None


def usual_transform():
    """Returns torchvision's usual CIFAR-10 training transform, from a PIL image to float32 [3, 32, 32]."""
    from PIL import Image
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    transform(Image.new("RGB", (32, 32)))  # one-time set-up is not part of the epoch
    return transform


def timed(batches: Iterable, samples: int | None = None) -> tuple[int, float]:
    """Returns the number of samples, and the seconds from requesting the first batch to getting the last."""
    seen = 0
    began = time.perf_counter()
    for images, _ in batches:
        seen += len(images)
        if samples is not None and seen >= samples:
            break
    return seen, time.perf_counter() - began


def report(packages: tuple[str, ...], samples: int, seconds: float, **facts) -> None:
    """Prints the result as one JSON line, with the packages' versions."""
    import torch

    versions = {name: version(name) for name in (*packages, "torch", "torchvision", "pillow")}
    facts |= {"threads": torch.get_num_threads(), "versions": versions}
    print(json.dumps({"samples": samples, "seconds": seconds, "samples_per_s": samples / seconds} | facts))
