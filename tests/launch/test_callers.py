"""Strangers at the port of node 0, and at that which a node takes for it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from disttrain.errors import HangError
from disttrain.launch import callers, rendezvous
from disttrain.launch.rendezvous import Channel
from disttrain.launch.secret import Secret, parse_greeting, proof, proof_line
from kit.nodes import LONG, join

SECRET = Secret(LONG)
ZEROS = "0" * 64


@dataclass
class Waiting:
    """Node 0 while it waits for node 1."""

    port: int
    channel: Future[Channel]
    notes: list[str] = field(default_factory=list)

    def call(self) -> tuple[socket.socket, bytes]:
        """Connects to node 0; returns the connection and its greeting."""
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(ConnectionError):
                connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
                return connection, connection.recv(99)
            assert time.monotonic() < deadline

    def join(self) -> list[str]:
        """Lets the right node join; returns what was said about strangers."""
        channels = [join(self.port, 1, SECRET), self.channel.result()]
        channels[0].send({"outcome": "of the right node"})
        messages = []
        while not messages:
            messages = channels[1].receive()
        assert messages == [(1, {"outcome": "of the right node"})]
        for channel in channels:
            channel.close()
        return self.notes


@pytest.fixture
def node_0(port: int) -> Iterator[Waiting]:
    with ThreadPoolExecutor(1) as pool:
        notes: list[str] = []
        yield Waiting(port, pool.submit(join, port, 0, SECRET, say=notes.append), notes)


def hung_up(stranger: socket.socket) -> bool:
    """Tells whether node 0 ends the connection within half a minute without another word."""
    try:
        return stranger.recv(99) == b""
    except ConnectionError:
        return True


HELLO = json.dumps({"node": 1, "host": "evil", "facts": {"--nodes": "2"}}).encode() + b"\n"
FAILED = json.dumps({"node": 1, "host": "evil", "failed": "no", "exit_code": 65}).encode() + b"\n"
OUTCOME = json.dumps({"outcome": {"exit_code": 70, "message": "all is lost"}}).encode() + b"\n"


@pytest.mark.parametrize(
    "word",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),  # TLS
        HELLO,
        HELLO + OUTCOME,
        FAILED,
        b"%s %s\n" % (ZEROS.encode(), ZEROS[1:].encode()),
        b"%s %s\n%s" % (ZEROS.encode(), ZEROS.encode(), HELLO),
    ],
)
def test_a_stranger_is_turned_away_and_noted_once(word: bytes, node_0: Waiting) -> None:
    for _ in range(3):
        stranger, _ = node_0.call()
        with stranger:
            stranger.sendall(word)
            assert hung_up(stranger)
    (note,) = node_0.join()
    expected = f"port {node_0.port}: turned away 127.0.0.1, which sent "
    assert note in {expected + "something other than a proof", expected + "too much"}


def test_a_stranger_that_poses_as_a_node_with_a_guess(node_0: Waiting) -> None:
    stranger, greeting = node_0.call()
    with stranger:
        stranger.sendall(proof_line(b"a guess of the secret", parse_greeting(greeting.strip()), ZEROS))
        assert stranger.recv(99) == b"no secret\n"
        assert hung_up(stranger)
    (note,) = node_0.join()
    assert "which has another secret than this run; if it is a node of this run, set DISTTRAIN" in note


def test_a_proof_that_was_overheard_is_worth_nothing(node_0: Waiting) -> None:
    first, greeting = node_0.call()
    line = proof_line(LONG.encode(), parse_greeting(greeting.strip()), ZEROS)
    with first:
        first.sendall(line)
        own = proof(LONG.encode(), "node 0", parse_greeting(greeting.strip()), ZEROS)
        assert first.recv(99) == own + b"\n", "the proof is right"
    for replayed in (line, ZEROS.encode() + b" " + own + b"\n"):
        stranger, other = node_0.call()
        with stranger:
            assert other != greeting
            stranger.sendall(replayed)
            assert stranger.recv(99) == b"no secret\n"
            assert hung_up(stranger)
    node_0.join()


def test_a_gigabyte_is_not_read(node_0: Waiting) -> None:
    stranger, _ = node_0.call()
    with stranger:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**30:
                sent += stranger.send(bytes(2**20))
        assert sent < 2**26, "what the buffers of the kernel hold"
    (note,) = node_0.join()
    assert note.endswith("sent too much")


def test_silent_strangers_hold_up_nobody(node_0: Waiting) -> None:
    strangers = [node_0.call()[0] for _ in range(callers._MOST_STRANGERS + 10)]
    begin = time.monotonic()
    (note,) = node_0.join()
    assert time.monotonic() - begin < 5
    assert note.endswith("which was the oldest of too many callers")
    for stranger in strangers:
        with stranger:
            assert hung_up(stranger)


def test_a_silent_stranger_is_dropped(node_0: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_PATIENCE_S", 0.2)
    stranger, _ = node_0.call()
    with stranger:
        stranger.send(b"0")
        assert hung_up(stranger)
    assert node_0.join() == [f"port {node_0.port}: turned away 127.0.0.1, which proved nothing within 0.2 s"]


def test_strangers_from_everywhere_fill_no_log(node_0: Waiting) -> None:
    for number in range(1, 9):
        with socket.socket() as stranger:
            stranger.settimeout(30)
            stranger.bind((f"127.0.0.{number}", 0))
            while stranger.connect_ex(("127.0.0.1", node_0.port)):
                time.sleep(0.01)
            stranger.send(b"hello\n")
            while stranger.recv(99):
                pass
    assert [note.split()[4] for note in node_0.join()] == [f"127.0.0.{number}," for number in range(1, 6)]


# --- In the place of node 0 -------------------------------------------------------------------------


@pytest.fixture
def heard() -> list[bytes]:
    """What a node has said to the stranger that it took for node 0."""
    return []


def poses(port: int, answer: Callable[[socket.socket, list[bytes]], None], heard: list[bytes]) -> HangError:
    """Lets a node call a stranger in the place of node 0; returns the node's error."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller, contextlib.suppress(ConnectionError):
                    caller.settimeout(5)
                    answer(caller, heard)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(HangError) as caught:
            join(port, 1, SECRET, timeout_s=2)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    return caught.value


