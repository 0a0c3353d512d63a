"""94 % on CIFAR-10 on one GPU: disttrain beside airbench94. It needs a GPU, and exits with 2 without one.

    python benchmarks/speedrun.py --data ROOT --peers-env CACHE [--config configs/speedrun_cifar.yaml]
        [KEY=VALUE ...]

warm  both in turns in one process, after a round that does not count: peers/speedruns.py
cold  each in a new process for every round. Ours is `disttrain run --gpus 1 CONFIG`: the seconds from the
      beginning of the first interval of metrics.jsonl to the arrival of the last train record, looked at
      every 2 ms. airbench's are those of its own clock: peers/airbench94.py

Start, decoding and evaluations are in none of them. Both train on the same packed images; the mean of the
final accuracies, each with its own test-time augmentation, stands beside the times. CACHE keeps the
environment of airbench, made on the first run, with the same torch.
"""

import contextlib
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

from common import (
    REPOSITORY,
    Claim,
    disttrain,
    environment_with,
    eval_accuracy,
    interleaved,
    parser,
    peer,
    records,
    report,
    variables,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more config settings for our run"
    )
    arguments.add_argument("--config", type=Path, default=REPOSITORY / "configs/speedrun_cifar.yaml")
    arguments.add_argument("--peers-env", type=Path, required=True, help="cache folder for airbench")
    options = arguments.parse_intermixed_args()
    import torch

    if not torch.cuda.is_available():
        print("speedrun.py needs a GPU; torch finds none on this machine", file=sys.stderr)
        raise SystemExit(2)
    if not options.config.exists():
        arguments.error(f"{options.config}: no such config")
    env = variables(options.data)
    python = environment_with(options.peers_env / "airbench", "airbench")
    data = options.data / "cifar10"
    rounds = ("--rounds", options.runs)
    warm = peer("speedruns.py", options.config, data, *options.overrides, *rounds, env=env, start=[python])
    accuracies: dict[str, list[float]] = {"ours, cold": [], "airbench94, cold": []}
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def ours() -> float:
            run_dir = Path(scratch) / str(next(numbers))
            command = disttrain("run", "-q", "--gpus", 1, options.config, *options.overrides)
            with contextlib.closing(records(command, run_dir, env)) as found:
                trained = [(at, record) for at, record in found if record["kind"] == "train"]
            accuracies["ours, cold"].append(eval_accuracy(run_dir))
            (first_at, first), (last_at, _) = trained[0], trained[-1]
            return last_at - first_at + first["step"] * first["step_time_s"]

        def airbench() -> float:
            found = peer("airbench94.py", data, env=env, start=[python])
            accuracies["airbench94, cold"].append(found["accuracy"])
            return found["seconds"]

        values = interleaved({"ours, cold": ours, "airbench94, cold": airbench}, options.runs, warm_up=False)
    for name in ("ours", "airbench94"):
        values[f"{name}, warm"] = warm[name]["seconds"]
        accuracies[f"{name}, warm"] = warm[name]["accuracy"]
    claims = [
        Claim("airbench94, both warm", "ours, warm", "airbench94, warm", 0.7),
        Claim("airbench94, both cold", "ours, cold", "airbench94, cold", 1),
    ]
    means = {f"accuracy {name}": f"{100 * statistics.mean(all_):.2f} %" for name, all_ in accuracies.items()}
    report(options, values, claims, unit="s", gpu=torch.cuda.get_device_name(), **means)


if __name__ == "__main__":
    main()
