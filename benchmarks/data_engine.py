"""Samples per second of the data path on CIFAR-10 as JPEG shards: disttrain beside three peers.

    python benchmarks/data_engine.py --data ROOT --peers-env CACHE [--runs 5] [--threads 2] [--skip mosaic]

ROOT holds cifar10/, prepared as in the README; CACHE keeps the environment of mosaicml-streaming, made on the
first run. The peers and what they do are in benchmarks/peers. Everything is its own process and is measured
inside it, without imports and start. The runs go round robin, each over one whole epoch unless --samples
shortens those of webdataset and mosaic; a first round is not counted. The medians and their ratios are
printed, with --json all values.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import Claim, interleaved, machine, parser, peer, print_json_or

OURS = ("streamed", "cached", "decode_once", "resume")
CLAIMS = tuple(
    Claim(what, ours, peer_name, at_least, wanted="at least")
    for what, ours, peer_name, at_least in (
        ("streamed, one process", "streamed", "webdataset", 5),
        ("streamed, one process", "streamed", "mosaic", 3),
        ("cached epoch", "cached", "webdataset", 30),
        ("cached epoch", "cached", "dataloader", 10),
        ("decode-once pass", "decode_once", "webdataset", 5),
    )
)
RESUME_UNDER_S = 1.0  # streamed, in the middle of the epoch


def rate(script: str, *arguments: object) -> float:
    """Returns samples per second."""
    line = peer(script, *arguments)
    return line["samples"] / line["seconds"]


def resume_s(data: Path, threads: int) -> float:
    """Returns the seconds until the first batch of the second half of an epoch."""
    return peer("ours.py", "resume", data, "--threads", threads)["seconds"]


def all_runs(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Returns the measurements by name, in the order of a round."""
    data, threads = options.data / "cifar10", options.threads
    common = ("--threads", threads)
    part = (*common, "--samples", options.samples) if options.samples else common
    runs = {
        "webdataset": partial(rate, "webdataset_stock.py", data, *part),
        "mosaic": partial(rate, "mosaic_streaming.py", data, options.peers_env, *part),
        "dataloader": partial(rate, "dataloader.py", data, "--workers", 2, *common),
    }
    runs |= {what: partial(rate, "ours.py", what, data, *common) for what in OURS[:-1]}
    runs["resume"] = partial(resume_s, data, threads)
    return {name: run for name, run in runs.items() if name not in options.skip}


def print_tables(rates: dict[str, list[float]], claims: list[dict]) -> None:
    for name, values in rates.items():
        unit = "s" if name == "resume" else "samples/s"
        digits = 2 if name == "resume" else 0
        median, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
        print(f"{name:<12} {median:>9} {unit:<9} ({low} to {high})")
    print(f"\n{'claim':<22} {'peer':<11} {'samples/s':>9} {'ours':>9} {'ratio':>6}  wanted")
    for c in claims:
        print(f"{c['what']:<22} {c['peer']:<11} {c['peer_median']:9,.0f} {c['ours_median']:9,.0f}", end=" ")
        print(f"{c['value']:6.1f}  {c['bound']:g}{'' if c['holds'] else '  not reached'}")
    if "resume" in rates:
        seconds = statistics.median(rates["resume"])
        print(f"resume in mid epoch    {seconds:.2f} s, wanted under {RESUME_UNDER_S:g} s")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--peers-env", type=Path, help="cache folder for the environment of mosaicml-streaming"
    )
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--samples", type=int, help="samples after which webdataset and mosaic stop")
    names = ("webdataset", "mosaic", "dataloader", *OURS)
    arguments.add_argument(
        "--skip", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names)
    )
    options = arguments.parse_args()
    if options.peers_env is None and "mosaic" not in options.skip:
        arguments.error("--peers-env is needed, or --skip mosaic")
    values = interleaved(all_runs(options), options.runs)
    medians = {name: statistics.median(numbers) for name, numbers in values.items()}
    claims = [c.result(medians) for c in CLAIMS if c.ours in medians and c.peer in medians]
    epoch = f"{options.samples} samples" if options.samples else "a whole epoch"
    facts = machine() | {"threads": options.threads, "webdataset and mosaic over": epoch, "n": options.runs}
    rates = {name: numbers for name, numbers in values.items() if name != "resume"}
    print_json_or(
        *(partial(print_tables, values, claims), options, facts),
        samples_per_s=rates,
        resume_s=values.get("resume"),
        claims=claims,
    )


if __name__ == "__main__":
    main()
