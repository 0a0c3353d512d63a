"""Whole-process time of cnn_mnist: disttrain beside the script most people write.

    python benchmarks/usual_script.py --data ROOT [--epochs 2] [--runs 5] [--faster KEY=VALUE ...]

Both train the same model with the same optimizer for the same epochs and evaluate after each; the time is
that of the whole process, from start to exit. The peer is peers/usual_mnist.py, on MNIST's original files,
with a batch of 64. --faster adds disttrain with other settings, for example train.batch_size=512
optim.lr=0.006 train.precision=bf16. The final accuracies stand beside the times: settings count only where
they keep the accuracy.
"""

import itertools
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from common import (
    Claim,
    config,
    disttrain,
    eval_accuracy,
    interleaved,
    parser,
    peer,
    report,
    variables,
    write_mnist,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--faster", nargs="+", metavar="KEY=VALUE", help="disttrain with these, too")
    options = arguments.parse_args()
    env = variables(options.data)
    accuracies: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_mnist(options.data, Path(scratch))
        numbers = itertools.count()

        def usual(name: str) -> float:
            began = time.perf_counter()
            line = peer("usual_mnist.py", scratch, "--epochs", options.epochs, env=env)
            seconds = time.perf_counter() - began
            accuracies.setdefault(name, []).append(line["accuracy"])
            return seconds

        def ours(name: str, *settings: str) -> float:
            run_dir = Path(scratch) / str(next(numbers))
            epochs = f"train.epochs={options.epochs}"
            constant = "schedule.name=constant"  # as the usual script has it
            command = disttrain("run", "--procs", 1, config("cnn_mnist"), epochs, constant, *settings)
            began = time.perf_counter()
            subprocess.run([*command, "--run-dir", run_dir], env=env, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
            accuracies.setdefault(name, []).append(eval_accuracy(run_dir))
            return seconds

        measured = {"usual": partial(usual, "usual"), "ours": partial(ours, "ours")}
        claims = [Claim("batch 64", "ours", "usual", 2.5, "at least", "peer/ours")]
        if options.faster:
            name = "ours, faster"
            measured[name] = partial(ours, name, *options.faster)
            claims.append(Claim(" ".join(options.faster), name, "usual", 6, "at least", "peer/ours"))
        values = interleaved(measured, options.runs)
    reached = {
        f"accuracy {name}": f"{100 * statistics.median(found):.2f} %" for name, found in accuracies.items()
    }
    report(options, values, claims, unit="s", epochs=options.epochs, **reached)


if __name__ == "__main__":
    main()
