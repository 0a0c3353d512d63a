"""Node 0 of a run that goes on without nodes and takes them back, with threads as the other nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from disttrain.config import Config, dump_config
from disttrain.errors import DataError, DisttrainError, HangError, StoppedError, UsageError
from disttrain.launch.elastic import Leader
from disttrain.launch.rendezvous import Channel, rendezvous
from disttrain.launch.secret import Secret
from disttrain.slurm_env import Node
from kit.nodes import LONG
from kit.plans import ONE

SECRET = Secret(LONG)


class Nodes:
    """Node 0 and the others, which join when they are told to."""

    def __init__(self, port: int, pool: ThreadPoolExecutor, nodes: int, batch_size: int) -> None:
        self.said: list[str] = []
        self.interrupted = False
        self._port, self._pool, self._nodes = port, pool, nodes
        config = Config.model_validate(
            {"name": "a", "data": {"name": "digits"}, "model": {"name": "cnn_mnist"}}
            | {"train": {"epochs": 1, "batch_size": batch_size}, "optim": {"name": "sgd", "lr": 0.1}}
        )
        plan = replace(ONE, nodes=nodes, processes=2, config=dump_config(config), stall_timeout_s=5)
        self.plan = replace(plan, wait_for_nodes_s=0.3)

    def lead(self, **changes: object) -> Leader:
        plan = replace(self.plan, **changes)  # type: ignore[arg-type]
        place = Node(self._nodes, 0, "127.0.0.1", self._port)
        return Leader(plan, place, {"lr": "1"}, SECRET, lambda: self.interrupted, self.said.append)

    def join(self, number: int, lr: str = "1", failed: DisttrainError | None = None) -> Future[Channel]:
        place = Node(self._nodes, number, "127.0.0.1", self._port)
        return self._pool.submit(
            *(rendezvous, place, 2, {"lr": lr}),
            secret=SECRET,
            timeout_s=20,
            interrupted=lambda: False,
            failed=failed,
        )

    def begin(self, leader: Leader) -> tuple[Channel, list[Channel]]:
        """Lets all nodes join; returns the channel of node 0 and those of the others."""
        calls = [self.join(number) for number in range(1, self._nodes)]
        return leader.gather(2), [call.result() for call in calls]


def close(*channels: Channel) -> None:
    for channel in channels:
        channel.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hears(channel: Channel, what: Callable[[], object]) -> None:
    """Waits as the supervisor of node 0 does."""
    wait_until(lambda: channel.receive() is not None and what())


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def three(port: int, pool: ThreadPoolExecutor) -> Nodes:
    return Nodes(port, pool, 3, batch_size=48)


def test_a_node_goes_and_comes_back(three: Nodes) -> None:
    with three.lead() as leader:
        first, others = three.begin(leader)
        assert (first.hosts, [other.node_rank for other in others]) == (others[0].hosts, [1, 2])
        close(first, *others)

        second = three.join(2)
        channel = leader.gather(1)
        own = second.result()
        assert (own.node_rank, own.left, len(own.hosts)) == (1, 1, 2)
        channel.send({"final": 1}, 1)
        hears(own, lambda: True)
        assert not channel.has_newcomers()

        back = three.join(1)
        hears(channel, channel.has_newcomers)
        close(channel, own)
        second = three.join(2)
        channel = leader.gather(1)
        assert [back.result().node_rank, second.result().node_rank] == [1, 2]
        assert three.said == [
            "going on with 2 of 3 nodes, without node 1",
            "going on with 3 of 3 nodes",
        ]
        close(channel, back.result(), second.result())


def test_both_other_nodes_go_at_once(three: Nodes) -> None:
    with three.lead() as leader:
        first, others = three.begin(leader)
        close(first, *others)
        begin = time.monotonic()
        channel = leader.gather(0)
        assert 0.3 <= time.monotonic() - begin < 3
        assert len(channel.hosts) == 1
        assert three.said == ["going on with 1 of 3 nodes, without nodes 1, 2"]


@pytest.mark.integration
def test_a_start_needs_all_nodes_and_a_restart_the_fewest(three: Nodes) -> None:
    with three.lead(stall_timeout_s=0.2) as leader, pytest.raises(HangError, match="1 of 3 nodes joined"):
        leader.gather(1)
    with three.lead(stall_timeout_s=0.4, min_nodes=2) as leader:
        first, others = three.begin(leader)
        close(first, *others)
        with pytest.raises(HangError, match="1 of 3 nodes are left, which are too few for --min-nodes 2"):
            leader.gather(1)


def test_a_node_that_differs_or_fails_is_refused_and_the_run_goes_on(three: Nodes) -> None:
    with three.lead() as leader:
        first, others = three.begin(leader)
        close(first, *others)
        channel = leader.gather(1)
        differs, fails = three.join(1, lr="2"), three.join(2, failed=DataError("no data"))
        hears(channel, lambda: differs.done() and fails.done())
        assert "lr is 1 on node 0" in str(differs.exception())
        assert isinstance(differs.exception(), UsageError)
        assert isinstance(fails.exception(), DataError)
        assert not channel.has_newcomers()
        assert {line.partition(" is not taken: ")[0][:6] for line in three.said[1:]} == {"node 1", "node 2"}
        channel.close()


def test_a_node_that_the_batch_cannot_be_divided_among_waits_for_the_end(
    port: int, pool: ThreadPoolExecutor
) -> None:
    four = Nodes(port, pool, 4, batch_size=16)  # of 8 processes; 6 do not divide it
    with four.lead() as leader:
        first, others = four.begin(leader)
        close(first, *others)
        calls = [four.join(number) for number in (1, 3)]
        channel = leader.gather(1)
        assert len(channel.hosts) == 2
        assert not channel.has_newcomers()
        close(channel)
    used, spare = calls
    close(used.result())
    assert isinstance(spare.exception(), StoppedError)
    assert "the run has ended without this node" in str(spare.exception())


def test_a_second_launcher_on_a_node_of_the_run_waits(three: Nodes) -> None:
    with three.lead() as leader:
        first, others = three.begin(leader)
        twin = three.join(1)
        hears(first, lambda: first.callers is not None and first.callers.present)
        assert not first.has_newcomers()
        close(first, *others)
        second = three.join(2)
        channel = leader.gather(1)
        assert [twin.result().node_rank, second.result().node_rank] == [1, 2]
        close(channel, twin.result(), second.result())


def test_a_stop_while_node_0_waits(three: Nodes) -> None:
    with three.lead(wait_for_nodes_s=60) as leader:
        first, others = three.begin(leader)
        waits = three.join(1)
        hears(first, lambda: first.callers is not None and first.callers.present)
        close(first, *others)
        three.interrupted = True
        with pytest.raises(StoppedError):
            leader.gather(1)
    assert isinstance(waits.exception(), StoppedError)
