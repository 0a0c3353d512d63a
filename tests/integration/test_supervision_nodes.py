"""The same on two nodes, and without our launcher."""

import contextlib
import itertools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.commands import wait_for
from kit.marks import nightly
from kit.run_results import status
from kit.supervision import HOST, STALL_S, Start, descendants, ended, run


def trains(tmp_path: Path) -> bool:
    """Tells whether the first log point is behind the run: the file is made before training begins."""
    metrics = tmp_path / "run/metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


# --- Two nodes ------------------------------------------------------------------------------------


def node(start: Start, number: int, port: int, *arguments: str, **fault: Any) -> Any:
    place = ["--nodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1"]
    place += ["--master-port", str(port)]
    return run(start, "--procs", "1", "-q", *place, *arguments, **fault)


def two_nodes(start: Start, port: int, *arguments: str, **fault: Any) -> list[subprocess.Popen[str]]:
    return [node(start, number, port, *arguments, **fault) for number in (0, 1)]


def both(processes: list[subprocess.Popen[str]], tmp_path: Path) -> tuple[list[int], list[str]]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not descendants(tmp_path), outputs
    return [process.returncode for process in processes], outputs


@contextlib.contextmanager
def stranger(port: int) -> Iterator[None]:
    """Calls at the port of the launchers again and again, and says what a node would."""
    done = threading.Event()
    words = [
        b'{"node": 1, "host": "evil", "facts": {}}\n{"outcome": {"exit_code": 70}}\n',
        b'{"node": 1, "host": "evil", "failed": "no", "exit_code": 65}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 2**20,
        b"",
    ]

    def hammer() -> None:
        for word in itertools.cycle(words):
            if done.wait(0.01):
                return
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as caller:
                if caller.recv(99).startswith(b"disttrain"):  # torch's store, which follows, says nothing
                    caller.sendall(word)
                    caller.recv(99)

    thread = threading.Thread(target=hammer)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.nightly
def test_two_nodes_train_although_a_stranger_hammers_at_their_port(
    start: Start, tmp_path: Path, port: int
) -> None:
    first = node(start, 0, port, "train.epochs=2")
    with stranger(port):
        wait_for(lambda: (tmp_path / "run/.secret").exists(), first)
        assert (tmp_path / "run/.secret").stat().st_mode & 0o777 == 0o600
        time.sleep(1)
        codes, outputs = both([first, node(start, 1, port, "train.epochs=2")], tmp_path)
    assert codes == [0, 0], outputs
    assert outputs[0].count("turned away 127.0.0.1") == 1, outputs
    assert not (tmp_path / "run/.secret").exists()
    state = status(tmp_path / "run")
    assert (state["state"], state["world_size"], state["samples_seen"]) == ("finished", 2, 2 * 1438)
    assert (tmp_path / "run/logs/launch_00001.log").exists()


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise", 70, f"rank 1 on {HOST} failed: RuntimeError: the pump is dry"),
        *nightly(
            ("loop", 71, f"rank 1 on {HOST} hangs"),
            ("kill", 70, f"rank 1 on {HOST} was killed by SIGKILL in step"),
            ("stop", 71, f"rank 1 on {HOST} hangs"),
        ),
    ],
)
def test_both_nodes_name_the_rank_that_failed_on_the_second(
    how: str, code: int, words: str, start: Start, tmp_path: Path, port: int
) -> None:
    codes, outputs = both(two_nodes(start, port, how=how), tmp_path)
    assert codes == [code, code], outputs
    for output in outputs:
        assert words in output.splitlines()[-1]
        assert {"raise": "in forward", "loop": "in never_ends"}.get(how, "") in output
    state = status(tmp_path / "run")
    assert (state["state"], state["exit_code"], state["rank"]) == ("failed", code, 1)


@pytest.mark.nightly
def test_a_failure_on_the_first_node_is_not_blamed_on_the_second(
    start: Start, tmp_path: Path, port: int
) -> None:
    codes, outputs = both(two_nodes(start, port, how="raise", rank=0), tmp_path)
    assert codes == [70, 70], outputs
    assert all(f"rank 0 on {HOST} failed: RuntimeError" in output.splitlines()[-1] for output in outputs)


def test_a_node_that_is_lost_ends_the_run(start: Start, tmp_path: Path, port: int) -> None:
    first, second = two_nodes(start, port)
    wait_for(lambda: trains(tmp_path), first)
    second.kill()
    codes, outputs = both([first, second], tmp_path)
    assert codes == [70, -signal.SIGKILL], outputs
    assert outputs[0].splitlines()[-1] == f"disttrain: node 1 ({HOST}) is gone"
    assert status(tmp_path / "run")["reason"] == f"node 1 ({HOST}) is gone"


