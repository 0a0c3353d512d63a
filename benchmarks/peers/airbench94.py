"""Peer: airbench94 (Jordan 2024, https://arxiv.org/abs/2404.00498), the package from PyPI, on one GPU.

    python benchmarks/peers/airbench94.py FOLDER

FOLDER holds the packed CIFAR-10; its images are written as the file that airbench makes of its download. One
training in a new process, with everything that a GPU does on first use. The seconds are airbench's own, taken
from the table it prints: training, without its evaluations; the accuracy is its last one, with its test-time
augmentation. It needs an environment with `airbench`.
"""

import contextlib
import io
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from training import images_and_labels


def result_of(table: str) -> dict[str, float]:
    """Returns seconds of training and final accuracy from the table of a training."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    head = next(row for row in rows if "epoch" in row)
    rows = [dict(zip(head, row, strict=True)) for row in rows if row is not head]
    training = [row for row in rows if row["epoch"].isdigit()]
    return {
        "seconds": float(training[-1]["total_time_seconds"]),
        "accuracy": float(rows[-1]["tta_val_acc"]),
    }


def folder_of_airbench(data: Path) -> None:
    """Writes a packed CIFAR-10 into the working folder as airbench keeps it."""
    Path("cifar10").mkdir()
    for split, name in (("train", "train"), ("val", "test")):
        images, labels, *_ = images_and_labels(data, split)
        classes = [str(number) for number in range(10)]
        torch.save({"images": images, "labels": labels, "classes": classes}, f"cifar10/{name}.pt")


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder_of_airbench(data)
        import airbench  # some versions read the files on import

        with contextlib.redirect_stdout(io.StringIO()) as table:
            airbench.train94()
    print(
        json.dumps(
            result_of(table.getvalue()) | {"airbench": version("airbench"), "torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
