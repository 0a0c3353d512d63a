"""What the dashboard and the metrics cost.

    python benchmarks/monitoring.py --data ROOT [--models cnn_mnist] [--epochs 3] [--batch 64] [KEY=VALUE ...]

`disttrain run` on a pseudo-terminal, with its live dashboard and a line of metrics every 20 steps, beside the
same run with -q and a line of metrics at the end of each epoch only. Both are followed from outside: the time
is that from the arrival of the first evaluation in metrics.jsonl to that of the one --epochs epochs later, so
start and the first epoch are in neither, while evaluation and checkpoints are in both.
"""

import contextlib
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

from common import (
    RECIPES,
    Claim,
    config,
    disttrain,
    interleaved,
    parser,
    records,
    report,
    variables,
)

NORMAL = ("monitor.log_every_steps=20",)
LITTLE = ("-q", "monitor.log_every_steps=1000000000")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of both runs")
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=["cnn_mnist"])
    arguments.add_argument("--epochs", type=int, default=3, help="that count, after the first one")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--gpu", action="store_true", help="on one GPU instead of the CPU")
    options = arguments.parse_intermixed_args()
    env = variables(options.data, options.threads)
    fixed = ("train.precision=fp32", "train.channels_last=true", "train.compile=false")
    place = ("--gpus" if options.gpu else "--procs", 1)
    measured, claims = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def seconds(settings: list[object], terminal: bool) -> float:
            command = disttrain("run", *place, *settings, *options.overrides)
            run_dir = Path(scratch) / str(next(numbers))
            with contextlib.closing(records(command, run_dir, env, terminal=terminal)) as lines:
                came = (at for at, record in lines if record["kind"] == "eval")
                return -next(came) + next(itertools.islice(came, options.epochs - 1, None))

        for model in options.models:
            size = (f"train.epochs={options.epochs + 2}", f"train.batch_size={options.batch}")
            same = [config(RECIPES[model].config), *fixed, *size]
            measured[f"{model} dashboard"] = partial(seconds, [*same, *NORMAL], True)
            measured[f"{model} quiet"] = partial(seconds, [*same, *LITTLE], False)
            claims.append(
                Claim(f"{model}: dashboard and metrics", f"{model} dashboard", f"{model} quiet", 1.01)
            )
        values = interleaved(measured, options.runs)
    report(options, values, claims, unit="s", epochs=options.epochs, batch=options.batch)


if __name__ == "__main__":
    main()
