"""Peer: the shortest way to a first step on MNIST: torch alone and one file of numbers.

    python benchmarks/peers/barer_script.py FILE.npz

The file holds images, uint8 [N, 28, 28], and labels, int64 [N], uncompressed. It prints one JSON line after
the first step of the optimizer and ends.
"""

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

numbers = np.load(sys.argv[1])
all_images, all_labels = torch.from_numpy(numbers["images"]), torch.from_numpy(numbers["labels"])
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(784, 10)),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for ids in torch.randperm(len(all_images)).split(64):
    images, labels = all_images[ids].unsqueeze(1).float() / 255, all_labels[ids]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(json.dumps({"step": 1, "loss": loss.item()}), flush=True)
    break
