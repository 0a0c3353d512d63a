"""`disttrain doctor --nodes`: checks the network between every pair of nodes, and measures its speed.

Each node runs one process. They connect like the launchers of a run, and then use the network like its ranks:
the address that gloo chooses, and gloo or NCCL itself.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from disttrain.doctor.allreduce import LIMIT_S, reduction_s
from disttrain.doctor.rules import Finding, failure, ok, warning
from disttrain.errors import HangError, UsageError
from disttrain.launch.rendezvous import Channel, rendezvous
from disttrain.launch.secret import Secret
from disttrain.monitor.nvml import visible_gpus
from disttrain.slurm_env import Node, allocation
from disttrain.training.network import prepare_gloo
from disttrain.units import time_text

if TYPE_CHECKING:
    import torch

_MEET_S = 60.0
_CONNECT_S = 3.0  # for a plain TCP connection between two nodes
_ROUND_TRIPS = 200
_LARGE_BYTES = {"gloo": 2**24, "nccl": 2**28}
_LARGE_TRIPS = 5
_BUCKET_BYTES = 25 * 2**20  # size of a gradient bucket of DDP
_SLOW = 2.0  # times worse than the median of the pairs is slow


class Pair(NamedTuple):
    """The measurement between two nodes.

    Attributes:
        first: the node with the lower rank.
        second: the other node.
        latency_s: half of the median round trip of 4 bytes; None if it failed.
        bytes_per_s: speed of a large message in one direction; None if it failed.
        problem: why it failed, or empty.
    """

    first: int
    second: int
    latency_s: float | None
    bytes_per_s: float | None
    problem: str = ""


def starts_srun(environ: Mapping[str, str]) -> list[str] | None:
    """Returns the srun command to run this on all nodes of a Slurm job; None outside a job or inside srun."""
    job = allocation(environ)
    if job is None:
        return None
    in_step = job.step is not None and int(environ.get("SLURM_STEP_NUM_NODES", "1")) == job.nodes
    if in_step:
        return None
    every = ["srun", "--overlap", f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1"]
    return [*every, "--kill-on-bad-exit=0", *sys.orig_argv]


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Returns all pairs of nodes in as few rounds as possible; in a round, a node is in at most one pair."""
    places: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    result = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        paired = zip(places[:half], reversed(places[half:]), strict=True)
        result.append(sorted((min(a, b), max(a, b)) for a, b in paired if a is not None and b is not None))
        places = [places[0], places[-1], *places[1:-1]]  # the circle method: all but the first rotate
    return result


def examine_nodes(
    place: Node | None, secret: Secret, say: Callable[[str], None]
) -> Iterator[tuple[str, Finding]]:
    """Measures the network between all nodes. Every node calls this; only node 0 yields findings.

    Args:
        place: this node.
        secret: the same on all nodes.
        say: called on node 0 with a line about callers that are no nodes.

    Raises:
        BusyError: the port is in use.
        HangError: a node did not join.
        UsageError: there is only one node, or the nodes differ, for example in their devices or secret.
    """
    if place is None:
        raise UsageError(
            "--nodes needs several nodes; run this in a Slurm job with several nodes, or on each node with "
            "--nodes N --node-rank R --master-addr HOST --master-port PORT"
        )
    backend = "nccl" if visible_gpus() else "gloo"
    channel = rendezvous(
        place,
        1,
        {"what they communicate with": backend},
        secret=secret,
        timeout_s=_MEET_S,
        interrupted=lambda: False,
        say=say,
    )
    try:
        interface = prepare_gloo(place.master_addr)
        names = [f"{host} (node {node})" for node, host in enumerate(channel.hosts)]
        unreached = _reach(channel, place, names, interface)
        findings = unreached or judge(_measure(channel, place, backend), names, backend)
        if place.node_rank == 0:
            yield from (("nodes", finding) for finding in findings)
    finally:
        channel.close()


def _exchange(channel: Channel, place: Node, value: Any) -> list[Any]:
    """Gathers a value from each node, and returns them all on every node. Every node calls this.

    Raises:
        HangError: a node is gone or does not answer.
    """
    values: dict[int, Any] = {place.node_rank: value}
    deadline = time.monotonic() + 2 * LIMIT_S
    if place.node_rank:
        channel.send({"value": value})
    while len(values) < place.nodes:
        messages = channel.receive()
        if not messages and (channel.lost or time.monotonic() > deadline):
            gone = ", ".join(channel.hosts[node] for node in sorted(channel.lost)) or "a node"
            raise HangError(f"{gone} is gone or does not answer; see its output")
        if not messages:
            time.sleep(0.01)
        for node, message in messages:
            values |= {node: message["value"]} if place.node_rank == 0 else dict(enumerate(message["values"]))
    gathered = [values[node] for node in range(place.nodes)]
    if place.node_rank == 0:
        channel.send({"values": gathered})
    return gathered