@pytest.mark.parametrize("rank", [1, *nightly(0)])
def test_a_stop_of_one_node_stops_and_saves_on_both(
    rank: int, start: Start, tmp_path: Path, port: int
) -> None:
    processes = two_nodes(start, port)
    wait_for(lambda: trains(tmp_path), processes[0])
    processes[rank].send_signal(signal.SIGUSR2)
    codes, outputs = both(processes, tmp_path)
    assert codes == [75, 75], outputs
    assert status(tmp_path / "run")["state"] == "stopped"
    assert (tmp_path / "run/checkpoints/latest/MANIFEST.json").exists()


@pytest.mark.nightly
def test_a_second_signal_on_one_node_ends_both(start: Start, tmp_path: Path, port: int) -> None:
    processes = two_nodes(start, port, "monitor.stall_timeout_s=100", how="loop")
    wait_for(lambda: (tmp_path / "failed-at").exists(), processes[0])
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1)
    codes, outputs = both(processes, tmp_path)
    assert codes == [143, 143], outputs


@pytest.mark.nightly
def test_a_hang_on_a_node_is_survived_on_both_with_max_restarts(
    start: Start, tmp_path: Path, port: int
) -> None:
    arguments = ["--max-restarts", "1", "train.epochs=2", "model.args.once=true"]
    codes, outputs = both(two_nodes(start, port, *arguments, how="kill"), tmp_path)
    assert codes == [0, 0], outputs
    assert all("restart 1 of 1" in output for output in outputs)


def test_nodes_with_other_settings_are_refused(start: Start, tmp_path: Path, port: int) -> None:
    processes = [node(start, rank, port, f"optim.lr=0.{rank + 1}") for rank in (0, 1)]
    codes, outputs = both(processes, tmp_path)
    assert codes == [2, 2], outputs
    for output in outputs:
        assert f"optim.lr is 0.1 on node 0 ({HOST}) and 0.2 on node 1 ({HOST})" in output
    assert not (tmp_path / "run/logs/launch_00000.log").exists(), "nothing was started"


def test_a_node_that_never_comes(start: Start, tmp_path: Path, port: int) -> None:
    code, output, _ = ended(node(start, 0, port), tmp_path)
    assert code == 71, output
    assert f"1 of 2 nodes joined; waited {STALL_S} s on 127.0.0.1:{port} for node 1" in output
    assert status(tmp_path / "run")["exit_code"] == 71


def test_a_port_that_is_taken(start: Start, tmp_path: Path, taken_port: int) -> None:
    code, output, _ = ended(node(start, 0, taken_port), tmp_path)
    assert code == 73, output
    assert f"port {taken_port} on {HOST} cannot be used" in output
    assert not (tmp_path / "run/logs/launch_00000.log").exists(), "nothing was started"


# --- Other doors ----------------------------------------------------------------------------------


def worker(start: Start, rank: int, port: int, *arguments: str) -> Any:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = ("-m", "disttrain.worker")
    return start("tiny.yaml", "--run-dir", "run", *arguments, program=program, **place, **address)


@pytest.mark.nightly
def test_ranks_with_other_settings_are_refused_without_our_launcher(
    start: Start, tmp_path: Path, port: int
) -> None:
    ranks = [worker(start, rank, port, f"seed={rank}") for rank in (0, 1)]
    codes, outputs = both(ranks, tmp_path)
    assert codes == [2, 2], outputs
    assert f"seed is 0 on rank 0 on {HOST} and 1 on rank 1 on {HOST}" in outputs[0]


@pytest.mark.nightly
def test_a_rank_whose_port_is_taken(start: Start, tmp_path: Path, taken_port: int) -> None:
    code, output, _ = ended(worker(start, 0, taken_port), tmp_path)
    assert code == 73, output
    assert f"127.0.0.1:{taken_port} is in use on {HOST}" in output


@pytest.mark.nightly
def test_a_rank_that_never_comes_without_our_launcher(start: Start, tmp_path: Path, port: int) -> None:
    code, output, _ = ended(worker(start, 0, port, "monitor.stall_timeout_s=1"), tmp_path)
    assert code == 71, output
    assert f"1 of 2 ranks joined; rank 0 waited 31 s for the others at 127.0.0.1:{port}" in output


@pytest.mark.nightly
def test_a_rank_that_freezes_without_our_launcher(start: Start, tmp_path: Path, port: int) -> None:
    options = ["train.epochs=3000", "monitor.stall_timeout_s=1"]
    ranks = [worker(start, rank, port, *options) for rank in (0, 1)]
    wait_for(lambda: trains(tmp_path), ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)
    output, _ = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].wait()
    assert ranks[0].returncode == 71, output
    assert f"rank 0 on {HOST} waited 31 s for the other ranks in step" in output
