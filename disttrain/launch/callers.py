"""The port of node 0: who calls there, and which callers are nodes of the run.

A caller has 10 seconds to prove that it knows the secret of the run. Until then, node 0 reads one short line
from it. Nobody waits for a caller: neither node 0 nor the other callers.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import psutil

from disttrain.errors import BusyError, DisttrainError, UsageError, error_of
from disttrain.launch.secret import (
    LINE_BYTES,
    NO_SECRET,
    REMEDY,
    UnknownSecretError,
    check_proof_line,
    greeting,
    new_nonce,
)
from disttrain.slurm_env import Node

MESSAGE_BYTES = 64 * 2**20
"""The longest message of a node: a hello has the config, an outcome a traceback."""

TELL_S = 5.0
"""How long other nodes have to connect and to receive this node's failure."""

POLL_S = 0.2
"""Interval of looking whether to go on."""

_PATIENCE_S = 10.0  # for a caller to prove itself
_MOST_STRANGERS = 128  # callers beside the nodes that may be in their proof at once
_MOST_NOTES = 5
_SILENT_S = 20  # after which a node whose kernel does not answer counts as dead


class Caller:
    """A process that has connected to node 0, with its hello once it has proved itself."""

    def __init__(self, connection: socket.socket, address: str, secret: bytes) -> None:
        self.connection = connection
        self.address = address
        self.proved = False
        self.hello: dict[str, Any] = {}
        self.since = time.monotonic()
        self._secret = secret
        self._nonce = new_nonce()
        self._data = bytearray()
        connection.setblocking(False)
        notice_loss(connection)
        with contextlib.suppress(OSError):  # it has hung up; the next read shows that
            connection.send(greeting(self._nonce))

    def read(self) -> None:
        """Reads what it has sent.

        Raises:
            UnknownSecretError: it does not know the secret; the message says what it has done.
            ConnectionError: it is not heard any longer; the message says what it has done.
        """
        try:
            part = self.connection.recv(2**16 if self.proved else LINE_BYTES)
        except OSError:
            part = b""
        if not part:
            raise ConnectionError("hung up")
        self._data += part
        if len(self._data) > (MESSAGE_BYTES if self.proved else LINE_BYTES):
            raise ConnectionError("sent too much")
        if not self._data.endswith(b"\n"):
            return
        line = bytes(self._data[:-1])
        self._data.clear()
        if self.proved:
            self._take_hello(line)
        else:
            self._take_proof(line)

    def _take_proof(self, line: bytes) -> None:
        if line == NO_SECRET:
            raise UnknownSecretError("cannot read the secret of this run")
        try:
            own = check_proof_line(self._secret, self._nonce, line)
        except ValueError:
            raise ConnectionError("sent something other than a proof") from None
        with contextlib.suppress(OSError):
            self.connection.send((own or NO_SECRET) + b"\n")
        if own is None:
            raise UnknownSecretError("has another secret than this run")
        self.proved = True

    def _take_hello(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            hello = json.loads(line)
            complete = {"host", "facts"} <= set(hello) or {"host", "failed", "exit_code"} <= set(hello)
            if isinstance(hello["node"], int) and complete and not self.hello:
                self.hello = hello
                return
        raise ConnectionError("sent something other than a hello")

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends the node a message; if it has hung up, the next read shows that."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(5)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
            self.connection.setblocking(False)

    def refuse(self, error: DisttrainError) -> None:
        """Sends the node the error that keeps it from joining."""
        self.send({"refused": str(error), "exit_code": error.exit_code})


class Callers:
    """All that call at the port of node 0.

    Args:
        place: this node.
        server: listens at the port.
        secret: what a caller must prove that it knows.
        say: called with a line about a stranger, once for each address and at most five times.
    """

    def __init__(self, place: Node, server: socket.socket, secret: bytes, say: Callable[[str], None]) -> None:
        server.setblocking(False)
        self._place = place
        self._server = server
        self._secret = secret
        self._say = say
        self._callers: dict[socket.socket, Caller] = {}
        self._noted: set[str] = set()
        self._until = math.inf  # when to stop waiting for more nodes, after a failure
        self.present: dict[int, Caller] = {}
        """The nodes that have joined, by rank."""
        self.failure: DisttrainError | None = None
        """Why a node cannot start the run."""
        self.without_secret = False
        """Whether a caller spoke like a node but did not know the secret."""
        self.admit: Callable[[Caller], None] | None = None
        """Called with each node that would join; raises a DisttrainError to refuse it."""

    @property
    def sockets(self) -> list[socket.socket]:
        """Those on which callers are heard."""
        return [self._server, *self._callers]

    def receive(self, waiting: Callable[[], bool]) -> None:
        """Lets nodes join until all have joined, time is up, or one has failed and the others know it.

        Args:
            waiting: called often; returns whether to go on.
        """
        while len(self.present) < self._place.nodes - 1 and waiting() and time.monotonic() < self._until:
            self.hear(POLL_S)

    def hear(self, timeout_s: float) -> None:
        """Waits until somebody calls or says something, at most `timeout_s`, and hears all who do."""
        for ready in wait_for_any(self.sockets, timeout_s):
            assert isinstance(ready, socket.socket)
            if ready is self._server:
                self._accept()
            elif ready in self._callers:
                self._hear(self._callers[ready])
        for caller in self._unproved():
            if time.monotonic() - caller.since > _PATIENCE_S:
                self._drop(caller, f"proved nothing within {_PATIENCE_S:g} s")

    def take(self, number: int) -> Caller:
        """Returns a node that has joined, and hears it no longer."""
        caller = self.present.pop(number)
        del self._callers[caller.connection]
        return caller

    def close(self, error: BaseException | None) -> None:
        """Hangs up on all; tells the nodes among them the error, if it is one for the user."""
        for caller in self._callers.values():
            if isinstance(error, DisttrainError) and caller in self.present.values():
                caller.refuse(error)
            caller.connection.close()
        self._callers.clear()
        self.present.clear()

    def _unproved(self) -> list[Caller]:
        return [caller for caller in self._callers.values() if not caller.proved]

    def _accept(self) -> None:
        try:
            connection, address = self._server.accept()
        except OSError:  # it has hung up already
            return
        caller = Caller(connection, str(address[0]).removeprefix("::ffff:"), self._secret)
        self._callers[connection] = caller
        unproved = self._unproved()
        if len(unproved) > _MOST_STRANGERS + self._place.nodes:
            self._drop(unproved[0], "was the oldest of too many callers")

    def _hear(self, caller: Caller) -> None:
        try:
            caller.read()
        except UnknownSecretError as error:
            self.without_secret = True
            self._drop(caller, f"{error}; if it is a node of this run, {REMEDY}")
            return
        except ConnectionError as error:
            self._drop(caller, str(error))
            return
        if not caller.hello:
            return
        number = int(caller.hello["node"])
        try:
            if self.admit is not None:
                self.admit(caller)
        except DisttrainError as error:
            self._say(f"node {number} ({caller.hello['host']}) is not taken: {error}")
            caller.refuse(error)
            self._drop(caller, str(error))
            return
        if "failed" in caller.hello and self.failure is None:
            text = f"node {number} ({caller.hello['host']}): {caller.hello['failed']}"
            self.failure = error_of(int(caller.hello["exit_code"]), text)
            self._until = time.monotonic() + TELL_S
        if number not in self.present and 0 < number < self._place.nodes:
            self.present[number] = caller
            return
        problem = f"--node-rank {number} is already taken or not below --nodes {self._place.nodes}"
        caller.refuse(UsageError(f"{problem}; give each node a different rank"))
        self._drop(caller, problem)

    def _drop(self, caller: Caller, why: str) -> None:
        """Hangs up on a caller. A node may connect again."""
        caller.connection.close()
        del self._callers[caller.connection]
        for number in [number for number, other in self.present.items() if other is caller]:
            del self.present[number]
        if caller.proved or caller.address in self._noted or len(self._noted) == _MOST_NOTES:
            return
        self._noted.add(caller.address)
        self._say(f"port {self._place.master_port}: turned away {caller.address}, which {why}")


def notice_loss(connection: socket.socket) -> None:
    """Lets a connection fail within about 20 s when the other side is gone without a word."""
    for option, value in (
        (socket.TCP_KEEPIDLE, 5),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 1000 * _SILENT_S),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def listen(port: int) -> socket.socket:
    """Returns a socket that listens at a port, on all addresses.

    Raises:
        BusyError: the port is in use.
    """
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
