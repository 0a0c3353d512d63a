"""Shared by the benchmarks: measurement rounds, runs observed from outside, claims and their tables.

A benchmark lists its measurements and its claims; a claim is a ratio of two medians of one interleaved run.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import pty
import signal
import statistics
import struct
import subprocess
import sys
import sysconfig
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = REPOSITORY / "benchmarks/peers"
STOPPED = 75  # exit code of a run that was asked to stop
_FIRST_POLL_S = 0.002
_POLL_S = 0.05  # rarely, because polling takes time from the run

Values = dict[str, list[float]]


class Claim(NamedTuple):
    """A bound on the ratio of two measurements.

    Attributes:
        what: description.
        ours: name of our measurement.
        peer: name of the peer measurement.
        bound: the wanted minimum or maximum of the ratio.
        wanted: "at least" or "at most".
        ratio: "ours/peer" or "peer/ours".
    """

    what: str
    ours: str
    peer: str
    bound: float
    wanted: str = "at most"
    ratio: str = "ours/peer"

    def result(self, medians: Mapping[str, float]) -> dict:
        """Returns the claim with both medians, their ratio and whether it holds."""
        ours, peer = medians[self.ours], medians[self.peer]
        ratio = ours / peer if self.ratio == "ours/peer" else peer / ours
        holds = ratio >= self.bound if self.wanted == "at least" else ratio <= self.bound
        return self._asdict() | {"ours_median": ours, "peer_median": peer, "value": ratio, "holds": holds}


class Recipe(NamedTuple):
    """A network, with the config, data set and optimizer of its measurement."""

    config: str
    data: str
    optimizer: str


RECIPES = {
    "cnn_mnist": Recipe("cnn_mnist", "mnist", "adam"),
    "lenet_bn": Recipe("lenet_bn_cifar", "cifar10", "adam"),
    "alexnet_cifar": Recipe("alexnet_cifar", "cifar10", "sgd"),
    "resnet18": Recipe("resnet18_cifar", "cifar10", "sgd"),
}
# What the hand-written peers do not do either, and no end in sight: the benchmark ends the run.
PLAIN = (
    *("augment.crop_padding=0", "augment.flip=false", "augment.cutout=0", "train.label_smoothing=0"),
    *("optim.lr=0.001", "optim.weight_decay=0", "optim.nesterov=null", "schedule.name=constant"),
    *("schedule.warmup_epochs=null", "train.epochs=1000", "eval.every_epochs=1000"),
    "checkpoint.every_epochs=1000",
)


def parser(doc: str, runs: int = 5) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of every benchmark."""
    data = os.environ.get("DISTTRAIN_DATA")
    arguments = argparse.ArgumentParser(description=doc.partition("\n")[0])
    arguments.add_argument(
        "--data",
        type=Path,
        required=data is None,
        default=data,
        metavar="ROOT",
        help="folder of the packed data sets (default: $DISTTRAIN_DATA)",
    )
    arguments.add_argument(
        "--runs", type=int, default=runs, help=f"rounds after the warm-up (default {runs})"
    )
    arguments.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    return arguments


def variables(data: Path, threads: int | None = None, **more: str) -> dict[str, str]:
    """Returns the environment of a measured process; its runs write no report."""
    env = os.environ | {"DISTTRAIN_DATA": str(data.resolve()), "DISTTRAIN_REPORT": "0"} | more
    return env if threads is None else env | {"OMP_NUM_THREADS": str(threads)}


def disttrain(*arguments: object) -> list[str]:
    """Returns the command line of disttrain with these arguments."""
    return [sys.executable, "-m", "disttrain", *map(str, arguments)]


def config(name: str) -> Path:
    """Returns the path of one of the project's configs."""
    return REPOSITORY / "configs" / f"{name}.yaml"


def peer(
    script: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    start: Sequence[str | Path] = (sys.executable,),
) -> dict:
    """Runs a script of peers/ and returns the last JSON line that it prints."""
    command = [*map(str, start), str(PEERS / script), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def torchrun(processes: int) -> list[str]:
    """Returns the start of a command line for this number of processes on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [*run, "--nproc-per-node", str(processes)]


def environment_with(folder: Path, *packages: str) -> Path:
    """Returns the interpreter of an environment that has packages besides those of this one.

    It is made on first use, and sees this environment's packages: torch is the same on both sides.
    """
    python, ready = folder / "bin/python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
        ours = sysconfig.get_path("purelib")
        theirs = sysconfig.get_path("purelib", vars={"base": str(folder.resolve())})
        (Path(theirs) / "parent.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        install = [python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True, stdout=sys.stderr)
        ready.touch()
    return python


def records(
    command: Sequence[str], run_dir: Path, env: Mapping[str, str], *, terminal: bool = False
) -> Iterator[tuple[float, dict]]:
    """Starts `disttrain run ... --run-dir run_dir` and yields the records of its metrics.jsonl as they come.

    Closing the iterator asks the run to stop and waits for that.

    Args:
        command: without --run-dir.
        run_dir: a new folder.
        env: of the process.
        terminal: give it a pseudo-terminal, so that it shows its dashboard; else its output is dropped.

    Yields:
        Seconds from the start of the process until the record came, and the record. The resolution is 2 ms
        for the first one and 50 ms for the others.
    """
    with contextlib.ExitStack() as stack:
        out: int = subprocess.DEVNULL
        if terminal:
            out = stack.enter_context(_drained_terminal())
            env = {**env, "TERM": "xterm-256color"}
        began = time.perf_counter()
        child = subprocess.Popen([*command, "--run-dir", str(run_dir)], env=env, stdin=out, stdout=out)
        stack.callback(_stop, child)
        path, ended = run_dir / "metrics.jsonl", False
        while not path.exists() and not ended:
            ended = child.poll() is not None
            time.sleep(_FIRST_POLL_S)
        if not path.exists():
            raise SystemExit(f"{' '.join(command)} exited with {child.returncode}")
        file = stack.enter_context(path.open())
        line, came = "", False
        while True:
            ended = child.poll() is not None
            part = file.readline()
            line += part
            if line.endswith("\n"):
                yield time.perf_counter() - began, json.loads(line)
                line, came = "", True
            elif not part and ended:
                break
            elif not part:
                time.sleep(_POLL_S if came else _FIRST_POLL_S)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} exited with {child.returncode}")


def eval_accuracy(run_dir: Path) -> float:
    """Returns the accuracy of a run's last evaluation, 0..1."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["accuracy"] for line in lines if line["kind"] == "eval"][-1]


def write_mnist(data: Path, folder: Path) -> None:
    """Writes the packed MNIST as the original files, where torchvision.datasets.MNIST(folder) finds them."""
    import numpy as np

    from disttrain.data.decoded_copy import open_split
    from disttrain.shards.index import load_index

    index = load_index("mnist", str(data))
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "t10k")):
        decoded = open_split(index, split, np.empty(0, np.int64), lambda text: None)
        images, labels = decoded.images, decoded.labels.astype(np.uint8)
        header = struct.pack(">IIII", 0x803, len(images), *images.shape[1:3])
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, len(labels)) + labels.tobytes()
        )


