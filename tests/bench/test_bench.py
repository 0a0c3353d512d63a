"""`disttrain bench`: what the tables say of the figures, and real measurements in one and two processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from disttrain.bench.bench import summary, tables
from disttrain.bench.step_bench import Replay
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import DecodedSplit
from kit.commands import Run
from kit.marks import nightly


def row(precision: str, **settings: bool) -> dict[str, Any]:
    return {"precision": precision, "channels_last": True, "compile": False} | settings


RESULTS: dict[str, Any] = {
    "model": "net",
    "batch": 100,
    "step_s": 0.010,
    "replayed_step_s": 0.008,
    "phases_s": {"data": 0.001, "forward": 0.003, "backward": 0.005, "optimizer": 0.001, "logging": 0.0},
    "table": [
        {
            "precision": "fp32",
            "channels_last": True,
            "compile": False,
            "pass_s": 0.02,
            "images_per_s": 5000.0,
        },
        {"precision": "bf16", "channels_last": True, "compile": False, "pass_s": 0.01, "images_per_s": 1e4},
        {"precision": "bf16", "channels_last": True, "compile": True, "pass_s": None, "error": "Oh: no"},
    ],
    "scaling": [
        {"processes": 1, "threads": 2, "images_per_s": 1000.0},
        {"processes": 2, "threads": 1, "images_per_s": 1500.0},
    ],
    "flops_per_image": 3e6,
    "flops_per_s_and_device": 3e10,
    "peak_flops_per_s": 3e11,
    "peak_source": "a data sheet",
    "share_of_peak": 0.1,
    "choices": {"precision": "bf16: faster"},
}


def test_the_tables_show_shares_rates_and_efficiency() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    for table in tables(RESULTS):
        console.print(table)
    rows = [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]
    for expected in (
        "data 1.000 10.0 %",
        "backward 5.000 50.0 %",
        "sum of the phases 10.000",
        "normal training loop 10.000",
        "one batch replayed 8.000 12,500",
        "fp32 true false 20.000 5,000",
        "bf16 true true n/a Oh: no",
        "1 2 1,000 100 %",
        "2 1 1,500 75 %",
    ):
        assert expected in rows


def test_the_summary_names_the_share_of_the_peak_and_the_fastest_settings() -> None:
    assert summary(RESULTS) == [
        "3.0 MFLOP per image, forward and backward; "
        "30.0 GFLOP/s per device = 10.0 % of 300.0 GFLOP/s (a data sheet)",
        "fastest here: train.precision=bf16 train.channels_last=true train.compile=false",
        "a run chooses precision bf16: faster",
    ]
    unknown = RESULTS | {"share_of_peak": None, "peak_source": "no figure for X"}
    assert summary(unknown)[0].endswith("30.0 GFLOP/s per device; peak n/a (no figure for X)")
    uncounted = RESULTS | {"flops_per_image": None, "flops_per_s_and_device": None, "share_of_peak": None}
    assert summary(uncounted)[0] == (
        "the FLOPs of this model are unknown: it has layers that are not counted"
    )


def test_a_replayed_batch_is_the_first_one_for_every_window() -> None:
    split = DecodedSplit(np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1), np.arange(8))
    cpu = torch.device("cpu")
    loader = Replay(Cached(split, cpu, "host"), cpu)
    windows = [slice(0, 3), slice(3, 6), slice(6, 8)]
    served = list(loader.batches(np.arange(8)[::-1].copy(), windows))
    assert [batch.labels.tolist() for batch in served] == [[7, 6, 5], [7, 6, 5], [7, 6]]
    assert [batch.ids.tolist() for batch in served] == [[7, 6, 5], [4, 3, 2], [1, 0]]


@pytest.mark.parametrize("processes", nightly(1, 2))
def test_a_real_measurement(disttrain: Run, config_file: Path, processes: int) -> None:
    done = disttrain(
        "bench", config_file, "train.compile=false", "--procs", processes, "--seconds", 0.1, "--json",
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"] == processes
    phases = {"data", "to_device", "augmentation", "forward", "backward", "optimizer", "logging"}
    assert set(found["phases_s"]) == (phases | {"communication"} if processes == 2 else phases)
    assert all(seconds >= 0 for seconds in found["phases_s"].values())
    assert 0 < found["phases_s"]["forward"] < found["step_s"] * 20
    assert [(row["precision"], row["channels_last"]) for row in found["table"]] == [
        ("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False),
    ]  # fmt: skip
    assert all(row["pass_s"] > 0 for row in found["table"])
    assert processes in [row["processes"] for row in found["scaling"]]
    # Backward takes twice the products of forward, less the gradient of the images.
    conv1, conv2, head = 2 * 64 * 8 * 9, 2 * 16 * 16 * 8 * 9, 2 * 64 * 10
    assert found["flops_per_image"] == 2 * conv1 + 3 * conv2 + 3 * head
    assert found["share_of_peak"] > 0


def test_mistakes_are_told_before_anything_is_measured(disttrain: Run, config_file: Path) -> None:
    done = disttrain("bench", "missing.yaml")
    assert done.returncode == 2
    assert "missing.yaml: no such config file" in done.stderr
    done = disttrain("bench", config_file, "--procs", 3, "train.batch_size=32")
    assert done.returncode == 2
    assert "cannot be divided by 3 processes" in done.stderr
