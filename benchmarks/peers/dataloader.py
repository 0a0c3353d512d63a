"""Peer: torch's DataLoader over images decoded up front, as torchvision.datasets.CIFAR10 holds them.

    python benchmarks/peers/dataloader.py FOLDER [--workers 2] [--epochs 1] [--samples 10000] [--threads 1]

FOLDER holds the shards of CIFAR-10 as JPEG; they are decoded before the clock starts. The workers persist,
and one epoch passes before those that count. --samples keeps only so many images; an epoch of fewer hides the
workers' latency less well, so prefer whole ones.
"""

import io

import numpy as np
from common import BATCH_SIZE, encoded_samples, parser, report, set_threads, timed, usual_transform
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Cifar10(Dataset):
    """What torchvision.datasets.CIFAR10 is once loaded: data is uint8 [N, 32, 32, 3], targets a list."""

    def __init__(self, data: np.ndarray, targets: list[int], transform) -> None:
        self.data, self.targets, self.transform = data, targets, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--workers", type=int, default=2, help="DataLoader worker processes; 0 loads in the main process"
    )
    options.add_argument("--epochs", type=int, default=1, help="measured epochs, after a warm-up epoch")
    arguments = options.parse_args()
    set_threads(arguments.threads)
    images, targets = [], []
    for jpeg, label in encoded_samples(arguments.data):
        images.append(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        targets.append(label)
        if len(images) == arguments.samples:
            break
    loader = DataLoader(
        Cifar10(np.stack(images), targets, usual_transform()),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )
    timed(loader)  # starts the workers
    epochs = [timed(loader) for _ in range(arguments.epochs)]
    samples, seconds = map(sum, zip(*epochs, strict=True))
    report((), samples, seconds, workers=arguments.workers, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