@contextlib.contextmanager
def _drained_terminal() -> Iterator[int]:
    """Gives the inner side of a pseudo-terminal of 40 x 120 whose output is discarded."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def drain() -> None:
        with contextlib.suppress(OSError):  # EIO: the last process with the inner side has ended
            while os.read(outer, 65536):
                pass

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        yield inner
    finally:
        os.close(inner)
        reader.join()
        os.close(outer)


def _stop(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            code = child.wait(timeout=120)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if code not in {0, STOPPED}:
            raise SystemExit(f"the run that was asked to stop exited with {code}")


def run_step_s(
    command: Sequence[str], run_dir: Path, env: Mapping[str, str], warmup: int, steps: int
) -> float:
    """Returns the step time of a run: the median over its log points in so many steps after a warm-up."""
    with contextlib.closing(records(command, run_dir, env)) as lines:
        times = []
        for _, record in lines:
            if record["step"] > warmup:
                times.append(record["step_time_s"])
            if record["step"] >= warmup + steps:
                return statistics.median(times)
    raise SystemExit(f"{' '.join(command)} ended before step {warmup + steps}")


def interleaved(
    measurements: Mapping[str, Callable[[], float]], runs: int, *, warm_up: bool = True
) -> Values:
    """Takes every measurement once per round; the first round is a warm-up."""
    if warm_up:
        for name, measure in measurements.items():
            tell(f"warm-up: {name}")
            measure()
    values: Values = {name: [] for name in measurements}
    for number in range(runs):
        for name, measure in measurements.items():
            values[name].append(measure())
            tell(f"round {number + 1} of {runs}: {name} {values[name][-1]:.5g}")
    return values


def tell(text: str) -> None:
    """Prints progress on standard error, if someone watches."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def machine() -> dict:
    """Returns the facts about the machine that a reader needs."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in names if line.startswith("model name")), "")
    return {
        "processor": processor or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
    }


def print_json_or(
    table: Callable[[], None], options: argparse.Namespace, facts: Mapping[str, object], **results: object
) -> None:
    """Prints facts and results as JSON if that was asked for, else a line of facts and the table."""
    if options.json:
        print(json.dumps({**facts, **results}, indent=2))
    else:
        print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()), end="\n\n")
        table()


def report(
    options: argparse.Namespace,
    values: Values,
    claims: Sequence[Claim],
    *,
    unit: str,
    digits: int = 2,
    **facts: object,
) -> None:
    """Prints machine, medians with their spread, and every claim whose measurements were taken.

    Args:
        options: what the command line said; --runs and --json are used.
        values: what was measured, by name.
        claims: what is wanted of it.
        unit: of the values; "ms" shows seconds as milliseconds.
        digits: after the decimal point.
        **facts: what else a reader must know, such as the batch size.
    """
    medians = {name: statistics.median(numbers) for name, numbers in values.items()}
    results = [c.result(medians) for c in claims if c.ours in medians and c.peer in medians]
    scale = 1000 if unit == "ms" else 1

    def tables() -> None:
        width = max(map(len, values))
        for name, numbers in values.items():
            median, low, high = (f"{scale * f(numbers):,.{digits}f}" for f in (statistics.median, min, max))
            print(f"{name:<{width}} {median:>10} {unit} ({low} to {high})")
        if not results:
            return
        wide = max(len("claim"), *(len(result["what"]) for result in results))
        print(f"\n{'claim':<{wide}} {'peer ' + unit:>14} {'ours ' + unit:>14} {'ratio':>18}  wanted")
        for result in results:
            print(f"{result['what']:<{wide}} {scale * result['peer_median']:14,.{digits}f}", end=" ")
            print(f"{scale * result['ours_median']:14,.{digits}f}", end=" ")
            print(
                f"{result['ratio']:>11} {result['value']:6.3g}  {result['wanted']} {result['bound']:g}",
                end="",
            )
            print("" if result["holds"] else "  not reached")

    facts = machine() | facts | {"n": options.runs}
    stored = "s" if unit == "ms" else unit
    print_json_or(tables, options, facts, unit=stored, values=values, claims=results)
