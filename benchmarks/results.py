"""The results that the configs promise: each is trained to its end, with several seeds where wanted.

    python benchmarks/results.py --data ROOT [--configs cnn_mnist lenet5_mnist ...] [--runs 3] [--at-once 4]
        [--procs 1] [KEY=VALUE ...]

A run is `disttrain run CONFIG` on one GPU, or with --procs on that many CPU processes; the seeds are 0, 1
and so on. With --at-once several run side by side, which says nothing of their speed. The accuracy is that
of the last evaluation and, behind it, the best; "to 75 %" is the epoch after which the training accuracy of
half an epoch was at least that (figure 1 of Krizhevsky et al. 2012). Below stands what the config expects.
"""

import json
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import REPOSITORY, disttrain, machine, parser, print_json_or, tell, variables

LONG = ("resnet18_cifar", "vgg16_cifar", "inception_small_cifar")
SHORT = ("cnn_mnist", "lenet5_mnist", "lenet_bn_cifar", "alexnet_cifar", "convnet4_relu", "convnet4_tanh")


def said(config: Path) -> str:
    """Returns the result that the comments of a config promise."""
    comments = " ".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))
    return comments.partition("Expected: ")[2]


def epochs_to(records: list[dict], accuracy: float) -> float | None:
    """Returns after how many epochs the training accuracy of half an epoch is as high, or None."""
    trained = [record for record in records if record["kind"] == "train"]
    window = max(1, sum(record["epoch"] == 1 for record in trained) // 2)
    per_epoch = max(record["samples"] for record in trained if record["epoch"] == 1)
    for i in range(window, len(trained) + 1):
        if statistics.fmean(record["accuracy"] for record in trained[i - window : i]) >= accuracy:
            return trained[i - 1]["samples"] / per_epoch
    return None


def median(values: list[float | None]) -> float | None:
    """Returns the median of the known values."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary(records: list[dict]) -> dict:
    """Returns the figures of one run."""
    accuracies = [record["accuracy"] for record in records if record["kind"] == "eval"]
    trained = [record for record in records if record["kind"] == "train"]
    late = trained[len(trained) // 2 :]
    used = [gpu["utilization_pct"] for record in late for gpu in record["gpus"]]
    return {
        "accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "epochs": records[-1]["epoch"],
        "epochs_to_75_pct": epochs_to(records, 0.75),
        "images_per_s": median([record["images_per_s"] for record in late]),
        "data_wait_pct": median([record["data_wait_pct"] for record in late]),
        "utilization_pct": median(used),
    }


def main() -> None:
    arguments = parser(__doc__, runs=1)
    arguments.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more config settings for every run"
    )
    arguments.add_argument("--configs", nargs="+", default=[*SHORT, *LONG], metavar="NAME")
    arguments.add_argument("--procs", type=int, help="CPU processes per run, instead of one GPU")
    arguments.add_argument("--at-once", type=int, default=1, help="runs side by side")
    options = arguments.parse_intermixed_args()
    files = {name: REPOSITORY / "configs" / f"{name}.yaml" for name in options.configs}
    if missing := [str(file) for file in files.values() if not file.exists()]:
        arguments.error(f"no such config: {', '.join(missing)}")
    env, place = (
        variables(options.data),
        ("--gpus", 1) if options.procs is None else ("--procs", options.procs),
    )

    with tempfile.TemporaryDirectory() as scratch:

        def result(name: str, seed: int) -> dict:
            run_dir = Path(scratch) / f"{name}-{seed}"
            settings = (*options.overrides, f"seed={seed}", "--run-dir", run_dir)
            command = disttrain("run", "-q", *place, files[name], *settings)
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
            found = summary([json.loads(line) for line in (run_dir / "metrics.jsonl").open()])
            tell(f"{name}, seed {seed}: {100 * found['accuracy']:.2f} %")
            return found

        with ThreadPoolExecutor(options.at_once) as pool:
            runs = {name: [pool.submit(result, name, seed) for seed in range(options.runs)] for name in files}
            results = {name: [run.result() for run in of_seeds] for name, of_seeds in runs.items()}

    def table() -> None:
        for name, found in results.items():
            accuracies = [100 * one["accuracy"] for one in found]
            best = statistics.fmean(100 * one["best_accuracy"] for one in found)
            print(f"{name:<22} {statistics.fmean(accuracies):6.2f} %", end="")
            print(f" ({min(accuracies):.2f} to {max(accuracies):.2f}; best {best:.2f})", end="")
            for key, unit in (
                ("epochs", "epochs"),
                ("epochs_to_75_pct", "to 75 %"),
                ("images_per_s", "images/s"),
                ("data_wait_pct", "% wait"),
                ("utilization_pct", "% utilisation"),
            ):
                value = median([one[key] for one in found])
                print(f"  {'n/a' if value is None else f'{value:,.1f}'} {unit}", end="")
            print(f"\n{'':<22} expected: {said(files[name]) or 'not stated'}")

    where = f"{options.procs} CPU processes" if options.procs else gpu_name()
    facts = machine() | {"on": where, "at_once": options.at_once, "n": options.runs}
    print_json_or(table, options, facts, results=results)


def gpu_name() -> str:
    """Returns the name of the GPU that a run takes."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the default device"


if __name__ == "__main__":
    main()
