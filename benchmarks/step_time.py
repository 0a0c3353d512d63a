"""Step time of training: disttrain beside a hand-written loop, a replayed batch and Lightning.

    python benchmarks/step_time.py --data ROOT [--models cnn_mnist lenet_bn alexnet_cifar resnet18]
        [--runs 15] [--steps 40] [--batch 64] [--precision fp32] [--threads 2] [--peers-env CACHE] [--gpu]

For each model one process takes --steps steps with every loop, --runs times: our loop, the shortest
one would write by hand, each also over one replayed batch, ours with the dashboard, without any observer, on
a GPU without its CUDA graph, and with checkpoints; and Lightning with --peers-env, where CACHE keeps its
environment, made on the first run. See peers/step_loops.py.

A claim is the median over the rounds of the ratio within a round, with its
quartiles; that of the hand-written loop with itself is the noise of the machine.
"""

import os
import statistics
from pathlib import Path
from typing import NamedTuple

from common import PLAIN, RECIPES, config, environment_with, machine, parser, peer, print_json_or, variables


class Claim(NamedTuple):
    """A claim about a round: ours / theirs is at most the bound, if any."""

    what: str
    ours: str
    theirs: str
    at_most: float | None = None


CLAIMS = (
    Claim("the hand-written loop with itself", "again", "hand"),
    Claim("a hand-written loop", "ours", "hand", 1.03),
    Claim("without a CUDA graph", "ours", "ungraphed", 1.0),
    Claim("real samples / one batch replayed", "ours", "ours_replayed", 1.05),
    Claim("Lightning", "ours", "lightning", 1.0),
    Claim("dashboard, metrics / nothing", "watched", "blind", 1.01),
)
SAVING = "a checkpoint, in steps"


def measured(options, model: str, python: Path | None) -> dict:
    """Returns the seconds of a step in every round, by loop, and the number of checkpoints in a round."""
    recipe = RECIPES[model]
    settings = [*PLAIN, f"train.batch_size={options.batch}", f"train.precision={options.precision}"]
    words = [config(recipe.config), *settings, "--rounds", options.runs, "--steps", options.steps]
    start = {} if python is None else {"start": [python]}
    env = variables(options.data, options.threads, **({} if options.gpu else {"CUDA_VISIBLE_DEVICES": ""}))
    return peer("step_loops.py", *words, *(["--lightning"] * (python is not None)), env=env, **start)


def claims(seconds: dict[str, list[float]], steps: int, saves: int) -> list[dict]:
    """Returns the claims with their values."""
    results = []

    def add(what: str, values: list[float], at_most: float | None) -> None:
        low, median, high = statistics.quantiles(values, n=4)
        results.append({"what": what, "value": median, "low": low, "high": high, "at_most": at_most})

    for claim in CLAIMS:
        if claim.theirs in seconds:
            pairs = zip(seconds[claim.ours], seconds[claim.theirs], strict=True)
            add(claim.what, [ours / theirs for ours, theirs in pairs], claim.at_most)
    pairs = zip(seconds["saving"], seconds["ours"], strict=True)
    add(SAVING, [(with_ / without - 1) * steps / saves for with_, without in pairs], 1.0)
    return results


def main() -> None:
    arguments = parser(__doc__, runs=15)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments.add_argument("--steps", type=int, default=40, help="steps per round")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--peers-env", type=Path, help="cache folder for the environment of Lightning")
    arguments.add_argument("--gpu", action="store_true", help="use one GPU instead of the CPU")
    options = arguments.parse_args()
    if options.steps < 2 or options.runs < 2:
        arguments.error("a round has two steps at least, and there are two rounds at least")
    python = None
    if options.peers_env is not None:
        python = environment_with(options.peers_env / "lightning", "lightning")
    found, results = {}, {}
    for model in options.models:
        values = measured(options, model, python)
        found[model] = values["seconds"]
        results[model] = claims(values["seconds"], options.steps, values["saves"])
    keys = ("threads", "batch", "precision", "steps")
    facts = machine() | {key: getattr(options, key) for key in keys} | {"n": options.runs}

    def table() -> None:
        for model, seconds in found.items():
            times = (f"{name} {1e3 * statistics.median(values):.3f}" for name, values in seconds.items())
            print(f"{model}, ms a step: {', '.join(times)}")
            for claim in results[model]:
                bound, value = claim["at_most"], claim["value"]
                wanted = "" if bound is None else f"  at most {bound:g}"
                missed = "" if bound is None or value <= bound else "  not reached"
                quartiles = f"({claim['low']:.3f} to {claim['high']:.3f})"
                print(f"  {claim['what']:<36} {value:6.3f} {quartiles:<18}{wanted}{missed}")

    print_json_or(table, options, facts, seconds=found, claims=results)


if __name__ == "__main__":
    main()
