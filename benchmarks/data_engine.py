"""Samples per second of the data path on CIFAR-10 as JPEG shards: disttrain beside three peers.

    python benchmarks/data_engine.py --data ROOT --peers-env CACHE [--runs 5] [--threads 2] [--skip mosaic]

ROOT holds cifar10/, prepared as in the README; CACHE keeps the environment of mosaicml-streaming, made on the
first run. The peers and what they do are in benchmarks/peers. Everything is its own process and is measured
inside it, without imports and start. The runs go round robin, each over one whole epoch unless --samples
shortens those of webdataset and mosaic; a first round is not counted. The medians and their ratios are
printed, with --json all values.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

PEERS = Path(__file__).parent / "peers"
OURS = ("streamed", "cached", "decode_once", "resume")


class Claim(NamedTuple):
    """What must hold: the ratio of samples per second, ours to the peer's, is at_least so much."""

    what: str
    ours: str
    peer: str
    at_least: float


CLAIMS = (
    Claim("streamed, one process", "streamed", "webdataset", 5),
    Claim("streamed, one process", "streamed", "mosaic", 3),
    Claim("cached epoch", "cached", "webdataset", 30),
    Claim("cached epoch", "cached", "dataloader", 10),
    Claim("decode-once pass", "decode_once", "webdataset", 5),
)
RESUME_UNDER_S = 1.0  # streamed, in the middle of the epoch


def measured(script: str, *arguments: object) -> dict:
    """Returns the JSON line that the script prints last."""
    command = [sys.executable, str(PEERS / script), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def peer(script: str, *arguments: object) -> float:
    """Returns samples per second."""
    line = measured(script, *arguments)
    return line["samples"] / line["seconds"]


def ours(what: str, data: Path, threads: int) -> float:
    """Returns samples per second, and for what="resume" the seconds until the first batch."""
    line = measured("ours.py", what, data, "--threads", threads)
    return line["seconds"] if what == "resume" else line["samples"] / line["seconds"]


def all_runs(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Returns the measurements by name, in the order of a round."""
    data, threads = options.data / "cifar10", options.threads
    common = ("--threads", threads)
    part = (*common, "--samples", options.samples) if options.samples else common
    runs = {
        "webdataset": partial(peer, "webdataset_stock.py", data, *part),
        "mosaic": partial(peer, "mosaic_streaming.py", data, options.peers_env, *part),
        "dataloader": partial(peer, "dataloader.py", data, "--workers", 2, *common),
    }
    runs |= {what: partial(ours, what, data, threads) for what in OURS}
    return {name: run for name, run in runs.items() if name not in options.skip}


def print_tables(rates: dict[str, list[float]], claims: list[dict], options: argparse.Namespace) -> None:
    epoch = f"{options.samples} samples" if options.samples else "a whole epoch"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, n = {options.runs}; ",
        end="",
    )
    print(f"webdataset and mosaic over {epoch}\n")
    for name, values in rates.items():
        unit = "s" if name == "resume" else "samples/s"
        digits = 2 if name == "resume" else 0
        median, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
        print(f"{name:<12} {median:>9} {unit:<9} ({low} to {high})")
    print(f"\n{'claim':<22} {'peer':<11} {'samples/s':>9} {'ours':>9} {'ratio':>6}  wanted")
    for c in claims:
        print(f"{c['what']:<22} {c['peer']:<11} {c['peer_per_s']:9,.0f} {c['ours_per_s']:9,.0f}", end=" ")
        print(f"{c['ratio']:6.1f}  {c['at_least']:g}{'' if c['ratio'] >= c['at_least'] else '  not reached'}")
    if "resume" in rates:
        seconds = statistics.median(rates["resume"])
        print(f"resume in mid epoch    {seconds:.2f} s, wanted under {RESUME_UNDER_S:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10/")
    parser.add_argument(
        "--peers-env", type=Path, help="cache folder for the environment of mosaicml-streaming"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=int, help="webdataset and mosaic stop after these")
    names = ("webdataset", "mosaic", "dataloader", *OURS)
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    options = parser.parse_args()
    if options.peers_env is None and "mosaic" not in options.skip:
        parser.error("--peers-env is needed, or --skip mosaic")
    runs = all_runs(options)
    for run in runs.values():
        run()  # not counted: makes what is made once and reads the shards into the page cache
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.runs):
        for name, run in runs.items():
            rates[name].append(run())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    claims = [
        claim._asdict()
        | {"peer_per_s": medians[claim.peer], "ours_per_s": medians[claim.ours]}
        | {"ratio": medians[claim.ours] / medians[claim.peer]}
        for claim in CLAIMS
        if claim.ours in medians and claim.peer in medians
    ]
    if options.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": options.threads}
        resume_s = rates.pop("resume", None)
        results = {"n": options.runs, "samples_per_s": rates, "resume_s": resume_s, "claims": claims}
        print(json.dumps(machine | results, indent=2))
    else:
        print_tables(rates, claims, options)


if __name__ == "__main__":
    main()
