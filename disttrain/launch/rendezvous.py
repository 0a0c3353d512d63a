"""The rendezvous of the nodes of a run: their launchers connect, compare facts and exchange messages.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disttrain.errors import DisttrainError, HangError, StoppedError, UsageError, error_of, reason
from disttrain.launch.callers import MESSAGE_BYTES, POLL_S, TELL_S, Callers, listen, notice_loss
from disttrain.launch.secret import (
    LINE_BYTES,
    NO_SECRET,
    REMEDY,
    SECRET,
    Secret,
    UnknownSecretError,
    new_nonce,
    parse_greeting,
    proof,
    proof_line,
)
from disttrain.runs.agreement import compare_peers
from disttrain.slurm_env import Node

_PROOF_S = 10.0  # for node 0 to prove that it knows the secret
_UNSEEN_S = 60.0  # until a new file of node 0 is seen on NFS, whose clients remember what was not there


class Channel:
    """The connections between the launchers: node 0 is connected to every other node.

    `unread` is data that was already received over them. `node_rank` is the rank of this node among those
    that are connected, and `left` how often the run may still restart.
    """

    def __init__(
        self,
        connections: dict[int, socket.socket],
        hosts: Sequence[str],
        unread: bytes = b"",
        *,
        node_rank: int = 0,
        left: int = 0,
    ) -> None:
        self._connections = connections
        self._unread = dict.fromkeys(connections, unread)
        self._messages: list[tuple[int, dict[str, Any]]] = []
        self.hosts = list(hosts)
        self.node_rank = node_rank
        self.left = left
        self.lost: set[int] = set()
        """The nodes that are no longer reachable."""
        self.callers: Callers | None = None
        """Heard along with the nodes: those who want to join while the run goes on."""
        self.has_newcomers: Callable[[], bool] = lambda: False
        """Returns whether the run should restart with more nodes."""
        for connection in connections.values():
            connection.setblocking(False)
            notice_loss(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets of the connections that are still open."""
        nodes = [connection for node, connection in self._connections.items() if node not in self.lost]
        return nodes if self.callers is None else nodes + self.callers.sockets

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
        if self.callers is not None:
            self.callers.hear(0)
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
                try:
                    self._messages += [(node, json.loads(line)) for line in lines]
                except ValueError:
                    self.lost.add(node)
                if len(self._unread[node]) > MESSAGE_BYTES:
                    self.lost.add(node)
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
    secret: Secret,
    timeout_s: float,
    interrupted: Callable[[], bool],
    say: Callable[[str], None] = lambda text: None,
    failed: DisttrainError | None = None,
) -> Channel:
    """Connects the launchers of all nodes and compares their facts. Every node calls this.

    Args:
        place: this node.
        processes: number of processes on this node.
        known: facts that must be the same on all nodes, from `runs.agreement.facts`.
        secret: what every node proves that it knows, before it says more.
        timeout_s: how long to wait.
        interrupted: called often; returns whether to give up.
        say: called on node 0 with a line about callers that are no nodes of this run.
        failed: why this node cannot start the run; it then only reports that to the others.

    Raises:
        DisttrainError: the port is in use, a node did not join, the nodes differ, this node was interrupted,
            the secret is not safe or not that of node 0, or another node failed; each with its own subclass.
    """
    hello = hello_of(place, processes, known)
    if failed is not None:
        del hello["facts"]
        hello |= {"failed": str(failed), "exit_code": failed.exit_code}
    waiting = patience(timeout_s, interrupted)
    if place.node_rank:
        return _join_node_0(place, hello, waiting, timeout_s, secret)
    return _join_others(place, hello, waiting, timeout_s, secret, say)


