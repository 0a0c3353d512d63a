"""Start-up time of the disttrain command, and time to its first training step.

    python benchmarks/start.py --data ROOT [--skip steps] [KEY=VALUE ...]

help    `disttrain --help` beside `accelerate --help`, the installed commands, whole processes
first   from the start of the process to the first optimizer step on MNIST: `disttrain run --procs 1
        configs/cnn_mnist.yaml monitor.log_every_steps=1`, until its first record is in metrics.jsonl (looked
        at every 2 ms), beside two scripts, until they have printed their first step: peers/bare_script.py
        with torchvision's MNIST and a DataLoader, peers/barer_script.py with torch alone and an .npz file

The decoded copy of MNIST is there before (an uncounted round makes it), as are the scripts' files.
"""

import contextlib
import itertools
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

from common import (
    PEERS,
    Claim,
    config,
    disttrain,
    interleaved,
    parser,
    records,
    report,
    variables,
    write_mnist,
)


def write_npz(data: Path, path: Path) -> None:
    import numpy as np

    from disttrain.data.decoded_copy import open_split
    from disttrain.shards.index import load_index

    split = open_split(load_index("mnist", str(data)), "train", np.empty(0, np.int64), lambda text: None)
    np.savez(path, images=split.images[..., 0], labels=split.labels)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more config settings for our run"
    )
    arguments.add_argument("--skip", nargs="+", choices=("help", "steps"), default=[])
    options = arguments.parse_intermixed_args()
    env = variables(options.data)
    measured, claims = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def whole(command: str) -> float:
            began = time.perf_counter()
            path = Path(sysconfig.get_path("scripts")) / command
            subprocess.run([path, "--help"], env=env, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - began

        def ours() -> float:
            settings = ("monitor.log_every_steps=1", *options.overrides)
            command = disttrain("run", "-q", "--procs", 1, config("cnn_mnist"), *settings)
            with contextlib.closing(records(command, Path(scratch) / str(next(numbers)), env)) as lines:
                return next(lines)[0]

        def until_first_line(script: str, argument: Path) -> float:
            began = time.perf_counter()
            command = [sys.executable, PEERS / script, argument]
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as child:
                line = child.stdout.readline()
                seconds = time.perf_counter() - began
            if child.returncode or not line:
                raise SystemExit(f"{script} exited with {child.returncode}")
            return seconds

        if "help" not in options.skip:
            measured |= {f"{name} --help": partial(whole, name) for name in ("disttrain", "accelerate")}
            claims.append(Claim("help", "disttrain --help", "accelerate --help", 0.15))
        if "steps" not in options.skip:
            write_mnist(options.data, Path(scratch))
            write_npz(options.data, Path(scratch) / "mnist.npz")
            measured["first step"] = ours
            measured["bare script"] = partial(until_first_line, "bare_script.py", Path(scratch))
            measured["barer script"] = partial(
                until_first_line, "barer_script.py", Path(scratch) / "mnist.npz"
            )
            claims += [
                Claim("first step: with torchvision", "first step", "bare script", 1.3),
                Claim("first step: torch alone", "first step", "barer script", 1.3),
            ]
        values = interleaved(measured, options.runs)
    report(options, values, claims, unit="s", digits=3)


if __name__ == "__main__":
    main()
