"""How many images each recipe for CIFAR-10 takes to an accuracy: the speedrun beside the other configs.

    python benchmarks/images_to_accuracy.py --data ROOT [KEY=VALUE ...] [--accuracy 0.8] [--epochs 3]
        [--threads 2] [--configs resnet18_cifar ...] [--images 100000]

configs/speedrun_cifar.yaml is trained for --epochs epochs, the length that its schedule is then made for,
until an evaluation reaches the accuracy. Every other config for CIFAR-10, or those of --configs, keeps its
own length and is stopped when an evaluation has reached it too, or when it has seen as many images without.
An evaluation follows every epoch. KEY=VALUE applies to all of them. The slow ones can be measured one by one:
--images leaves the speedrun out and gives the others as many as it took.
"""

import contextlib
import itertools
import os
import tempfile
from pathlib import Path

from common import config, disttrain, machine, parser, print_json_or, records, tell, variables

from disttrain import load_config

OURS = "speedrun_cifar"


def others() -> list[str]:
    """Returns the names of the other configs that train on CIFAR-10."""
    named = sorted(path.stem for path in config(OURS).parent.glob("*.yaml"))
    return [name for name in named if name != OURS and load_config(config(name)).data.name == "cifar10"]


def main() -> None:
    arguments = parser(__doc__, runs=1)
    arguments.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more config settings for every run"
    )
    arguments.add_argument("--accuracy", type=float, default=0.8)
    arguments.add_argument("--configs", nargs="+", choices=others(), default=others(), metavar="NAME")
    arguments.add_argument("--epochs", type=int, default=3, help="epochs of the speedrun")
    arguments.add_argument(
        "--images", type=int, help="images that an earlier speedrun needed; skips the speedrun"
    )
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = arguments.parse_intermixed_args()
    env = variables(options.data, options.threads)
    often = ("eval.every_epochs=1", "checkpoint.every_epochs=1000")

    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def measure(name: str, seed: int, most: float, *settings: str) -> dict:
            """Trains until the accuracy or `most` images; returns both as they were then."""
            settings = (*often, *settings, *options.overrides, f"seed={seed}")
            command = disttrain("run", "-q", "--procs", 1, config(name), *settings)
            batch_size = load_config(config(name), options.overrides).train.batch_size
            images, best = 0, 0.0
            with contextlib.closing(records(command, Path(scratch) / str(next(numbers)), env)) as lines:
                for _, record in lines:
                    if record["kind"] == "eval":
                        images, best = record["step"] * batch_size, max(best, record["accuracy"])
                        if best >= options.accuracy or images >= most:
                            break
            tell(f"{name}: {best:.2%} after {images:,} images")
            return {"config": name, "seed": seed, "images": images, "best": best}

        rows = []
        for seed in range(options.runs):
            most = options.images
            if most is None:
                rows.append(ours := measure(OURS, seed, float("inf"), f"train.epochs={options.epochs}"))
                if ours["best"] < options.accuracy:
                    raise SystemExit(f"{OURS} has {ours['best']:.2%} after {options.epochs} epochs")
                most = ours["images"]
            rows += [measure(name, seed, most) for name in options.configs]

    def table() -> None:
        print(f"{'config':<24} {'seed':>4} {'images':>9} {'accuracy':>9}")
        for row in rows:
            print(f"{row['config']:<24} {row['seed']:>4} {row['images']:>9,} {row['best']:>9.2%}", end="")
            print("" if row["best"] >= options.accuracy else "  not reached")

    print_json_or(table, options, machine() | {"accuracy": options.accuracy}, runs=rows)


if __name__ == "__main__":
    main()
