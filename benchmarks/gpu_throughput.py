"""Images per second and utilisation of one GPU in steady state. It needs a GPU, and exits with 2 without one.

    python benchmarks/gpu_throughput.py --data ROOT [--config configs/alexnet_cifar.yaml] [--batch 512 2048]
        [--warmup 10] [--seconds 20] [--runs 3] [KEY=VALUE ...]

`disttrain run --gpus 1 CONFIG` with each global batch, from --warmup to --warmup + --seconds after its first
record. Images per second are those between the first and the last record of that time, log points
included; the utilisation is NVML's, the mean over the records of that time. Each run is a new process.
"""

import contextlib
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common import REPOSITORY, disttrain, interleaved, machine, parser, print_json_or, records, variables

IMAGES_PER_S, UTILIZATION_PCT = 200_000, 95


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more config settings for the runs"
    )
    arguments.add_argument("--config", type=Path, default=REPOSITORY / "configs/alexnet_cifar.yaml")
    arguments.add_argument("--batch", type=int, nargs="+", default=[512, 2048])
    arguments.add_argument("--warmup", type=float, default=10, help="warm-up seconds after the first record")
    arguments.add_argument("--seconds", type=float, default=20, help="measured seconds after the warm-up")
    options = arguments.parse_intermixed_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu_throughput.py needs a GPU; torch finds none on this machine", file=sys.stderr)
        raise SystemExit(2)
    gpu, env = torch.cuda.get_device_name(), variables(options.data)
    utilization_pct: dict[str, list[float]] = {f"batch {batch}": [] for batch in options.batch}
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def images_per_s(batch: int) -> float:
            long = ("train.epochs=100000", "eval.every_epochs=100000", "checkpoint.every_epochs=100000")
            settings = (f"train.batch_size={batch}", *long, *options.overrides)
            command = disttrain("run", "-q", "--gpus", 1, options.config, *settings)
            with contextlib.closing(records(command, Path(scratch) / str(next(numbers)), env)) as lines:
                rate, busy_pct = steady(lines, options.warmup, options.seconds)
            utilization_pct[f"batch {batch}"].append(busy_pct)
            return rate

        measurements = {f"batch {batch}": partial(images_per_s, batch) for batch in options.batch}
        values = interleaved(measurements, options.runs, warm_up=False)

    def table() -> None:
        for name, rates in values.items():
            rate, busy = statistics.median(rates), statistics.median(utilization_pct[name])
            spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
            print(f"{name:<12} {rate:10,.0f} images/s {spread}  wanted {IMAGES_PER_S:,}", end="")
            print("" if rate > IMAGES_PER_S else "  not reached")
            print(f"{'':<12} {busy:10.1f} % utilisation  wanted {UTILIZATION_PCT} %", end="")
            print("" if busy > UTILIZATION_PCT else "  not reached")

    facts = machine() | {"gpu": gpu, "config": options.config.stem, "n": options.runs}
    print_json_or(table, options, facts, images_per_s=values, utilization_pct=utilization_pct)


def steady(lines: Iterator[tuple[float, dict]], warmup: float, seconds: float) -> tuple[float, float]:
    """Returns images per second and the mean utilisation in percent of a stretch of a run.

    Args:
        lines: the records of metrics.jsonl, with the seconds at which they came.
        warmup: seconds after the first record at which the stretch begins.
        seconds: that it lasts.
    """
    first_s: float | None = None
    chosen: list[tuple[float, dict]] = []
    for at, record in lines:
        first_s = at if first_s is None else first_s
        if at >= first_s + warmup:
            chosen.append((at, record))
        if at >= first_s + warmup + seconds:
            break
    if len(chosen) < 2:
        raise SystemExit("fewer than two log points in the time that is measured; give more --seconds")
    (began, first), *_, (ended, last) = chosen
    busy = [row["utilization_pct"] for _, record in chosen[1:] for row in record["gpus"]]
    known = [value for value in busy if value is not None]
    if not known:
        raise SystemExit("the utilisation is not known: see disttrain doctor")
    return (last["samples"] - first["samples"]) / (ended - began), statistics.mean(known)


if __name__ == "__main__":
    main()
