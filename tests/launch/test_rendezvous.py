"""How the launchers of several nodes meet, with threads as the nodes."""

import contextlib
import json
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import disttrain
from disttrain.config import load_config
from disttrain.errors import BusyError, DataError, DisttrainError, HangError, StoppedError, UsageError
from disttrain.launch.rendezvous import Channel, rendezvous, sharing_failures
from disttrain.launch.secret import Secret
from disttrain.preflight import open_index
from disttrain.runs import agreement
from disttrain.runs.agreement import compare_peers, shared_facts
from disttrain.slurm_env import Node

SECRET = Secret("known to the nodes of this run alone")


def gather(port, *known, nodes=None, timeout_s=60, interrupted=lambda: False, ranks=None):
    """Lets nodes meet, one for each of `known`; returns a channel or an error of each."""
    nodes = len(known) if nodes is None else nodes
    with ThreadPoolExecutor(len(known)) as pool:
        calls: list[Future[Channel]] = [
            pool.submit(
                rendezvous,
                Node(nodes, rank, "127.0.0.1", port),
                2,
                its,
                secret=SECRET,
                timeout_s=timeout_s,
                interrupted=interrupted,
            )
            for rank, its in zip(ranks or range(len(known)), known, strict=True)
        ]
    return [call.exception() or call.result() for call in calls]


def receive(channel, seconds=30):
    deadline = time.monotonic() + seconds
    while not (messages := channel.receive()) and not channel.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return messages


def test_three_nodes_meet_and_speak_with_node_0(port):
    channels = gather(port, {"a": "1"}, {"a": "1"}, {"a": "1"})
    try:
        assert [channel.hosts for channel in channels] == [[socket.gethostname()] * 3] * 3
        channels[0].send({"hello": "all"})
        assert [receive(channel) for channel in channels[1:]] == [[(0, {"hello": "all"})]] * 2
        channels[2].send({"from": 2, "long": "x" * 300000})
        ((node, message),) = receive(channels[0])
        assert (node, message["from"], len(message["long"])) == (2, 2, 300000)
        with socket.create_server(("127.0.0.1", port)):
            pass  # the port is free for the ranks
    finally:
        for channel in channels:
            channel.close()


def test_an_answer_does_not_swallow_other_messages(port):
    channels = gather(port, {}, {})
    with contextlib.closing(channels[0]), contextlib.closing(channels[1]), ThreadPoolExecutor(1) as pool:
        channels[1].send({"rows": []})
        answer = pool.submit(channels[0].ask, 1, "stacks", 3, 30)
        assert receive(channels[1]) == [(0, {"stacks": 3})]
        channels[1].send({"answer": "here"})
        assert answer.result() == "here"
        assert channels[0].receive() == [(1, {"rows": []})]
        assert channels[0].ask(1, "stacks", 3, 0.1) is None


def test_a_node_that_goes_is_missed(port):
    channels = gather(port, {}, {})
    channels[1].send({"last": "words"})
    channels[1].close()
    assert receive(channels[0]) == [(1, {"last": "words"})]
    assert receive(channels[0]) == []
    assert channels[0].lost == {1}
    channels[0].send({"nobody": "hears"})
    channels[0].close()


def test_nodes_that_differ_are_refused_everywhere_with_both_values(port):
    errors = gather(port, {"optim.lr": "0.1", "same": "x"}, {"optim.lr": "0.2", "same": "x"})
    host = socket.gethostname()
    text = f"mismatch: optim.lr is 0.1 on node 0 ({host}) and 0.2 on node 1 ({host}); make them match"
    assert [(type(error), str(error)) for error in errors] == [(UsageError, text)] * 2


@pytest.mark.integration
def test_a_node_that_does_not_come_is_named_where_it_was_waited_for(port):
    errors = gather(port, {}, {}, nodes=4, timeout_s=1)
    for error in errors:
        assert isinstance(error, HangError)
        assert str(error) == (
            f"2 of 4 nodes joined; waited 1 s on 127.0.0.1:{port} for nodes 2, 3; "
            "start the same command on every node"
        )
    (alone,) = gather(port, {}, nodes=2, timeout_s=1, ranks=[1])
    assert isinstance(alone, HangError)
    assert f"node 1 waited 1 s for node 0 at 127.0.0.1:{port} (Connection refused)" in str(alone)


@pytest.mark.integration
def test_two_nodes_of_the_same_number(port):
    first, *others = gather(port, {}, {}, {}, nodes=3, timeout_s=3, ranks=[0, 1, 1])
    assert isinstance(first, HangError)
    assert {type(error) for error in others} == {HangError, UsageError}
    assert any("--node-rank 1 is already taken" in str(error) for error in others)


def test_a_port_that_is_taken_is_named_with_its_holder(taken_port):
    (error,) = gather(taken_port, {}, nodes=2)
    assert isinstance(error, BusyError)
    assert f"port {taken_port} on {socket.gethostname()} cannot be used: Address already in use" in str(error)
    assert "listens there" in str(error)


def test_a_stop_ends_the_waiting(port):
    errors = gather(port, {}, {}, nodes=3, interrupted=lambda: True)
    assert [type(error) for error in errors] == [StoppedError] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_what_keeps_one_node_from_beginning_ends_the_others_with_it(port, failing):
    def fail():
        with sharing_failures(Node(3, failing, "127.0.0.1", port), SECRET):
            raise DataError("there is no data set 'digits'")

    with ThreadPoolExecutor(3) as pool:
        begin = time.monotonic()
        calls = [
            pool.submit(
                rendezvous,
                Node(3, rank, "127.0.0.1", port),
                2,
                {},
                secret=SECRET,
                timeout_s=60,
                interrupted=lambda: False,
            )
            for rank in range(3)
            if rank != failing
        ]
        errors = [call.exception() for call in [pool.submit(fail), *calls]]
        assert time.monotonic() - begin < 20
    place = f"node 1 ({socket.gethostname()}): " if failing else ""
    assert [str(error) for error in errors[1:]] == [f"{place}there is no data set 'digits'"] * 2
    assert all(isinstance(error, DataError) for error in errors)


@pytest.mark.integration
def test_a_node_that_fails_alone_ends_by_itself(port):
    begin = time.monotonic()
    with pytest.raises(DataError), sharing_failures(Node(2, 1, "127.0.0.1", port), SECRET):
        raise DataError("x")
    assert time.monotonic() - begin < 20


def test_what_must_be_the_same(tmp_path: Path, config_file: Path, digits_root: Path):
    def found(*overrides: str) -> dict[str, str]:
        config = load_config(config_file, [f"data.root={digits_root}", *overrides])
        return shared_facts(config, open_index(config, print))

    here = found()
    assert json.loads(json.dumps(here)) == here
    compare_peers({"a": here, "b": found("data.cache=none", "monitor.stall_timeout_s=5"), "c": here})
    for others, words in (
        (found("seed=3"), "seed is 0 on a and 3 on c"),
        (here | {"the version of torch": "1.0"}, "and 1.0 on c"),
        ({k: v for k, v in here.items() if not k.startswith("the index of")}, "the index of digits is "),
    ):
        with pytest.raises(DisttrainError, match="mismatch: ") as caught:
            compare_peers({"a": here, "b": here, "c": others})
        assert words in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_source_tree_that_is_not_installed_knows_its_version(
    digits_root: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "disttrain":
            raise PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(agreement, "version", version)
    config = load_config(config_file, [f"data.root={digits_root}"])
    assert (
        shared_facts(config, open_index(config, print))["the version of disttrain"] == disttrain.__version__
    )
