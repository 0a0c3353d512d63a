"""Peer: the script a person writes for MNIST, up to its first step.

    python benchmarks/peers/bare_script.py ROOT

ROOT holds MNIST/raw, as torchvision keeps it. torch, torchvision's data set, ToTensor, a DataLoader without
workers; it prints one JSON line after the first step of the optimizer and ends.
"""

import json
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

dataset = datasets.MNIST(sys.argv[1], train=True, transform=transforms.ToTensor())
loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=0)
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(784, 10)),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for images, labels in loader:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(json.dumps({"step": 1, "loss": loss.item()}), flush=True)
    break
