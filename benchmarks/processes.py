"""Images per second of two CPU processes: disttrain beside one process, torchrun DDP and Accelerate.

    python benchmarks/processes.py --data ROOT [--models cnn_mnist alexnet_cifar] [--steps 200] [--batch 64]

Two processes of one thread each on gloo, the same global batch everywhere, fp32, without compilation:

two         `disttrain run --procs 2`, from step_time_s of its metrics.jsonl after a warm-up
one         `disttrain run --procs 1` with two threads
ddp         peers/torchrun_ddp.py: DistributedSampler, DataLoader over normalized images in memory, DDP
accelerate  peers/accelerate_stock.py: everything through Accelerator.prepare, the shards through webdataset

Each is the global batch divided by the median step time of ten intervals; start, evaluation and checkpoints
are in none. disttrain keeps channels_last as --channels-last says; the peers do not use it.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path

from common import (
    PLAIN,
    RECIPES,
    Claim,
    config,
    disttrain,
    interleaved,
    parser,
    peer,
    report,
    run_step_s,
    torchrun,
    variables,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=["cnn_mnist", "alexnet_cifar"])
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--warmup", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=64, help="global batch")
    arguments.add_argument("--channels-last", choices=("true", "false", "auto"), default="true")
    names = ("one", "ddp", "accelerate")
    arguments.add_argument(
        "--skip", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names)
    )
    options = arguments.parse_args()
    one_thread, two_threads = (variables(options.data, threads) for threads in (1, 2))
    measured, claims = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def ours(settings: list[object], processes: int, env: dict[str, str]) -> float:
            command = disttrain("run", "-q", "--procs", processes, *settings)
            run_dir = Path(scratch) / str(next(numbers))
            return options.batch / run_step_s(command, run_dir, env, options.warmup, options.steps)

        def theirs(script: str, words: list[object]) -> float:
            line = peer(script, *words, env=one_thread, start=torchrun(2))
            return options.batch / line["step_time_s"]

        for model in options.models:
            recipe = RECIPES[model]
            settings = [
                *(config(recipe.config), *PLAIN, f"train.batch_size={options.batch}", "train.precision=fp32"),
                *(f"train.channels_last={options.channels_last}", "train.compile=false"),
                f"monitor.log_every_steps={max(1, options.steps // 10)}",
            ]
            words = [
                *(model, options.data / recipe.data, "--optimizer", recipe.optimizer),
                *("--batch", options.batch, "--warmup", options.warmup, "--steps", options.steps),
            ]
            measured[f"{model} two"] = partial(ours, settings, 2, one_thread)
            for name, run, bound in (
                ("one", partial(ours, settings, 1, two_threads), 0.95),
                ("ddp", partial(theirs, "torchrun_ddp.py", words), 1),
                ("accelerate", partial(theirs, "accelerate_stock.py", words), 1.3),
            ):
                if name not in options.skip:
                    measured[f"{model} {name}"] = run
                    pair = (f"{model} two", f"{model} {name}")
                    claims.append(Claim(f"{model}: {name}", *pair, bound, wanted="at least"))
        values = interleaved(measured, options.runs)
    report(options, values, claims, unit="images/s", digits=0, batch=options.batch)


if __name__ == "__main__":
    main()
