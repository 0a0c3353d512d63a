"""What a checkpoint takes from training, in steps.

    python benchmarks/checkpoint_cost.py --data ROOT [--models cnn_mnist lenet_bn alexnet_cifar resnet18]
        [--saves 10] [--every 50] [--batch 64] [--gpu]

For each model two runs of the same steps, one that saves after every --every steps and one that does not.
Both are followed from outside: their time is that between the arrivals of two records of metrics.jsonl which
are --saves x --every steps apart. The difference, by save, divided by the step time of the run without saves
is the result. Saves that overlap with training count by what they slow it down. Without --every they are
about a second apart on two CPU cores, so that none waits for the one before.
"""

import contextlib
import itertools
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

from common import (
    PLAIN,
    RECIPES,
    config,
    disttrain,
    interleaved,
    machine,
    parser,
    print_json_or,
    records,
    variables,
)

EVERY = {"cnn_mnist": 300, "lenet_bn": 100, "alexnet_cifar": 20, "resnet18": 4}
WANTED_STEPS = 1


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments.add_argument("--saves", type=int, default=10)
    arguments.add_argument("--every", type=int, help="steps from one save to the next")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--gpu", action="store_true", help="on one GPU instead of the CPU")
    options = arguments.parse_args()
    env = variables(options.data, options.threads)
    fixed = ("train.precision=fp32", "train.channels_last=true", "train.compile=false")
    place = ("--gpus" if options.gpu else "--procs", 1)
    every = {model: options.every or EVERY[model] for model in options.models}
    measured = {}
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def seconds(model: str, *more: str) -> float:
            settings = [*PLAIN, *fixed, f"train.batch_size={options.batch}", *more]
            settings.append(f"monitor.log_every_steps={every[model]}")
            command = disttrain("run", "-q", *place, config(RECIPES[model].config), *settings)
            run_dir = Path(scratch) / str(next(numbers))
            with contextlib.closing(records(command, run_dir, env)) as lines:
                came = (at for at, record in lines if record["step"] % every[model] == 0)
                return -next(came) + next(itertools.islice(came, options.saves - 1, None))

        for model in options.models:
            saving = f"checkpoint.every_steps={every[model]}"
            measured[f"{model} saving"] = partial(seconds, model, saving)
            measured[f"{model} without"] = partial(seconds, model)
        values = interleaved(measured, options.runs)
    rows = []
    for model in options.models:
        saving, without = (statistics.median(values[f"{model} {which}"]) for which in ("saving", "without"))
        step_s = without / (options.saves * every[model])
        cost_s = (saving - without) / options.saves
        row = {"model": model, "every_steps": every[model], "step_s": step_s, "save_s": cost_s}
        rows.append(row | {"save_steps": cost_s / step_s, "holds": cost_s <= WANTED_STEPS * step_s})
    facts = machine() | {"threads": options.threads, "batch": options.batch}
    facts |= {"saves": options.saves, "n": options.runs}

    def table() -> None:
        print(f"{'model':<14} {'step':>10} {'a save takes':>13} {'in steps':>9}  wanted")
        for row in rows:
            print(
                f"{row['model']:<14} {1000 * row['step_s']:7.2f} ms {1000 * row['save_s']:10.2f} ms", end=" "
            )
            print(f"{row['save_steps']:9.2f}  at most {WANTED_STEPS}", end="")
            print("" if row["holds"] else "  not reached")

    print_json_or(table, options, facts, values_s=values, checkpoints=rows)


if __name__ == "__main__":
    main()
