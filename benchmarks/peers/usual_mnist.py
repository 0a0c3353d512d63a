"""Peer: the script most people write for MNIST, as a whole process.

    python benchmarks/peers/usual_mnist.py ROOT [--epochs 2]

ROOT holds MNIST/raw, as torchvision keeps it. torchvision's data set, ToTensor, a DataLoader with two
workers, an eager loop, an evaluation after each epoch.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from disttrain.models.small import CnnMnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    transform = transforms.ToTensor()
    sets = [datasets.MNIST(options.root, train=train, transform=transform) for train in (True, False)]
    train_loader = DataLoader(sets[0], batch_size=64, shuffle=True, num_workers=2)
    val_loader = DataLoader(sets[1], batch_size=64, num_workers=2)
    model = CnnMnist(num_classes=10, in_channels=1, image_size=(28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    correct = 0
    for _ in range(options.epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in val_loader)
    print(json.dumps({"epochs": options.epochs, "accuracy": correct / len(sets[1])}))


if __name__ == "__main__":
    main()
