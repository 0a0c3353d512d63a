"""The rendezvous of the nodes of a run: their launchers connect, compare facts and exchange messages.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import psutil

from disttrain.errors import BusyError, DisttrainError, HangError, StoppedError, UsageError, error_of
from disttrain.runs.agreement import compare_peers
from disttrain.slurm_env import Node

_POLL_S = 0.2
_LINE_BYTES = 4 * 2**20  # a hello contains the config, an outcome a traceback
_TELL_S = 5.0  # for other nodes to connect and receive this node's failure
_SILENT_S = 20  # after which a node whose kernel does not answer counts as dead


class Channel:
    """The connections between the launchers: node 0 is connected to every other node.

    `unread` is data that was already received over them.
    """

    def __init__(
        self, connections: dict[int, socket.socket], hosts: Sequence[str], unread: bytes = b""
    ) -> None:
        self._connections = connections
        self._unread = dict.fromkeys(connections, unread)
        self._messages: list[tuple[int, dict[str, Any]]] = []
        self.hosts = list(hosts)
        self.lost: set[int] = set()
        """The nodes that are no longer reachable."""
        for connection in connections.values():
            connection.setblocking(False)
            for option, value in (
                (socket.TCP_KEEPIDLE, 5),
                (socket.TCP_KEEPINTVL, 5),
                (socket.TCP_KEEPCNT, 3),
                (socket.TCP_USER_TIMEOUT, 1000 * _SILENT_S),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets of the connections that are still open."""
        return [connection for node, connection in self._connections.items() if node not in self.lost]

    def send(self, message: Mapping[str, Any], node: int | None = None) -> None:
        """Sends a message to a node, or to all connected nodes."""
        line = json.dumps(message).encode() + b"\n"
        for number, connection in self._connections.items():
            if node in {None, number} and number not in self.lost:
                try:
                    connection.settimeout(5)
                    connection.sendall(line)
                    connection.setblocking(False)
                except OSError:
                    self.lost.add(number)

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """Returns the messages received since the last call, each with the node that sent it."""
        for node, connection in self._connections.items():
            while node not in self.lost:
                try:
                    data = connection.recv(2**16)
                except BlockingIOError:
                    break
                except OSError:
                    data = b""
                if not data:
                    self.lost.add(node)
                *lines, self._unread[node] = (self._unread[node] + data).split(b"\n")
                self._messages += [(node, json.loads(line)) for line in lines]
        messages, self._messages = self._messages, []
        return messages

    def ask(self, node: int, question: str, value: object, timeout_s: float) -> Any:
        """Returns a node's answer to a question, or None after `timeout_s`; `receive` still gets the rest."""
        self.send({question: value}, node)
        others, deadline = [], time.monotonic() + timeout_s
        answer = None
        while answer is None and node not in self.lost and time.monotonic() < deadline:
            for sender, message in self.receive():
                if sender == node and "answer" in message:
                    answer = message["answer"]
                else:
                    others.append((sender, message))
            time.sleep(0.02)
        self._messages = others + self._messages
        return answer

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._connections.values():
            connection.close()


def rendezvous(
    place: Node,
    processes: int,
    known: Mapping[str, str],
    *,
    timeout_s: float,
    interrupted: Callable[[], bool],
    failed: DisttrainError | None = None,
) -> Channel:
    """Connects the launchers of all nodes and compares their facts. Every node calls this.

    Args:
        place: this node.
        processes: number of processes on this node.
        known: facts that must be the same on all nodes, from `runs.agreement.facts`.
        timeout_s: how long to wait.
        interrupted: called often; returns whether to give up.
        failed: why this node cannot start the run; it then only reports that to the others.

    Raises:
        DisttrainError: the port is in use, a node did not join, the nodes differ, this node was interrupted,
            or another node failed; each with its own subclass.
    """
    hello: dict[str, Any] = {"node": place.node_rank, "host": socket.gethostname()}
    if failed is None:
        own = {"--nodes": str(place.nodes), "the number of processes": str(processes)}
        hello |= {"facts": own | dict(known)}
    else:
        hello |= {"failed": str(failed), "exit_code": failed.exit_code}
    deadline = time.monotonic() + timeout_s

    def waiting(longer_s: float = 0) -> bool:
        if interrupted():
            raise StoppedError("stopped before all nodes joined; nothing is lost, run the same command again")
        return time.monotonic() < deadline + longer_s

    return (_join_node_0 if place.node_rank else _join_others)(place, hello, waiting, timeout_s)


def _join_others(
    place: Node, hello: Mapping[str, Any], waiting: Callable[..., bool], timeout_s: float
) -> Channel:
    present: dict[int, _Caller] = {}
    try:
        _receive_nodes(place, present, waiting)
        if "failed" in hello:
            raise error_of(hello["exit_code"], hello["failed"])
        missing = sorted(set(range(1, place.nodes)) - set(present))
        if missing:
            raise HangError(
                f"{len(present) + 1} of {place.nodes} nodes joined; waited {timeout_s:g} s on "
                f"{place.master_addr}:{place.master_port} for node{'s' * (len(missing) > 1)} "
                f"{', '.join(map(str, missing))}; start the same command on every node"
            )
        everyone = [hello, *(present[node].hello for node in sorted(present))]
        compare_peers({f"node {its['node']} ({its['host']})": its["facts"] for its in everyone})
    except BaseException as error:
        for caller in present.values():
            if isinstance(error, DisttrainError):
                caller.refuse(error)
            caller.connection.close()
        raise
    hosts = [str(its["host"]) for its in everyone]
    channel = Channel({node: caller.connection for node, caller in sorted(present.items())}, hosts)
    channel.send({"hosts": hosts})
    return channel


