"""Run by torchrun: trains some steps as a run does and prints what was sent between the ranks in each."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from disttrain.config import load_config
from disttrain.preflight import open_index
from disttrain.training import train
from disttrain.training.build import build
from disttrain.training.group import join
from disttrain.training.phases import Phases
from disttrain.training.rank import Rank
from disttrain.training.step import train_step

STEPS = 6

config = load_config(Path(sys.argv[1]), sys.argv[2:])
rank = Rank(int(os.environ["RANK"]), None)
group = join(config, "cpu")
parts, _, _ = build(config, rank, group, open_index(config, print), None)
seen: Counter[str] = Counter()


def counting_hook(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    seen["gradient buckets"] += 1
    return allreduce_hook(None, bucket)


def counted(name: str) -> None:
    real = getattr(dist, name)

    def call(*arguments: object, **options: object) -> object:
        seen[name] += 1
        return real(*arguments, **options)

    setattr(dist, name, call)


parts.model.register_comm_hook(None, counting_hook)
for name in ("all_reduce", "broadcast", "all_gather", "barrier", "_broadcast_coalesced"):
    counted(name)
order = parts.plan.order(0)
parts.augment.start_epoch(0, order, *parts.image_size)
batches = train.prefetch(parts, 0, range(STEPS), order)
steps = []
for _ in range(STEPS):
    seen.clear()
    train_step(parts, batches, 1, parts.plan.batch_size, Phases())
    steps.append(dict(seen))
batches.close()
if rank.number == 0:
    print(json.dumps(steps), flush=True)
dist.destroy_process_group()
os._exit(0)  # as a worker does, without waiting for the threads of the process group
