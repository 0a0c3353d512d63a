"""What `auto` costs and gains: images trained in a given wall time, beside the best fixed choice.

    python benchmarks/auto_choice.py --data ROOT [--models alexnet_cifar cnn_mnist] [--seconds 300]
        [--fixed fp32,true,false fp32,true,true ...] [--epochs 1000] [--runs 1]

`disttrain run --procs 1` with train.precision, train.channels_last and train.compile all `auto`, beside every
fixed choice of the last two in fp32 (channels_last or not, compiled or not) or those of --fixed. Each runs
for --seconds from the start of its process, so that start, measurements made for the choice and compilation
count; torch.compile begins with an empty cache every time. The images are those of the records of
metrics.jsonl around that moment, interpolated. --epochs is the length that the run believes it has. A model
takes runs x (choices + 1) x seconds: 25 minutes as it stands, which is why --runs is 1 unless it is given.
"""

import contextlib
import itertools
import json
import os
import statistics
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

KEYS = ("precision", "channels_last", "compile")
FIXED = [",".join(choice) for choice in itertools.product(("fp32",), *[("true", "false")] * 2)]
AUTO = "auto,auto,auto"


def main() -> None:
    arguments = parser(__doc__, runs=1)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=["alexnet_cifar", "cnn_mnist"])
    arguments.add_argument("--seconds", type=float, default=300)
    arguments.add_argument("--fixed", nargs="+", choices=FIXED, default=FIXED, metavar=",".join(KEYS))
    arguments.add_argument("--epochs", type=int, default=1000)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = arguments.parse_args()
    env = variables(options.data, options.threads)
    length = (f"train.epochs={options.epochs}", f"train.batch_size={options.batch}")
    chosen: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def images(model: str, choice: str, seconds: float) -> float:
            settings = [f"train.{key}={value}" for key, value in zip(KEYS, choice.split(","), strict=True)]
            command = disttrain("run", "-q", "--procs", 1, config(RECIPES[model].config), *length, *settings)
            run_dir = Path(scratch) / str(next(numbers))
            fresh = env | {"TORCHINDUCTOR_CACHE_DIR": str(run_dir.with_suffix(".inductor"))}
            before_s, before = 0.0, 0
            with contextlib.closing(records(command, run_dir, fresh)) as lines:
                for at, record in lines:
                    if choice == AUTO and model not in chosen:
                        choices = json.loads((run_dir / "env.json").read_text())["choices"]
                        chosen[model] = ", ".join(
                            f"{key} {text.partition(':')[0]}"
                            for key, text in choices.items()
                            if key != "cache"
                        )
                    if record["kind"] == "train" and at >= seconds:
                        return before + (record["samples"] - before) * (seconds - before_s) / (at - before_s)
                    if record["kind"] == "train":
                        before_s, before = at, record["samples"]
            raise SystemExit(f"{' '.join(command)} ended before {seconds} s; give more --epochs")

        measured = {}
        for model in options.models:
            images(model, FIXED[1], 0)  # until its first record: makes the decoded copy
            for choice in (*options.fixed, AUTO):
                measured[f"{model} {choice}"] = partial(images, model, choice, options.seconds)
        values = interleaved(measured, options.runs, warm_up=False)
    claims = []
    for model in options.models:
        best = max(
            (f"{model} {choice}" for choice in options.fixed), key=lambda n: statistics.median(values[n])
        )
        claims.append(
            Claim(f"{best.replace(' ', ': ')} is best", f"{model} {AUTO}", best, 1.05, ratio="peer/ours")
        )
    facts = {f"auto of {model}:": text for model, text in chosen.items()}
    report(
        *(options, values, claims),
        unit="images",
        digits=0,
        seconds=options.seconds,
        batch=options.batch,
        **facts,
    )


if __name__ == "__main__":
    main()
