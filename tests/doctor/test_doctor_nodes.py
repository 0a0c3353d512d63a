"""`disttrain doctor --nodes`: who is paired when, what the measurements are worth, where srun is needed."""

from __future__ import annotations

import os
import sys
from itertools import chain, combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from disttrain.cli import main
from disttrain.doctor.nodes import Pair, judge, rounds, starts_srun

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
NAMES = ["a (node 0)", "b (node 1)", "c (node 2)"]


@given(st.integers(2, 40))
def test_every_pair_once_and_no_node_twice_in_a_round(nodes: int) -> None:
    plan = rounds(nodes)
    assert sorted(chain.from_iterable(plan)) == list(combinations(range(nodes), 2))
    for pairs in plan:
        busy = list(chain.from_iterable(pairs))
        assert len(busy) == len(set(busy))
    assert len(plan) == nodes - 1 + nodes % 2


def test_measurements_in_their_units_and_a_slow_link() -> None:
    pairs = [Pair(0, 1, 20e-6, 10e9), Pair(1, 2, 50e-6, 10e9), Pair(0, 2, 21e-6, 4e9)]
    found = {finding.subject: finding for finding in judge((pairs, 0.0123), NAMES, "gloo")}
    assert found["a (node 0) - b (node 1)"].found == "gloo: 20 us, 10.00 GB/s"
    assert found["all 3 nodes"].found == "gloo: all-reduce of 25 MiB in 12.3 ms"
    assert [finding.status for finding in found.values()] == ["ok", "warning", "warning", "ok"]
    slow = found["a (node 0) - c (node 2)"]
    assert slow.found == "gloo: 21 us, 4.00 GB/s, but the median of the pairs is 21 us, 10.00 GB/s"


def test_a_pair_that_failed() -> None:
    pairs = [Pair(0, 1, 20e-6, 10e9), Pair(0, 2, None, None, "Connection reset by peer")]
    found = list(judge((pairs, "not tried"), NAMES, "nccl"))
    assert [finding.status for finding in found] == ["ok", "failure", "failure"]
    assert found[1].found == "nccl: Connection reset by peer"
    assert "NCCL_SOCKET_IFNAME" in found[1].remedy
    assert found[2].found == "all-reduce: not tried"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (JOB, True),
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3"}, False),
        (JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1"}, True),  # the shell of salloc
    ],
)
def test_srun_is_called_where_this_is_no_task_on_all_nodes(environ: dict[str, str], expected: bool) -> None:
    command = starts_srun(environ)
    assert (command is not None) is expected
    if command is not None:
        assert command[:1] + command[-len(sys.orig_argv) :] == ["srun", *sys.orig_argv]
        assert "--nodes=3" in command


def test_srun_hands_on_a_secret_that_no_command_line_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$DISTTRAIN_SECRET $*" >>{tmp_path}/called\nexit 3\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(main, ["doctor", "--nodes"]).exit_code == 3
    secret, arguments = (tmp_path / "called").read_text().split(maxsplit=1)
    assert len(secret) == 64
    assert secret not in arguments