@contextlib.contextmanager
def sharing_failures(place: Node | None) -> Iterator[None]:
    """Reports an error of this node to all nodes through node 0, so that none waits in vain.

    `place` is None for a run on one node, which reports nothing.
    """
    try:
        yield
    except DisttrainError as error:
        if place is not None:
            _outlive_others()
            with contextlib.suppress(DisttrainError):  # nobody else joined, or another node failed too
                rendezvous(place, 0, {}, timeout_s=_TELL_S, interrupted=lambda: False, failed=error)
        raise
    if place is not None:
        _outlive_others()


def _outlive_others() -> None:
    # Slurm terminates all tasks when one fails. Each should still print its error and exit with its own code.
    if "SLURM_STEP_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Caller:
    """A process that has connected to node 0, with its hello."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.hello: dict[str, Any] = {}
        self._data = b""

    def read(self) -> bool:
        """Reads what it has sent; returns whether to keep the connection."""
        try:
            part = self.connection.recv(2**16)
        except OSError:
            return False
        self._data += part
        if self._data.endswith(b"\n") and not self.hello:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                hello = json.loads(self._data)
                complete = {"host", "facts"} <= set(hello) or {"host", "failed", "exit_code"} <= set(hello)
                if isinstance(hello["node"], int) and complete:
                    self.hello = hello
            return bool(self.hello)  # without a valid hello it is some other program
        return bool(part) and len(self._data) < _LINE_BYTES

    def refuse(self, error: DisttrainError) -> None:
        """Sends the node the error that keeps the run from starting."""
        line = json.dumps({"refused": str(error), "exit_code": error.exit_code}).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.connection.settimeout(5)
            self.connection.sendall(line)


def _receive_nodes(place: Node, present: dict[int, _Caller], waiting: Callable[[], bool]) -> None:
    """Adds the nodes that connect to `present`, until all have joined or time is up.

    Raises:
        DisttrainError: the failure that a node reported.
    """
    callers: dict[socket.socket, _Caller] = {}
    failed, exit_code, until = "", 0, math.inf
    with _listen(place.master_port) as server:
        try:
            while len(present) < place.nodes - 1 and waiting() and time.monotonic() < until:
                for ready in wait_for_any([server, *callers], _POLL_S):
                    if ready is server:
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        callers[connection] = _Caller(connection)
                        continue
                    assert isinstance(ready, socket.socket)
                    caller = callers[ready]
                    keep, number = caller.read(), int(caller.hello.get("node", -1))
                    if keep and not caller.hello:
                        continue
                    if keep and "failed" in caller.hello and not failed:
                        failed = f"node {number} ({caller.hello['host']}): {caller.hello['failed']}"
                        exit_code, until = int(caller.hello["exit_code"]), time.monotonic() + _TELL_S
                    if keep and number not in present and 0 < number < place.nodes:
                        present[number] = caller
                        continue
                    if keep:
                        problem = f"--node-rank {number} is already taken or not below --nodes {place.nodes}"
                        caller.refuse(UsageError(f"{problem}; give each node a different rank"))
                    elif present.get(number) is caller:  # it may connect again
                        del present[number]
                    ready.close()
                    del callers[ready]
        finally:
            for connection, caller in callers.items():
                if caller not in present.values():
                    connection.close()
    if failed:
        raise error_of(exit_code, failed)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise BusyError(
            f"port {port} on {socket.gethostname()} cannot be used: {error.strerror}{_holder(port)}; "
            "choose another --master-port on all nodes"
        ) from None


def _holder(port: int) -> str:
    """Returns which process listens on a port, or an empty string if /proc does not show it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            here = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if here and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f" (process {connection.pid}, {name}, listens there)"
    return ""


def _join_node_0(
    place: Node, hello: Mapping[str, Any], waiting: Callable[..., bool], timeout_s: float
) -> Channel:
    problem = "no answer"
    while waiting():
        connection = None
        try:
            connection = socket.create_connection((place.master_addr, place.master_port), timeout=2)
            problem = "connected, but no answer"
            connection.sendall(json.dumps(hello).encode() + b"\n")
            connection.settimeout(_POLL_S)
            data = b""
            while waiting(timeout_s) and b"\n" not in data:  # node 0 may have started to wait later
                with contextlib.suppress(TimeoutError):
                    part = connection.recv(2**16)
                    if not part:
                        raise ConnectionError("connected, but it closed the connection")
                    data += part
            line, newline, rest = data.partition(b"\n")
            if newline:
                answer = json.loads(line)
                if "hosts" in answer:
                    channel = Channel({0: connection}, answer["hosts"], rest)
                    connection = None
                    return channel
                raise error_of(int(answer["exit_code"]), str(answer["refused"]))
        except (OSError, ValueError, KeyError, TypeError) as error:  # not listening yet, or another program
            problem = getattr(error, "strerror", None) or str(error) or problem
            time.sleep(_POLL_S)
        finally:
            if connection is not None:
                connection.close()
    raise HangError(
        f"node {place.node_rank} waited {timeout_s:g} s for node 0 at "
        f"{place.master_addr}:{place.master_port} ({problem}); start the same command there, "
        "check --master-addr, --master-port and the firewall"
    )