def greets(caller: socket.socket, heard: list[bytes]) -> None:
    caller.sendall(b"disttrain 1 " + ZEROS.encode() + b"\n")
    heard.append(caller.recv(999))
    caller.sendall(ZEROS.encode() + b"\n")
    heard.append(caller.recv(999))


def echoes(caller: socket.socket, heard: list[bytes]) -> None:
    caller.sendall(b"disttrain 1 " + ZEROS.encode() + b"\n")
    heard.append(caller.recv(999))
    caller.sendall(heard[-1].split()[-1] + b"\n")  # the node's own proof
    heard.append(caller.recv(999))


def endless(caller: socket.socket, heard: list[bytes]) -> None:
    while True:
        heard.append(b"%d" % caller.send(bytes(2**16)))


def web(caller: socket.socket, heard: list[bytes]) -> None:
    caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    heard.append(caller.recv(999))


@pytest.mark.parametrize("answer", [greets, echoes, endless, web])
def test_a_node_tells_nothing_to_a_stranger_in_the_place_of_node_0(
    answer: Callable[[socket.socket, list[bytes]], None], port: int, heard: list[bytes]
) -> None:
    error = poses(port, answer, heard)
    assert "(connected, but another program answers)" in str(error)
    assert not [word for word in heard if b"facts" in word]
    if answer is endless:
        assert sum(map(int, heard)) < 2**26


# --- After the proof --------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [b"x" * 5000, b"{]\n"])
def test_a_node_that_sends_too_much_or_nonsense_is_lost(
    message: bytes, node_0: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MESSAGE_BYTES", 4096)
    channels = [join(node_0.port, 1, SECRET), node_0.channel.result()]
    channels[0].sockets[0].sendall(message)
    deadline = time.monotonic() + 30
    while not channels[1].lost:
        assert channels[1].receive() == []
        assert time.monotonic() < deadline
    for channel in channels:
        channel.close()


def test_a_hello_has_a_limit_too(node_0: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "MESSAGE_BYTES", 4096)
    stranger, greeting = node_0.call()
    with stranger:
        stranger.sendall(proof_line(LONG.encode(), parse_greeting(greeting.strip()), ZEROS))
        assert len(stranger.recv(99)) == 65
        with contextlib.suppress(ConnectionError):
            stranger.sendall(bytes(2**20))
        assert hung_up(stranger)
    assert node_0.join() == []
