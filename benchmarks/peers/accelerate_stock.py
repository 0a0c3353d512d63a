"""Peer: the loop of Accelerate's documentation over the packed shards, read with webdataset.

    torchrun --nproc-per-node 2 benchmarks/peers/accelerate_stock.py MODEL FOLDER [--batch 64] [--steps 200]

Model, optimizer and DataLoader go through `Accelerator.prepare`; the data set is an IterableDataset that
decodes with PIL and torchvision's transforms, so that the first process reads all of it and hands out the
batches, which is Accelerate's default. The shards are not split by process before that: no sample is lost.
--batch is the global batch; each process takes its share. fp32.
"""

import torch
import torch.nn.functional as F
import webdataset as wds
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchvision import transforms
from training import Clock, arguments, images_and_labels, network, optimizer


def main() -> None:
    options = arguments(__doc__).parse_args()
    accelerator = Accelerator(cpu=True)
    images, _, mean, std = images_and_labels(options.data)  # for the shape and the statistics only
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())])
    urls = [str(path) for path in sorted(options.data.glob("train-*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=100, nodesplitter=None)
        .shuffle(1000)
        .decode("pill" if images.shape[3] == 1 else "pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(transform)
    )
    loader = DataLoader(dataset, batch_size=options.batch // accelerator.num_processes)
    model = network(options.model, images)
    model, steps, loader = accelerator.prepare(model, optimizer(options.optimizer, model), loader)
    clock, done = Clock(options.warmup, options.steps), False
    while not done:
        for batch, targets in loader:
            steps.zero_grad()
            accelerator.backward(F.cross_entropy(model(batch), targets))
            steps.step()
            done = clock.step()
            if done:
                break
    if accelerator.is_main_process:
        clock.report(world_size=accelerator.num_processes, threads=torch.get_num_threads())
    accelerator.end_training()


if __name__ == "__main__":
    main()
