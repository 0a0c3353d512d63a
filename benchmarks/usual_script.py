"""Whole-process time of cnn_mnist: disttrain beside the script most people write.

    python benchmarks/usual_script.py --source FOLDER [--epochs 2] [--runs 5]

FOLDER holds MNIST's original files, gz or not. Both train the same model with the same optimizer and batch
for the same epochs and evaluate after each. The runs alternate; the medians and their ratio are printed.
"""

import argparse
import gzip
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def train_as_usual(root: str, epochs: int) -> None:
    """The peer: torchvision data set, ToTensor, DataLoader with two workers, eager loop."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from disttrain.models.small import CnnMnist

    sets = [datasets.MNIST(root, train=train, transform=transforms.ToTensor()) for train in (True, False)]
    train_loader = DataLoader(sets[0], batch_size=64, shuffle=True, num_workers=2)
    val_loader = DataLoader(sets[1], batch_size=64, num_workers=2)
    model = CnnMnist(num_classes=10, in_channels=1, image_size=(28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in val_loader)
        print(f"epoch {epoch + 1}: {correct} of {len(sets[1])}")


def timed(command: list[str], env: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=os.environ | env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="folder with MNIST's original files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        train_as_usual(arguments.peer, arguments.epochs)
        return
    if arguments.source is None:
        parser.error("--source is needed")
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in NAMES:
            packed = arguments.source / f"{name}.gz"
            with gzip.open(packed) if packed.exists() else (arguments.source / name).open("rb") as file:
                (raw / name).write_bytes(file.read())
        env = {"DISTTRAIN_DATA": f"{scratch}/data", "DISTTRAIN_CACHE": f"{scratch}/cache"}
        prepare = [sys.executable, "-m", "disttrain", "data", "prepare", "mnist", "--source", str(raw)]
        timed(prepare, env)
        peer = [sys.executable, __file__, "--peer", scratch, "--epochs", str(arguments.epochs)]
        run = [sys.executable, "-m", "disttrain", "run", str(REPOSITORY / "configs/cnn_mnist.yaml")]
        ours = [*run, "--procs", "1", f"train.epochs={arguments.epochs}", "--run-dir"]
        timed([*ours, f"{scratch}/warm"], env)  # decodes the shards once
        seconds: dict[str, list[float]] = {"usual script": [], "disttrain": []}
        for i in range(arguments.runs):
            seconds["usual script"].append(timed(peer, env))
            seconds["disttrain"].append(timed([*ours, f"{scratch}/run{i}"], env))
        shutil.rmtree(raw)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.epochs} epochs, n = {arguments.runs}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.1f} to {max(seconds[name]):.1f}"
        print(f"{name:<13} {median:6.1f} s ({spread})")
    print(f"ratio         {medians['usual script'] / medians['disttrain']:6.2f}")


if __name__ == "__main__":
    main()
