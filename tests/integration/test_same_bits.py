"""With train.reproducible, a run gives the same bits on any number of ranks, through any stops."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kit import PROGRAMS, REPOSITORY, toy
from kit.commands import torchrun
from kit.resumed import digest, run
from kit.run_results import computed_records, ids_per_step, status

QUICK = (
    "small",
    "lenet_bn",
    "lenet_bn clipped bf16 streamed",
    "cnn_mnist",
    "speednet",
)
ALL = [
    " ".join(filter(None, words))
    for words in itertools.product(
        ("lenet_bn", "cnn_mnist", "speednet", "resnet18"), ("", "bf16"), ("", "streamed")
    )
]

Digests = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory, decoded_cache: Path) -> Digests:
    """Returns a digest of each case, trained on so many ranks."""
    root = tmp_path_factory.mktemp("sets")
    toy.pack("squares", train=200, val=60, root=str(root), shape=(32, 32, 3))
    environment = os.environ | {
        "DISTTRAIN_CACHE": str(decoded_cache),
        "PYTHONPATH": str(REPOSITORY / "tests"),
        "OMP_NUM_THREADS": "1",
    }

    def get(
        ranks: int, cases: Sequence[str], virtual: int = 12, fault: str = "none", mode: bool = True
    ) -> dict[str, str]:
        script = PROGRAMS / "same_bits.py"
        arguments = (root / "squares", str(mode).lower(), virtual, fault, *cases)
        if ranks == 1:
            command = [sys.executable, *map(str, (script, *arguments))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        else:
            done = torchrun(script, *arguments, ranks=ranks, env=environment, timeout=900)
        if fault == "statistics" and "different weights" in done.stderr:
            return {}  # the ranks themselves notice it
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    return get


def test_the_bits_are_the_same_on_any_number_of_ranks(digests: Digests) -> None:
    alone = digests(1, QUICK)
    for ranks in (2, 3):
        assert digests(ranks, QUICK) == alone


@pytest.mark.nightly
def test_without_the_mode_the_bits_differ(digests: Digests) -> None:
    without = digests(1, QUICK, mode=False), digests(2, QUICK, mode=False)
    assert not {case for case in QUICK if without[0][case] == without[1][case]}, "DDP gives other bits"


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("virtual", "ranks"), [(8, (1, 2, 3, 4, 8)), (12, (1, 2, 3, 4, 6)), (6, (1, 4, 5))])
def test_the_bits_are_the_same_on_more_ranks(virtual: int, ranks: Sequence[int], digests: Digests) -> None:
    found = [digests(number, [*QUICK, *ALL], virtual) for number in ranks]
    assert all(one == found[0] for one in found)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["tree", "statistics", "seeds", "threads", "clipping"])
def test_without_an_ingredient_the_bits_differ(fault: str, digests: Digests) -> None:
    alone, two = (digests(ranks, ["small"], fault=fault) for ranks in (1, 2))
    assert alone != two


MODE = ("train.reproducible=true", "train.virtual_ranks=6")
STOPS_EARLY = (  # after three epochs: no accuracy is better than the first one by more than 1
    "train.epochs=9",
    "train.stop_early={metric: accuracy, patience_epochs: 2, min_delta: 1}",
)


def chain(
    folder: Path,
    digits_root: Path,
    stages: Sequence[tuple[int, str | None, int]],
    overrides: Sequence[str] = (),
    *,
    may_finish: bool = False,
) -> Path:
    """Runs the experiment in stages: ranks, the signal that ends it, and the exit code.

    With `may_finish`, a run may finish before a signal is due, or before it polls for a stop.
    """
    signalled = folder / "signalled"
    for ranks, plan, code in stages:
        signalled.unlink(missing_ok=True)
        done = run(folder, ranks, digits_root, plan, [*MODE, *overrides])
        if may_finish and done.returncode == 0 and (code == 75 or not signalled.exists()):
            assert status(folder / "run")["state"] == "finished"
        else:
            assert done.returncode == code, done.stderr
    return folder / "run"


def command(folder: Path, digits_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of disttrain in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "disttrain", *arguments],
        cwd=folder,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.nightly
def test_a_chain_of_stops_on_other_ranks_gives_the_same_bits(tmp_path: Path, digits_root: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = chain(tmp_path / "whole", digits_root, [(1, None, 0)], STOPS_EARLY)
    (tmp_path / "parts").mkdir()
    stages = [(2, "SIGKILL 1 training 50", 70), (3, "SIGTERM 1 training 20", 75), (1, None, 0)]
    parts = chain(tmp_path / "parts", digits_root, stages, STOPS_EARLY)
    for ended in (whole, parts):
        assert status(ended)["reason"].startswith(
            "stopped early after epoch 3 of 9 (accuracy not 100.00 % better"
        )
    assert digest(parts) == digest(whole)
    assert computed_records(parts) == computed_records(whole)
    assert ids_per_step(parts) == ids_per_step(whole)
    done = command(tmp_path, digits_root, "report", str(parts), str(whole))
    assert "the same bits at " in done.stdout, done.stderr
    # A replay of the last steps on two processes, of a run of which a digest was changed.
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"weights"' in line)
    record = json.loads(lines[last])
    record["weights"]["layers.0.bias"] = "0000000000"
    lines[last] = json.dumps(record) + "\n"
    (whole / "metrics.jsonl").write_text("".join(lines))
    done = command(tmp_path / "whole", digits_root, "replay", "run", "--from", "40", "--procs", "2")
    assert done.returncode == 70, done.stdout + done.stderr
    assert "replayed from step 40: the same bits up to step 44; at step 45 layers.0.bias" in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_random_chains_give_the_same_bits(seed: int, tmp_path: Path, digits_root: Path) -> None:
    draw = random.Random(seed)
    (tmp_path / "whole").mkdir()
    whole = chain(tmp_path / "whole", digits_root, [(1, None, 0)])
    stages: list[tuple[int, str | None, int]] = []
    for _ in range(draw.randint(1, 4)):
        ranks, name = draw.choice([1, 2, 3, 4, 6]), draw.choice(["SIGKILL", "SIGTERM"])
        plan = f"{name} {draw.randrange(ranks)} training {draw.randint(2, 30)}"
        stages.append((ranks, plan, 70 if name == "SIGKILL" else 75))
    (tmp_path / "parts").mkdir()
    stages.append((draw.choice([1, 2, 3]), None, 0))
    parts = chain(tmp_path / "parts", digits_root, stages, may_finish=True)
    assert digest(parts) == digest(whole)
    assert computed_records(parts) == computed_records(whole)
