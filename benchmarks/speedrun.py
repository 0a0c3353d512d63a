"""94 % on CIFAR-10 on one GPU: disttrain beside airbench94. It needs a GPU, and exits with 2 without one.

    python benchmarks/speedrun.py --data ROOT --peers-env CACHE [--config configs/speedrun_cifar.yaml]
        [KEY=VALUE ...]

ours  `disttrain run --gpus 1 CONFIG`: the seconds from the beginning of the first interval of metrics.jsonl
      to the arrival of the last train record, looked at every 2 ms. Start, decoding and the last evaluation
      are not in it; compilation in the first step and evaluations before the last one are. Every run is a new
      process, so it is cold.
cold  peers/airbench94.py: training of the first run in a new process, by airbench's own clock, without its
      evaluations
warm  its second run in the same process, as its authors count

Both train on the same packed images; the mean of the final accuracies, each with its own test-time
augmentation, stands beside the times. CACHE keeps the environment of airbench, made on the first run, with
the same torch.
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
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of our run")
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
    accuracies: dict[str, list[float]] = {"ours": [], "cold": [], "warm": []}
    lines: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def ours() -> float:
            run_dir = Path(scratch) / str(next(numbers))
            command = disttrain("run", "-q", "--gpus", 1, options.config, *options.overrides)
            with contextlib.closing(records(command, run_dir, env)) as found:
                trained = [(at, record) for at, record in found if record["kind"] == "train"]
            accuracies["ours"].append(eval_accuracy(run_dir))
            (first_at, first), (last_at, _) = trained[0], trained[-1]
            return last_at - first_at + first["step"] * first["step_time_s"]

        def cold() -> float:
            lines.update(peer("airbench94.py", options.data / "cifar10", env=env, start=[python]))
            accuracies["cold"].append(lines["cold"]["accuracy"])
            return lines["cold"]["seconds"]

        def warm() -> float:  # of the same process as the cold one before it
            accuracies["warm"].append(lines["warm"]["accuracy"])
            return lines["warm"]["seconds"]

        values = interleaved({"ours": ours, "cold": cold, "warm": warm}, options.runs)
    claims = [Claim("airbench94, cold", "ours", "cold", 1), Claim("airbench94, warm", "ours", "warm", 1)]
    means = {
        f"accuracy {name}": f"{100 * statistics.mean(all_[1:]):.2f} %" for name, all_ in accuracies.items()
    }
    report(options, values, claims, unit="s", gpu=torch.cuda.get_device_name(), **means)


if __name__ == "__main__":
    main()
