"""The network between nodes whose own names lead nowhere, as on many a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import slurm_cluster
from kit.marks import nightly
from kit.slurm_cluster import Hosts

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.why_no_hosts()), reason=str(slurm_cluster.why_no_hosts())),
]

INTERFACE = (
    "import sys; from disttrain.training.network import interface_to; print(interface_to(sys.argv[1]))"
)
MEET = """
import os
from disttrain.training.network import interface_to
os.environ["GLOO_SOCKET_IFNAME"] = interface_to(os.environ["MASTER_ADDR"])
import torch
from torch import distributed
distributed.init_process_group("gloo")
total = torch.ones(1)
distributed.all_reduce(total)
print("sum", total.item())
distributed.destroy_process_group()
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with slurm_cluster.hosts(tmp_path / "hosts") as made:
        yield made


def name_themselves(hosts: Hosts, folder: Path, own: str) -> None:
    """Gives each host the /etc/hosts in which its own name is at another address, or nowhere."""
    for name in hosts.names:
        others = [f"10.0.0.{10 + i} {other}" for i, other in enumerate(hosts.names) if other != name]
        file = folder / f"hosts-{name}"
        file.write_text("\n".join(["127.0.0.1 localhost", *others, f"{own} {name}" if own else ""]) + "\n")
        hosts.on(name, "mount", "--bind", file, "/etc/hosts")


def found(hosts: Hosts, host: str, target: str) -> str:
    return hosts.on(host, sys.executable, "-c", INTERFACE, target).strip()


def test_the_interface_that_leads_to_the_first_node(hosts: Hosts, tmp_path: Path) -> None:
    # A second network, with the default route, that does not lead to the other nodes.
    for host in hosts.names:
        hosts.on(host, "ip", "link", "add", "other0", "type", "bridge")
        hosts.on(host, "ip", "address", "add", "10.9.9.9/24", "dev", "other0")
        hosts.on(host, "ip", "link", "set", "other0", "up")
        hosts.on(host, "ip", "route", "add", "default", "dev", "other0")
    assert [found(hosts, host, "node0") for host in hosts.names] == ["eth0", "eth0"]
    assert found(hosts, "node1", "10.0.0.10") == "eth0"
    name_themselves(hosts, tmp_path, "127.0.1.1")
    assert found(hosts, "node1", "node0") == "eth0"
    assert found(hosts, "node0", "node0") == "other0", "its own name tells nothing: the default route"


def test_where_it_cannot_be_told(hosts: Hosts, tmp_path: Path) -> None:
    hosts.on("node0", "ip", "link", "add", "other0", "type", "bridge")
    hosts.on("node0", "ip", "address", "add", "10.9.9.9/24", "dev", "other0")
    name_themselves(hosts, tmp_path, "127.0.1.1")
    for host, interface in (("node0", "None"), ("node1", "eth0")):
        assert found(hosts, host, host) == interface


@pytest.mark.parametrize("own", ["127.0.1.1", *nightly("")])
def test_ranks_meet_although_their_nodes_names_lead_nowhere(hosts: Hosts, tmp_path: Path, own: str) -> None:
    name_themselves(hosts, tmp_path, own)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.10", "MASTER_PORT": "29555", "OMP_NUM_THREADS": "1"}
    ranks = [
        hosts.start(
            host,
            [sys.executable, "-c", MEET],
            env=place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, host in enumerate(hosts.names)
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert ["sum 2.0" in text for text in printed] == [True, True], printed
