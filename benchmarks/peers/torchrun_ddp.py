"""Peer: the data-parallel script of the torch tutorials, started by torchrun.

    torchrun --nproc-per-node 2 benchmarks/peers/torchrun_ddp.py MODEL FOLDER [--batch 64] [--steps 200]

DistributedSampler, a DataLoader without workers over normalized images in memory, DDP with its defaults on
gloo, fp32. --batch is the global batch; each process takes its share.
"""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training import Clock, arguments, images_and_labels, network, normalized, optimizer


def main() -> None:
    options = arguments(__doc__).parse_args()
    dist.init_process_group("gloo")
    images, labels, mean, std = images_and_labels(options.data)
    dataset = TensorDataset(normalized(images, mean, std).contiguous(), labels)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=options.batch // dist.get_world_size(), sampler=sampler)
    model = DistributedDataParallel(network(options.model, images))
    steps = optimizer(options.optimizer, model)
    clock, done = Clock(options.warmup, options.steps), False
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for batch, targets in loader:
            steps.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            steps.step()
            done = clock.step()
            if done:
                break
        if done:
            break
    if dist.get_rank() == 0:
        clock.report(world_size=dist.get_world_size(), threads=torch.get_num_threads())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
