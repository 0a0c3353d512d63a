"""Step time of training: disttrain beside a hand-written loop, a replayed batch and Lightning.

    python benchmarks/step_time.py --data ROOT [--models cnn_mnist lenet_bn alexnet_cifar resnet18]
        [--steps 200] [--batch 64] [--precision fp32] [--replay] [--peers-env CACHE] [--gpu]

For each model the median of ten intervals of --steps / 10 steps, after a warm-up:

ours       `disttrain run` as a user starts it, from step_time_s of its metrics.jsonl: loading, augmentation,
           loss and accuracy, logging; then the run is asked to stop
hand       peers/hand_loop.py: the same network, fused optimizer, precision, memory order and batch over
           images in memory, nothing else
replayed   the same loop over one batch that was normalised before: no data path at all
ours/loop  with --replay, peers/ours_replay.py: disttrain's loop over one replayed batch
lightning  with --peers-env, peers/lightning_loop.py over normalised images in memory; CACHE keeps its
           environment, made on the first run

All are their own processes with the same number of threads; evaluation, checkpoints and start are in none.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import (
    PLAIN,
    RECIPES,
    Claim,
    config,
    disttrain,
    environment_with,
    interleaved,
    parser,
    peer,
    report,
    run_step_s,
    variables,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--warmup", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--replay", action="store_true", help="also our own loop over a replayed batch")
    arguments.add_argument("--peers-env", type=Path, help="cache folder for the environment of Lightning")
    arguments.add_argument("--gpu", action="store_true", help="on one GPU instead of the CPU")
    options = arguments.parse_args()
    env = variables(options.data, options.threads)
    device = "cuda" if options.gpu else "cpu"
    python = None
    if options.peers_env is not None:
        python = environment_with(options.peers_env / "lightning", "lightning")
    measured: dict[str, Callable[[], float]] = {}
    claims = []
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()
        for model in options.models:
            recipe = RECIPES[model]
            settings = [
                *(config(recipe.config), *PLAIN, f"train.batch_size={options.batch}"),
                *(f"train.precision={options.precision}", "train.channels_last=true", "train.compile=false"),
                f"monitor.log_every_steps={max(1, options.steps // 10)}",
            ]
            length = ("--warmup", options.warmup, "--steps", options.steps, "--device", device)
            same = [
                *(model, options.data / recipe.data, "--optimizer", recipe.optimizer, *length),
                *("--batch", options.batch, "--precision", options.precision, "--channels-last"),
            ]

            def ours(settings: list) -> float:
                command = disttrain("run", "-q", "--gpus" if options.gpu else "--procs", 1, *settings)
                run_dir = Path(scratch) / str(next(numbers))
                return run_step_s(command, run_dir, env, options.warmup, options.steps)

            def loop(script: str, *words: object, **start: object) -> float:
                return peer(script, *words, env=env, **start)["step_time_s"]

            measured[f"{model} ours"] = partial(ours, settings)
            measured[f"{model} hand"] = partial(loop, "hand_loop.py", *same)
            measured[f"{model} replayed"] = partial(loop, "hand_loop.py", *same, "--replay")
            claims += [
                Claim(f"{model}: hand-written loop", f"{model} ours", f"{model} hand", 1.03),
                Claim(f"{model}: replayed batch", f"{model} ours", f"{model} replayed", 1.05),
            ]
            if options.replay:
                measured[f"{model} ours/loop"] = partial(loop, "ours_replay.py", *settings, *length)
                claims.append(
                    Claim(f"{model}: ours, replayed batch", f"{model} ours", f"{model} ours/loop", 1.05)
                )
            if python is not None:
                measured[f"{model} lightning"] = partial(loop, "lightning_loop.py", *same, start=[python])
                claims.append(Claim(f"{model}: Lightning", f"{model} ours", f"{model} lightning", 1))
        values = interleaved(measured, options.runs)
    facts = {"threads": options.threads, "batch": options.batch, "precision": options.precision}
    report(options, values, claims, unit="ms", digits=3, **facts)


if __name__ == "__main__":
    main()
