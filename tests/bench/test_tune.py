"""`disttrain tune`: what curves say, by curves that are known, and both commands on the digits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from disttrain.bench.tune import BatchRow, judge_batches, judge_rates
from kit import toy
from kit.commands import Run

RATES = np.geomspace(1e-6, 10, 100).tolist()


def valley(noise: float = 0.0) -> list[float]:
    """Flat until 1e-4, down until 1e-1, then up steeply."""
    random = np.random.default_rng(0)
    place = np.log10(RATES)
    fall = 2.3 - 2 / (1 + np.exp(-4 * (place + 2.5)))  # steepest at 10**-2.5
    rise = np.exp(np.clip(6 * (place + 0.5), -50, 20))
    return (fall + rise + noise * random.standard_normal(100)).tolist()


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_suggestion_is_where_the_loss_falls_fastest(noise: float) -> None:
    found = judge_rates(RATES, valley(noise))
    assert found.suggested is not None
    assert found.most is not None
    assert found.diverged is not None
    assert 10**-2.7 < found.suggested < 10**-1.7  # the mean comes some steps late
    assert found.suggested < found.most < 10**0.2
    assert found.most < found.diverged < 10


def test_the_mean_of_equal_losses_is_that_loss() -> None:
    found = judge_rates(RATES, [2.3] * 100)
    np.testing.assert_allclose(found.smooth, 2.3)
    assert found.suggested is None
    assert found.diverged is None


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_diverged(end: float) -> None:
    losses = [*valley()[:70], end, end]
    found = judge_rates(RATES[:72], losses)
    assert found.diverged == RATES[70]
    assert found.suggested is not None
    assert found.suggested < RATES[70]


@pytest.mark.parametrize("losses", [[math.nan], [math.nan] * 20, []])
def test_no_finite_loss_gives_no_suggestion(losses: list[float]) -> None:
    found = judge_rates(RATES[: len(losses)], losses)
    assert (found.suggested, found.most) == (None, None)


def test_a_loss_that_only_rises_gives_no_suggestion() -> None:
    assert judge_rates(RATES, np.linspace(2, 9, 100).tolist()).suggested is None


def test_the_smallest_batch_that_is_nearly_as_fast_as_the_fastest() -> None:
    speeds = {64: 1000.0, 128: 1900.0, 256: 2850.0, 512: 3000.0, 1024: 2990.0}
    rows = [BatchRow(size, size / speed, 1.0) for size, speed in speeds.items()]
    assert judge_batches([*rows, BatchRow(2048, None, None)]) == 256
    assert judge_batches([BatchRow(16, None, None)]) is None


def test_a_learning_rate_for_the_digits(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    done = disttrain("tune", "lr", config_file, "optim.name=sgd", "--procs", "2", "--steps", "60")
    assert done.returncode == 0, done.stderr
    line, page = done.stdout.splitlines()
    assert line.startswith("optim.lr=")
    assert 1e-3 < float(line.split("=")[1].partition(";")[0]) < 3
    assert page == "tune_lr.html"
    text = (tmp_path / page).read_text()
    assert "Loss while the learning rate rises" in text
    assert line.partition(";")[0] in text
    assert not (tmp_path / "runs").exists()

    wrong = disttrain("tune", "lr", config_file, "--from", "1", "--to", "1e-3", "--procs", "1")
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "disttrain: --from 1 is not below --to 0.001; choose a lower --from"


@pytest.mark.nightly
def test_a_batch_size(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    toy.pack(train=70, root=str(tmp_path), shape=(8, 8, 3))
    few = ("data.name=toy", f"data.root={tmp_path}")
    done = disttrain("tune", "batch", config_file, *few, "--procs", "1", "--seconds", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sizes = [row["batch_size"] for row in found["tried"]]
    assert sizes == [16 * 2**i for i in range(len(sizes))]
    assert sizes[-1] <= 70
    assert found["suggested"] in sizes
    assert all(
        row["images_per_s"] == pytest.approx(row["batch_size"] / row["step_s"]) for row in found["tried"]
    )
    assert "Throughput over the batch size" in (tmp_path / "tune_batch.html").read_text()