def _reach(channel: Channel, place: Node, names: Sequence[str], interface: str | None) -> list[Finding]:
    """Connects each node to every other one, at the address that gloo would use; returns the failures."""
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=_accept_all, args=(server,), daemon=True).start()
        here = _address(interface), server.getsockname()[1]
        addresses = _exchange(channel, place, here)
        problems = []
        for node, (address, port) in enumerate(addresses):
            try:
                socket.create_connection((address, port), timeout=_CONNECT_S).close()
            except OSError as error:
                problems.append((node, f"{address}: {error.strerror or error}"))
        gathered = _exchange(channel, place, problems)
    remedy = "check the firewall between them, or set GLOO_SOCKET_IFNAME to the right interface"
    return [
        failure(f"{names[node]} -> {names[other]}", f"no connection to {problem}", remedy)
        for node, problems in enumerate(gathered)
        for other, problem in problems
    ]


def _accept_all(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def _address(interface: str | None) -> str:
    """Returns the address at which gloo listens: that of an interface, or the one of the host name."""
    interface = interface or os.environ.get("GLOO_SOCKET_IFNAME")
    if interface is None:
        return socket.gethostbyname(socket.gethostname())
    for entry in psutil.net_if_addrs().get(interface.partition(",")[0], []):
        if entry.family == socket.AF_INET:
            return entry.address
    raise UsageError(
        f"GLOO_SOCKET_IFNAME={interface}: {socket.gethostname()} has no such interface with an address; "
        "choose one that `ip -br address` shows"
    )


def _measure(channel: Channel, place: Node, backend: str) -> tuple[list[Pair], float | str]:
    """Returns all pairs, and the seconds of an all-reduce or why it failed. Every node calls this."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings about hosts without a DNS name
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=LIMIT_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        place.master_addr, place.master_port, place.nodes, place.node_rank == 0, timeout=timeout
    )
    try:
        dist.init_process_group(
            backend, store=store, rank=place.node_rank, world_size=place.nodes, timeout=timeout
        )
    except RuntimeError as error:
        raise HangError(f"{backend} cannot connect the nodes: {str(error).splitlines()[0]}") from None
    mine = [pair for pairs in rounds(place.nodes) for pair in pairs if place.node_rank in pair]
    own = [_measure_pair(*pair, place.node_rank, device, _LARGE_BYTES[backend]) for pair in mine]
    gathered = _exchange(channel, place, own)
    reduction: float | str = "not tried"
    if not any(problem for pairs in gathered for *_, problem in pairs):
        try:
            reduction = reduction_s(torch.ones(_BUCKET_BYTES // 4, device=device), _LARGE_TRIPS)
        except RuntimeError as error:
            reduction = str(error).splitlines()[0]
    found = [Pair(*pair) for node, pairs in enumerate(gathered) for pair in pairs if pair[0] == node]
    _exchange(channel, place, None)  # no node leaves while another still needs it
    return found, reduction


def _measure_pair(first: int, second: int, node: int, device: torch.device, large_bytes: int) -> Pair:
    """Measures round trips between two nodes. Both nodes call this."""
    import torch
    import torch.distributed as dist

    other = second if node == first else first

    def trip(numbers: torch.Tensor) -> float:
        """Returns the seconds of a round trip."""
        begin = time.perf_counter()
        for call in (dist.send, dist.recv) if node == first else (dist.recv, dist.send):
            call(numbers, other)
        if numbers.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def half_trips(size: int, times: int) -> float:
        numbers = torch.full((size,), float(node), device=device)
        trip(numbers)  # warm-up: opens the connection and waits for the other node
        median = statistics.median(trip(numbers) for _ in range(times)) / 2
        if not bool((numbers == first).all()):
            raise RuntimeError("the numbers received are not those that were sent")
        return median

    try:
        latency_s = half_trips(1, _ROUND_TRIPS)
        return Pair(first, second, latency_s, large_bytes / half_trips(large_bytes // 4, _LARGE_TRIPS))
    except RuntimeError as error:
        return Pair(first, second, None, None, str(error).splitlines()[0])


def judge(found: tuple[list[Pair], float | str], names: Sequence[str], backend: str) -> Iterator[Finding]:
    """Yields a finding for each pair of nodes, and one for all nodes together."""
    pairs, reduction = found
    latency_s = statistics.median(pair.latency_s or 0.0 for pair in pairs)
    bytes_per_s = statistics.median(pair.bytes_per_s or 0.0 for pair in pairs)
    for pair in sorted(pairs):
        subject = f"{names[pair.first]} - {names[pair.second]}"
        if pair.latency_s is None or pair.bytes_per_s is None:
            remedy = f"set {backend.upper()}_SOCKET_IFNAME=<interface>"
            yield failure(subject, f"{backend}: {pair.problem}", remedy)
            continue
        text = f"{backend}: {1e6 * pair.latency_s:,.0f} us, {pair.bytes_per_s / 1e9:,.2f} GB/s"
        if pair.latency_s > _SLOW * latency_s or pair.bytes_per_s * _SLOW < bytes_per_s:
            median = f"{1e6 * latency_s:,.0f} us, {bytes_per_s / 1e9:,.2f} GB/s"
            found_text = f"{text}, but the median of the pairs is {median}"
            yield warning(subject, found_text, "check the link between them")
        else:
            yield ok(subject, text)
    subject = f"all {len(names)} nodes"
    if isinstance(reduction, str):
        yield failure(subject, f"all-reduce: {reduction}", "fix the pairs first")
    else:
        yield ok(subject, f"{backend}: all-reduce of 25 MiB in {time_text(reduction)}")
