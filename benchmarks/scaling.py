"""The model of scaling_model.py beside measurements: steps, all-reduces on 1, 2 and 4 processes.

    python benchmarks/scaling.py [--models cnn_mnist alexnet_cifar] [--processes 2 4] [--batch 64] [--runs 5]

Processes of one thread each on gloo, fp32, one bucket of gradients, random images. Latency and bandwidth are
fitted to all-reduces of 4 bytes and of 32 MiB on two processes. For each network:

compute   a step without communication (no_sync), while the other processes take theirs
measured  a step with it
model     scaling.step_s of that compute and the fitted link
alone     scaling.step_s of what one process alone needs for its share of the batch

With more processes than cores, compute is what remains of a core; only compute -> measured tests the model.
Every rank runs this file; the medians are over the steps of all rounds, the slowest rank counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import scaling_model as scaling
from common import machine, print_json_or, torchrun

SHAPES = {
    "cnn_mnist": (1, 28, 28),
    "lenet_bn": (3, 32, 32),
    "alexnet_cifar": (3, 32, 32),
    "resnet18": (3, 32, 32),
}
SMALL_BYTES, LARGE_BYTES = 4, 32 * 2**20
STEPS = 4  # of each kind in a round


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--models", nargs="+", choices=SHAPES, default=["cnn_mnist", "alexnet_cifar"])
    arguments.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    arguments.add_argument("--batch", type=int, default=64, help="global batch")
    arguments.add_argument("--runs", type=int, default=5, help="rounds after the warm-up (default 5)")
    arguments.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    options = arguments.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    found = {n: start(n, options) for n in sorted({1, 2, *options.processes})}
    small, large = (found[2]["all_reduce_s"][str(size)] for size in (SMALL_BYTES, LARGE_BYTES))
    link = scaling.Link(small / 2, LARGE_BYTES / (large - small))
    steps = [
        compare(name, n, options.batch, found, scaling.Ranks(1, n, link, link))
        for name in options.models
        for n in options.processes
    ]
    rings = [
        {"processes": n, "bytes": int(size), "measured_s": measured}
        | {"model_s": scaling.all_reduce_s(int(size), scaling.Ranks(1, n, link, link))}
        for n in options.processes
        for size, measured in found[n]["all_reduce_s"].items()
    ]

    def tables() -> None:
        print(f"link: {1e6 * link.latency_s:.0f} us, {link.bytes_per_s / 1e9:.2f} GB/s\n")
        print(f"{'processes':>9} {'all-reduce of':>15} {'measured':>12} {'model':>12}")
        for ring in rings:
            print(f"{ring['processes']:>9} {ring['bytes']:>13,} B", end=" ")
            print(f"{1000 * ring['measured_s']:>9.3f} ms {1000 * ring['model_s']:>9.3f} ms")
        print(f"\n{'model':<14} {'processes':>9}", end=" ")
        print(*(f"{word:>12}" for word in ("compute", "measured", "model", "error", "alone", "error")))
        for step in steps:
            print(f"{step['name']:<14} {step['processes']:>9}", end=" ")
            times = (
                f"{1000 * step[key]:>9.2f} ms" for key in ("compute_s", "measured_s", "model_s", "alone_s")
            )
            errors = (
                f"{100 * (step[key] / step['measured_s'] - 1):>+10.0f} %" for key in ("model_s", "alone_s")
            )
            compute, measured, model, alone = times
            print(compute, measured, model, next(errors), alone, next(errors))

    facts = machine() | {"load": round(os.getloadavg()[0], 1), "batch": options.batch, "n": options.runs}
    print_json_or(tables, options, facts, link=link._asdict(), all_reduces=rings, steps=steps)


def compare(name: str, processes: int, batch: int, found: dict, ranks: scaling.Ranks) -> dict:
    """Returns the measured and the modelled step time of a network, in seconds."""
    here, size = found[processes]["steps"][name], found[processes]["gradient_bytes"][name]
    compute = found[1]["shares"][name][str(batch // processes)]
    return {
        "name": name,
        "processes": processes,
        "compute_s": here["compute_s"],
        "measured_s": here["step_s"],
        "model_s": scaling.step_s(here["compute_s"], size, size, ranks),
        "alone_s": scaling.step_s(compute, size, size, ranks),
    }


def start(processes: int, options: argparse.Namespace) -> dict:
    """Measures with this number of processes."""
    words = ["--models", *options.models, "--batch", str(options.batch), "--runs", str(options.runs)]
    words += ["--processes", *map(str, options.processes)]
    result = subprocess.run(
        [*torchrun(processes), __file__, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    """Takes the measurements of one group of processes; rank 0 prints them. Every rank calls this."""
    import torch
    from torch import distributed
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    from disttrain.models import build_model

    distributed.init_process_group("gloo")
    world = distributed.get_world_size()

    def slowest(work: Callable[[], None]) -> float:
        distributed.barrier()
        began = time.perf_counter()
        for _ in range(STEPS):
            work()
        took = torch.tensor((time.perf_counter() - began) / STEPS, dtype=torch.float64)
        distributed.all_reduce(took, op=distributed.ReduceOp.MAX)
        return took.item()

    rings = {}
    for size in (SMALL_BYTES, 2**16, 2**20, LARGE_BYTES) if world > 1 else ():
        tensor = torch.zeros(size // 4)
        rings[size] = median(
            lambda tensor=tensor: slowest(lambda: distributed.all_reduce(tensor)), options.runs
        )

    steps, sizes, shares = {}, {}, {}
    for name in options.models:
        channels, height, width = SHAPES[name]
        torch.manual_seed(0)
        bare = build_model(name, num_classes=10, in_channels=channels, image_size=(height, width), args={})
        sizes[name] = 4 * sum(parameter.numel() for parameter in bare.parameters())
        model = bare if world == 1 else DistributedDataParallel(bare, bucket_cap_mb=sizes[name] / 2**20 + 1)
        optimizer = torch.optim.SGD(bare.parameters(), lr=1e-4, momentum=0.9)
        images = torch.rand(options.batch // world, channels, height, width)
        labels = torch.randint(10, (options.batch // world,))

        def step(count: int, model=model, optimizer=optimizer, images=images, labels=labels) -> None:
            cross_entropy(model(images[:count]), labels[:count]).backward()
            optimizer.step()
            optimizer.zero_grad()

        own = len(images)
        if world == 1:
            counts = {options.batch // n for n in options.processes}
            shares[name] = {n: median(lambda n=n: slowest(lambda: step(n)), options.runs) for n in counts}
            continue

        loud = partial(step, own)

        def silent(model=model, loud=loud) -> None:
            with model.no_sync():
                loud()

        pairs = [(slowest(silent), slowest(loud)) for _ in range(options.runs + 1)][1:]
        compute, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
        steps[name] = {"compute_s": compute, "step_s": whole}
    if distributed.get_rank() == 0:
        print(json.dumps({"all_reduce_s": rings, "steps": steps, "gradient_bytes": sizes, "shares": shares}))
    distributed.destroy_process_group()


def median(value: Callable[[], float], runs: int) -> float:
    """Returns the median of this number of values, after one warm-up value."""
    return statistics.median([value() for _ in range(runs + 1)][1:])


if __name__ == "__main__":
    main()
