"""`disttrain doctor --nodes` on hosts with networks of their own, with Slurm and without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit import slurm_cluster
from kit.slurm_cluster import CONTROL, Hosts

DOCTOR = [sys.executable, "-m", "disttrain", "doctor", "--nodes"]

pytestmark = pytest.mark.slurm
needs_hosts = pytest.mark.skipif(bool(slurm_cluster.why_no_hosts()), reason=str(slurm_cluster.why_no_hosts()))
needs_slurm = pytest.mark.skipif(bool(slurm_cluster.why_no_slurm()), reason=str(slurm_cluster.why_no_slurm()))


def on_all(hosts: Hosts, *options: str) -> list[tuple[int, str, str]]:
    """Runs the check on all hosts; returns exit code and what was printed of each."""
    place = ["--master-addr", "node0", "--master-port", "29500", "--node-rank"]
    children = [
        hosts.start(
            name,
            [*DOCTOR, str(len(hosts.names)), *options, *place, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, name in enumerate(hosts.names)
    ]
    printed = [child.communicate(timeout=120) for child in children]
    return [(child.returncode, *texts) for child, texts in zip(children, printed, strict=True)]


@pytest.mark.nightly
@needs_hosts
def test_every_pair_of_three_nodes_and_one_that_cannot_be_reached(tmp_path: Path) -> None:
    with slurm_cluster.hosts(tmp_path / "hosts", count=3) as hosts:
        ended = on_all(hosts, "--json")
        assert [code for code, _, _ in ended] == [0, 0, 0], ended
        assert [out for _, out, _ in ended[1:]] == ["", ""]
        found = json.loads(ended[0][1])
        assert [finding["subject"] for finding in found] == [
            "node0 (node 0) - node1 (node 1)",
            "node0 (node 0) - node2 (node 2)",
            "node1 (node 1) - node2 (node 2)",
            "all 3 nodes",
        ]
        for finding in found[:3]:
            numbers = re.fullmatch(r"gloo: ([\d,]+) us, ([\d.]+) GB/s.*", finding["found"])
            assert numbers, finding
            assert 1 <= int(numbers[1].replace(",", "")) < 100_000
            assert 0.001 < float(numbers[2]) < 100

        # node1 and node2 reach node0, but not one another.
        hosts.on("node1", "ip", "route", "add", "unreachable", "10.0.0.12/32")
        ended = on_all(hosts)
        assert ended[0][0] == 1
        assert re.search(r"failure +node1 \(node 1\) -> node2 \(node 2\) +no connection to 10\.", ended[0][1])
        assert "GLOO_SOCKET_IFNAME" in ended[0][1]

        hosts.env["GLOO_SOCKET_IFNAME"] = "ib7"
        for (code, _, said), name in zip(on_all(hosts), hosts.names, strict=True):
            assert code == 2
            assert f"GLOO_SOCKET_IFNAME=ib7: {name} has no such interface" in said


@needs_slurm
def test_it_starts_itself_on_all_nodes_of_a_job(tmp_path: Path) -> None:
    own_bin = str(Path(sys.executable).parent)
    env = {"PATH": f"{own_bin}:{slurm_cluster.search_path()}"}
    with slurm_cluster.slurm(tmp_path / "slurm", env=env) as hosts:
        output = hosts.on(CONTROL, "salloc", "--nodes=2", *DOCTOR, timeout=120, cwd=tmp_path)
    assert re.search(r"ok +node0 \(node 0\) - node1 \(node 1\) gloo: [\d,]+ us", output)
    assert re.search(r"ok +all 2 nodes +gloo: all-reduce of 25 MiB in", output)
