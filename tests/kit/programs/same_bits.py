"""Run by torchrun or alone: trains experiments in this process, and prints a digest of each as JSON.

Arguments: the folder of the data set, whether reproducible (true or false), the number of virtual ranks, what
to leave out of the mode (a name of FAULTS, or none), and the names of the cases.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from disttrain.models.resnet import resnet18
from disttrain.runs.jsonl import encoded
from disttrain.shards.index import Index, load_index
from disttrain.training import tree_sum, virtual_ranks
from disttrain.training.build import build
from disttrain.training.group import join
from disttrain.training.rank import Rank
from kit.graph_cases import config_of, train_through
from kit.run_results import MEASURED

BATCH = 48


def resnet18_with_dropout(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    network = resnet18(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    network.classifier.insert(2, nn.Dropout(0.3))
    return network


class Small(nn.Sequential):
    """Batch norm, dropout and a random choice of Python in each pass."""

    def __init__(self, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * 225, num_classes),
        )


WORDS: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"name": "__main__:Small"},
        "train": {"ema": 0.9, "grad_clip": 0.5},
        "augment": {"mixup": 0.2},
    },
    "lenet_bn": {"augment": {"crop_padding": 2, "flip": True, "cutout": 8}},
    "cnn_mnist": {
        "model": {"name": "cnn_mnist"},
        "augment": {"mixup": 0.4, "cutmix": 1.0},
        "train": {"accumulate": 2},
        "optim": {"name": "adam", "lr": 1e-3, "momentum": None},
    },
    "speednet": {
        "model": {"name": "speednet", "args": {"widths": [8, 16, 16]}},
        "optim": {
            "name": "muon",
            "lr": 0.02,
            "momentum": 0.6,
            "normalize_weights": True,
            "groups": [{"parameters": ".*bias", "name": "sgd", "lr": 1.0}],
        },
        "train": {"label_smoothing": 0.1},
        "eval": {"tta": "multi_view"},
    },
    "resnet18": {"model": {"name": "__main__:resnet18_with_dropout"}, "train": {"ema": 0.9, "epochs": 1}},
    "bf16": {"train": {"precision": "bf16"}},
    "streamed": {"data": {"cache": "none"}},
    "clipped": {"train": {"grad_clip": 0.5}},
}
"""Settings by word. A case is several words, such as "lenet_bn bf16"."""


def skip_the_tree() -> None:
    """Each rank adds up its own virtual ranks, then the ranks' sums are added."""
    tree_sum.own_nodes = lambda node, own: [tree_sum.Node(own.start, own.stop)] if own else []

    def add_up(node: tree_sum.Node, values_of: Callable[[int], list[Tensor]]) -> list[Tensor]:
        sums, *others = (values_of(virtual_rank) for virtual_rank in range(node.begin, node.end))
        for values in others:
            for each, value in zip(sums, values, strict=True):
                each.add_(value)
        return sums

    def total(root: tree_sum.Node, sums: dict[tree_sum.Node, Tensor]) -> Tensor:
        first, *others = sums.values()
        for other in others:
            first.add_(other)
        return first

    tree_sum._add_up, tree_sum._total = add_up, total


def skip_the_statistics() -> None:
    """Batch-norm statistics of each rank are those of its own virtual ranks."""
    virtual_ranks.fill = lambda buffers, flat: None


def skip_the_seeds() -> None:
    """Random numbers go on from one virtual rank to the next."""
    virtual_ranks.seed_all = lambda key, device: None


def skip_the_threads() -> None:
    """A process alone has two threads."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        real = torch.set_num_threads
        torch.set_num_threads = lambda number: real(2)


def clip_before_the_sum() -> None:
    """Each rank clips its own gradient."""
    real = virtual_ranks.reduce_tree

    def clipped(group: Any, count: int, sums: Any, like: Any) -> Any:
        for values in sums.values():
            nn.utils.clip_grads_with_norm_(
                [_with_gradient(value) for value in values[:-1]], 0.1, nn.utils.get_total_norm(values[:-1])
            )
        return real(group, count, sums, like)

    virtual_ranks.reduce_tree = clipped


def _with_gradient(value: Tensor) -> Tensor:
    holder = torch.empty_like(value)
    holder.grad = value
    return holder


FAULTS = {
    "none": lambda: None,
    "tree": skip_the_tree,
    "statistics": skip_the_statistics,
    "seeds": skip_the_seeds,
    "threads": skip_the_threads,
    "clipping": clip_before_the_sum,
}


def trained(index: Index, case: str, *, reproducible: bool, virtual: int) -> str:
    """Trains a case, and returns a digest of its weights and of what it recorded."""
    mode = {"train": {"reproducible": reproducible, "virtual_ranks": virtual}}
    plain = {"monitor": {"log_every_steps": 2}, "train": {"precision": "fp32"}}
    config = config_of(index, BATCH, plain, *(WORDS[word] for word in case.split()), mode)
    AcceleratorState._reset_state()
    number = int(os.environ.get("RANK", "0"))
    state, progress, _ = build(config, Rank(number, None), join(config, "cpu"), index, None)
    records = train_through(state, progress)
    found = hashlib.sha256()
    for network in state.networks:
        for name, value in network.state_dict().items():
            found.update(name.encode() + value.contiguous().numpy().tobytes())
    for record in records:
        kept = {key: value for key, value in json.loads(encoded(record)).items() if key not in MEASURED}
        found.update(json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


def main(folder: str, reproducible: str, virtual: str, fault: str, *cases: str) -> None:
    FAULTS[fault]()
    index = load_index(Path(folder).name, str(Path(folder).parent))
    found = {
        case: trained(index, case, reproducible=reproducible == "true", virtual=int(virtual))
        for case in cases
    }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # as a worker does, without waiting for the threads of the process group


if __name__ == "__main__":
    main(*sys.argv[1:])