def hello_of(place: Node, processes: int, known: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a node says of itself; arguments as of `rendezvous`."""
    own = {"--nodes": str(place.nodes), "the number of processes": str(processes)}
    return {"node": place.node_rank, "host": socket.gethostname(), "facts": own | dict(known)}


def patience(timeout_s: float, interrupted: Callable[[], bool]) -> Callable[..., bool]:
    """Returns a function that tells whether to wait on; it raises StoppedError if `interrupted` says so."""
    deadline = time.monotonic() + timeout_s

    def waiting(longer_s: float = 0) -> bool:
        if interrupted():
            raise StoppedError("stopped before all nodes joined; nothing is lost, run the same command again")
        return time.monotonic() < deadline + longer_s

    return waiting


def _join_others(
    place: Node,
    hello: Mapping[str, Any],
    waiting: Callable[..., bool],
    timeout_s: float,
    secret: Secret,
    say: Callable[[str], None],
) -> Channel:
    with listen(place.master_port) as server, secret.offered(holds_folder="facts" in hello) as known:
        callers = Callers(place, server, known, say)
        wait_for_all(callers, place, hello, waiting, timeout_s)
        server.close()  # the ranks need the port as soon as the other nodes know that all are there
        channel = connect(callers, range(place.nodes), hello)
        callers.close(None)
        return channel


def wait_for_all(
    callers: Callers,
    place: Node,
    hello: Mapping[str, Any],
    waiting: Callable[..., bool],
    timeout_s: float,
) -> None:
    """Waits on node 0 until all nodes have joined, and compares their facts.

    Raises:
        DisttrainError: a node failed or did not join, or the nodes differ; those that have joined are told.
    """
    present = callers.present
    try:
        callers.receive(waiting)
        if callers.failure is not None:
            raise callers.failure
        if "failed" in hello:
            raise error_of(hello["exit_code"], hello["failed"])
        missing = sorted(set(range(1, place.nodes)) - set(present))
        if missing:
            remedy = "start the same command on every node"
            remedy += f", and {REMEDY}" if callers.without_secret else ""
            raise HangError(
                f"{len(present) + 1} of {place.nodes} nodes joined; waited {timeout_s:g} s on "
                f"{place.master_addr}:{place.master_port} for node{'s' * (len(missing) > 1)} "
                f"{', '.join(map(str, missing))}; {remedy}"
            )
        compare_hellos(hello, *(present[node].hello for node in sorted(present)))
    except BaseException as error:
        callers.close(error)
        raise


def compare_hellos(*hellos: Mapping[str, Any]) -> None:
    """Raises UsageError if the facts of the nodes that sent these differ."""
    compare_peers({f"node {its['node']} ({its['host']})": its["facts"] for its in hellos})


def connect(callers: Callers, nodes: Sequence[int], hello: Mapping[str, Any], left: int = 0) -> Channel:
    """Returns the channel of node 0 to nodes that have joined, and tells them that they are connected.

    Args:
        callers: those who have joined.
        nodes: their numbers and 0, in the order of their ranks.
        hello: of node 0.
        left: how often the run may still restart.
    """
    taken = {rank: callers.take(node) for rank, node in enumerate(nodes) if node}
    hosts = [str(its["host"]) for its in (hello, *(caller.hello for caller in taken.values()))]
    channel = Channel({rank: caller.connection for rank, caller in taken.items()}, hosts, left=left)
    for rank in taken:
        channel.send({"hosts": hosts, "node_rank": rank, "left": left}, rank)
    return channel


@contextlib.contextmanager
def sharing_failures(place: Node | None, secret: Secret) -> Iterator[None]:
    """Reports an error of this node to all nodes through node 0, so that none waits in vain.

    Args:
        place: this node; None for a run on one node, which reports nothing.
        secret: that of the run.
    """
    try:
        yield
    except DisttrainError as error:
        if place is not None:
            _outlive_others()
            with contextlib.suppress(DisttrainError):  # nobody else joined, or another node failed too
                rendezvous(
                    place, 0, {}, secret=secret, timeout_s=TELL_S, interrupted=lambda: False, failed=error
                )
        raise
    if place is not None:
        _outlive_others()


def _outlive_others() -> None:
    # Slurm terminates all tasks when one fails. Each should still print its error and exit with its own code.
    if "SLURM_STEP_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Lines:
    """The lines that node 0 sends; `rest` is what it sent after the last of them."""

    def __init__(self, connection: socket.socket) -> None:
        self.rest = b""
        self._connection = connection

    def read(self, most_bytes: int, waiting: Callable[[], bool]) -> bytes:
        """Returns the next line.

        Raises:
            TimeoutError: `waiting` returned False.
            ConnectionError: the connection was closed, or the line is too long.
        """
        self._connection.settimeout(POLL_S)
        while b"\n" not in self.rest:
            if len(self.rest) > most_bytes:
                raise ConnectionError("connected, but another program answers")
            if not waiting():
                raise TimeoutError
            with contextlib.suppress(TimeoutError):
                part = self._connection.recv(min(2**16, most_bytes))
                if not part:
                    raise ConnectionError("connected, but it closed the connection")
                self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return line


def _join_node_0(
    place: Node, hello: Mapping[str, Any], waiting: Callable[..., bool], timeout_s: float, secret: Secret
) -> Channel:
    address = f"{place.master_addr}:{place.master_port}"
    problem, unknown, unknown_since = "no answer", False, math.inf
    while waiting():
        connection = None
        try:
            connection = socket.create_connection((place.master_addr, place.master_port), timeout=2)
            if not problem.startswith("connected"):
                problem = "connected, but no answer"
            lines = _Lines(connection)
            _prove(connection, lines, secret, waiting)
            connection.settimeout(5)
            connection.sendall(json.dumps(hello).encode() + b"\n")
            # Node 0 may have started to wait later than this node.
            answer = json.loads(lines.read(MESSAGE_BYTES, lambda: waiting(timeout_s)))
            if "wait" in answer:
                notice_loss(connection)
                answer = json.loads(lines.read(MESSAGE_BYTES, lambda: waiting(math.inf)))
            if "hosts" in answer:
                ranks = {"node_rank": int(answer["node_rank"]), "left": int(answer["left"])}
                channel = Channel({0: connection}, answer["hosts"], lines.rest, **ranks)
                connection = None
                return channel
            raise error_of(int(answer["exit_code"]), str(answer["refused"]))
        except UnknownSecretError as error:
            problem, unknown, unknown_since = str(error), True, min(unknown_since, time.monotonic())
            if secret.file is None or time.monotonic() - unknown_since > _UNSEEN_S:
                break
            time.sleep(POLL_S)
        except TimeoutError:  # what was known before says more
            time.sleep(POLL_S)
        except (OSError, ValueError, KeyError, TypeError) as error:  # not listening yet, or another program
            problem, unknown = getattr(error, "strerror", None) or str(error) or problem, False
            time.sleep(POLL_S)
        finally:
            if connection is not None:
                connection.close()
    if unknown:
        raise UsageError(f"node 0 at {address} turned this node away: {problem}; {REMEDY}")
    raise HangError(
        f"node {place.node_rank} waited {timeout_s:g} s for node 0 at {address} ({problem}); start the same "
        "command there, check --master-addr, --master-port and the firewall"
    )


def _prove(connection: socket.socket, lines: _Lines, secret: Secret, waiting: Callable[..., bool]) -> None:
    """Proves to node 0 that this node knows the secret, and has node 0 prove it.

    Raises:
        UnknownSecretError: this node cannot read the secret, or node 0 has another one.
        ConnectionError: another program answers, or nobody does.
    """
    deadline = time.monotonic() + _PROOF_S

    def soon() -> bool:
        return bool(waiting()) and time.monotonic() < deadline

    nonce = parse_greeting(lines.read(LINE_BYTES, soon))
    try:
        known = secret.read()
    except OSError as error:
        connection.sendall(NO_SECRET + b"\n")
        raise UnknownSecretError(f"{secret.file}: {reason(error)}") from None
    own = new_nonce()
    connection.sendall(proof_line(known, nonce, own))
    answer = lines.read(LINE_BYTES, soon)
    if answer == NO_SECRET:
        raise UnknownSecretError(f"it has another secret than {secret.file or SECRET}")
    if not hmac.compare_digest(answer, proof(known, "node 0", nonce, own)):
        raise ConnectionError("connected, but another program answers")
