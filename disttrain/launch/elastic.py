"""Runs that go on when a node is gone, and take it back: `disttrain run --wait-for-nodes`.

Node 0 leads. Its launcher keeps its port for as long as the run lasts; the ranks use the next one. It has the
address, rank 0 and the lock of the run folder, so if it dies, the run ends.

1. Start. All nodes join, as in any run of several nodes. A node that does not come is an error: there it is
   most likely a mistake.
2. Attempt. Node 0 chooses the nodes, tells each its rank among them and how many restarts are left, and
   takes over its connection. Ranks are dense: of nodes 0, 1 and 2 without node 1, node 2 has rank 1.
3. Failure. All launchers agree on it, end their processes and come back to node 0, unless no restart is left.
   They do not ask whose fault it was. A launcher that is gone does not come back, and only that counts.
4. Waiting. Node 0 goes on as soon as all nodes of the last attempt are back, or after --wait-for-nodes with
   those that are, at least --min-nodes. It takes as many as the global batch can be divided among; the
   others wait at its port. The global batch, the order of samples and the config stay the same, so it is
   the same experiment, resumed from its last checkpoint on another number of processes.
5. Return. The user or Slurm starts the same command on the node again. Node 0 compares its facts with its own
   and refuses a node that differs or that has failed; the run does not notice. A node that fits waits. If
   the run can use it and has begun to train, node 0 asks all ranks to stop, as Ctrl-C does: they save after
   the step. Then all launchers come back, and step 4 takes the new node too. This is no restart of
   --max-restarts.
6. End. Node 0 closes its port, and tells those who wait that the run has ended.

What may go wrong at any time:
- A node comes back before node 0 knows that it was lost: it waits, until the old connection fails.
- A node is lost while all stop for another: that is a failure, and the other is there for the next attempt.
- A node comes and goes: each loss is a restart, so --max-restarts bounds it.
- A stop by the user counts more than a return: the run stops.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Self

from disttrain.config import parse_config
from disttrain.errors import HangError, StoppedError, UsageError, error_of
from disttrain.launch.callers import POLL_S, Caller, Callers, listen
from disttrain.launch.plan import LaunchPlan
from disttrain.launch.rendezvous import (
    Channel,
    compare_hellos,
    connect,
    hello_of,
    patience,
    wait_for_all,
)
from disttrain.launch.secret import Secret
from disttrain.preflight import split_batch
from disttrain.slurm_env import Node


class Leader:
    """Node 0 of an elastic run: its port, and the nodes of the attempt.

    Args:
        plan: of the run with all its nodes.
        place: this node.
        facts: must be the same on all nodes.
        secret: that of the run.
        interrupted: returns whether to give up waiting.
        say: called with a line about the nodes that come and go.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        place: Node,
        facts: Mapping[str, str],
        secret: Secret,
        interrupted: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._place = place
        self._hello = hello_of(place, plan.processes, facts)
        self._secret = secret
        self._interrupted = interrupted
        self._say = say
        self._config = parse_config(plan.config, "the config")
        self._port = contextlib.ExitStack()
        self._callers: Callers | None = None
        self._nodes: list[int] = []  # of the last attempt

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._callers is not None:
            self._callers.close(StoppedError("the run has ended without this node"))
        self._port.close()

    def gather(self, left: int) -> Channel:
        """Returns the channel to the nodes of the next attempt; `left` is how many restarts may follow it.

        Raises:
            DisttrainError: the port is in use, this node was interrupted, or too few nodes are there.
        """
        if self._callers is None:
            server = self._port.enter_context(listen(self._place.master_port))
            secret = self._port.enter_context(self._secret.offered(holds_folder=True))
            self._callers = Callers(self._place, server, secret, self._say)
        callers, before = self._callers, self._nodes
        if before:
            self._wait(callers)
        else:
            waiting = patience(self._plan.stall_timeout_s, self._interrupted)
            wait_for_all(callers, self._place, self._hello, waiting, self._plan.stall_timeout_s)
            callers.admit = self._admit
        there = [0, *sorted(callers.present)]
        self._nodes = there[: self._usable(len(there))]
        if before and self._nodes != before:
            missing = [str(node) for node in range(self._place.nodes) if node not in self._nodes]
            without = f", without node{'s' * (len(missing) > 1)} {', '.join(missing)}" if missing else ""
            self._say(f"going on with {len(self._nodes)} of {self._place.nodes} nodes{without}")
        channel = connect(callers, self._nodes, self._hello, left)
        channel.callers, channel.has_newcomers = callers, self._has_newcomers
        return channel

    def _wait(self, callers: Callers) -> None:
        """Waits for the nodes of the last attempt, or for enough of them."""
        plan, begin = self._plan, time.monotonic()
        wait_s = plan.wait_for_nodes_s or 0
        waiting = patience(wait_s + plan.stall_timeout_s, self._interrupted)
        while waiting():
            callers.hear(POLL_S)
            all_back = set(self._nodes) <= {0, *callers.present}
            enough = self._usable(1 + len(callers.present)) >= plan.min_nodes
            if enough and (all_back or time.monotonic() - begin >= wait_s):
                return
        error = HangError(
            f"{1 + len(callers.present)} of {plan.nodes} nodes are left, which are too few for --min-nodes "
            f"{plan.min_nodes}; start the same command on the others again, or lower --min-nodes"
        )
        callers.close(error)
        raise error

    def _usable(self, nodes: int) -> int:
        """Returns among how many of these nodes the global batch can be divided."""
        for number in range(nodes, 1, -1):
            with contextlib.suppress(UsageError):
                split_batch(self._config, number * self._plan.processes)
                return number
        return 1

    def _admit(self, caller: Caller) -> None:
        """Lets a node wait that comes while the run goes on.

        Raises:
            DisttrainError: it failed, or differs from this node.
        """
        if "failed" in caller.hello:
            raise error_of(int(caller.hello["exit_code"]), str(caller.hello["failed"]))
        compare_hellos(self._hello, caller.hello)
        caller.send({"wait": True})

    def _has_newcomers(self) -> bool:
        assert self._callers is not None
        return self._usable(len({*self._nodes, *self._callers.present})) > len(self._nodes)
