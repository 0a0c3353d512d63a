"""Launchers that meet, with threads as the nodes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from disttrain.launch.rendezvous import Channel, rendezvous
from disttrain.launch.secret import Secret
from disttrain.slurm_env import Node

LONG = "known to the nodes of this run alone"
"""A secret."""


def join(
    port: int,
    rank: int,
    secret: Secret,
    *,
    nodes: int = 2,
    timeout_s: float = 60,
    say: Callable[[str], None] = print,
) -> Channel:
    """Joins a run on this machine as the node of this rank."""
    return rendezvous(
        Node(nodes, rank, "127.0.0.1", port),
        1,
        {},
        secret=secret,
        timeout_s=timeout_s,
        interrupted=lambda: False,
        say=say,
    )


def meet(
    port: int, *secrets: Secret, timeout_s: float = 60, say: Callable[[str], None] = print
) -> list[Channel | BaseException]:
    """Lets nodes meet that have these secrets; returns a channel or an error of each."""
    with ThreadPoolExecutor(len(secrets)) as pool:
        calls: list[Future[Channel]] = [
            pool.submit(join, port, rank, secret, nodes=len(secrets), timeout_s=timeout_s, say=say)
            for rank, secret in enumerate(secrets)
        ]
    return [call.exception() or call.result() for call in calls]
