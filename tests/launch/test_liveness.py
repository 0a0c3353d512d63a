"""Who hangs, by exact rows; and the launcher with real processes as its ranks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disttrain.heartbeat import ADDRESS, STACKS, Heartbeat, Phase, pack, report_exits
from disttrain.launch.liveness import Liveness, Row, describe_hang, stalled


def row(
    rank: int, progress: int, still_s: float, stopped_s: float = 0, cpu_s: float = 0, host: str = "a"
) -> Row:
    return Row(rank, host, progress, still_s, stopped_s, cpu_s)


DATA, FORWARD, BACKWARD = (pack(Phase.DATA, 7), pack(Phase.COMPUTE, 7, 0), pack(Phase.COMPUTE, 7, 1))
EVALUATE = pack(Phase.EVALUATE, 7, 3)


@pytest.mark.parametrize(
    ("rows", "culprits"),
    [
        ([], []),
        ([row(0, DATA, 9), row(1, DATA, 9)], []),
        ([row(0, BACKWARD, 11), row(1, DATA, 11), row(2, BACKWARD, 11)], [1]),
        ([row(0, DATA, 1), row(1, BACKWARD, 11)], []),  # rank 1 waits for rank 0, which has just moved
        ([row(0, EVALUATE + 5, 1), row(1, EVALUATE, 11)], [1]),  # rank 0 still has batches of its own
        ([row(0, BACKWARD, 11), row(1, BACKWARD, 11)], [0, 1]),
        ([row(0, BACKWARD, 11, cpu_s=0.1), row(1, BACKWARD, 11, cpu_s=10)], [1]),
        ([row(0, BACKWARD, 11, cpu_s=11), row(1, BACKWARD, 11, cpu_s=10)], [0, 1]),
        ([row(0, DATA, 11), row(1, BACKWARD, 11, stopped_s=3)], [1]),
        ([row(0, DATA, 1), row(1, BACKWARD, 11, stopped_s=10)], [1]),
        ([row(0, 0, 11), row(1, 0, 11, stopped_s=9)], [1]),
        ([row(0, -1, 11), row(1, pack(Phase.START, 0, 3), 11)], [0]),
        ([row(0, 0, 11), row(1, 0, 1)], []),  # a start, in which somebody is busy
        ([row(0, 0, 11), row(1, BACKWARD, 1)], []),
    ],
)
def test_who_hangs_after_ten_seconds(rows: list[Row], culprits: list[int]) -> None:
    assert [found.rank for found in stalled(rows, 10, cpu_tells=True)] == culprits


def test_a_busy_rank_tells_nothing_where_waiting_ranks_are_busy_too() -> None:
    rows = [row(0, BACKWARD, 11, cpu_s=0.1), row(1, BACKWARD, 11, cpu_s=10)]
    assert stalled(rows, 10, cpu_tells=False) == rows


def test_the_sentence_on_a_hang() -> None:
    rows = [row(rank, BACKWARD, 30) for rank in range(3)]
    rows[1] = row(1, pack(Phase.DATA, 123), 30.4, stopped_s=30.2, host="gpu03")
    assert describe_hang([rows[1]], rows) == (
        "rank 1 on gpu03 hangs: no progress for 30 s in step 123 while loading data "
        "(the process is stopped); ranks 0 and 2 wait for it"
    )
    assert describe_hang(rows[1:], rows) == (
        "rank 1 on gpu03 and rank 2 on a hang: no progress for 30 s in step 7 while computing "
        "(the processes are stopped); rank 0 waits for them"
    )
    many = [row(rank, DATA, 30) for rank in range(20)]
    assert describe_hang(many[:1], many).endswith("; ranks 1, 2, 3, 4, ... and 19 wait for it")


# --- With processes ---------------------------------------------------------------------------------

_RANK = """
import faulthandler, os, signal, subprocess, sys, time
from disttrain.heartbeat import STACKS, STOP, Phase, Heartbeat
number, then = int(sys.argv[1]), sys.argv[2]
faulthandler.register(STACKS, open(sys.argv[3], "a"))
heartbeat = Heartbeat.connect(os.environ, number)
heartbeat.beat(Phase.DATA, 3)
print("ready", flush=True)
sys.stdin.readline()
exec(then)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def liveness() -> Iterator[Liveness]:
    with Liveness(4, 2) as liveness:
        yield liveness


@pytest.fixture
def start(liveness: Liveness, tmp_path: Path) -> Iterator[Start]:
    """Starts a rank, which connects and then waits for a line before it runs its program."""
    started = []

    def start(rank: int, program: str = "time.sleep(600)") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _RANK, str(rank), program, str(tmp_path / f"{rank}.log")]
        environ = os.environ | liveness.environment
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        until(liveness, lambda: rank in connected(liveness))
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def connected(liveness: Liveness) -> list[int]:
    return [found.rank for found in liveness.rows() if found.progress >= 0]


def until(liveness: Liveness, condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        liveness.wait(0.05)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_the_progress_of_a_rank_is_seen(liveness: Liveness, start: Start) -> None:
    assert [(found.rank, found.progress) for found in liveness.rows()] == [(4, -1), (5, -1)]
    assert not liveness.started
    process = start(5, "heartbeat.beat(Phase.EVALUATE, 8, 2); heartbeat.saving(True); time.sleep(600)")
    assert liveness.started
    assert connected(liveness) == [5]
    assert not liveness.saving(5)
    go(process)
    until(liveness, lambda: liveness.rows()[1].progress == pack(Phase.EVALUATE, 8, 2))
    until(liveness, lambda: liveness.saving(5))
    assert not liveness.saving(4)
    until(liveness, lambda: liveness.rows()[1].still_s > 0.5)


@pytest.mark.parametrize(
    ("program", "said", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", None, -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", None, -signal.SIGSEGV),
        ("os._exit(0)", None, 0),
        ("sys.exit(3)", None, 3),
        ("heartbeat.leave(75); os._exit(75)", 75, 75),
    ],
)
def test_how_a_rank_ended(
    liveness: Liveness, start: Start, program: str, said: int | None, status: int
) -> None:
    process = start(4, program)
    go(process)
    until(liveness, lambda: liveness.ends)
    (end,) = liveness.ends
    assert (end.rank, end.said, end.status) == (4, said, status)
    assert end.doing == "in step 3 while loading data"
    assert not liveness.all_ended
    assert [found.rank for found in liveness.rows()] == [5]
    process.wait()


def test_a_rank_that_its_parent_reaps_first_ended_as_the_parent_reports(
    liveness: Liveness, start: Start
) -> None:
    process = start(4)
    process.kill()
    process.wait()
    later = threading.Timer(0.2, report_exits, (liveness.environment, {4: -signal.SIGKILL}))
    later.start()
    until(liveness, lambda: liveness.ends)
    later.join()
    assert [(end.rank, end.said, end.status) for end in liveness.ends] == [(4, None, -signal.SIGKILL)]


def test_the_end_of_a_rank_whose_connection_lives_on_in_a_child(liveness: Liveness, start: Start) -> None:
    process = start(
        4,
        "child = os.fork() or time.sleep(600)\n"
        "print(child, flush=True); time.sleep(0.2); os.kill(os.getpid(), 9)",
    )
    go(process)
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        until(liveness, lambda: liveness.ends)
        assert liveness.ends[0].status == -signal.SIGKILL
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_stopped_rank_is_seen_as_stopped_until_it_goes_on(liveness: Liveness, start: Start) -> None:
    process = start(4)
    process.send_signal(signal.SIGSTOP)
    until(liveness, lambda: liveness.rows()[0].stopped_s > 0.5)
    assert stalled(liveness.rows(), 0.5, cpu_tells=True) == [row for row in liveness.rows() if row.rank == 4]
    process.send_signal(signal.SIGCONT)
    until(liveness, lambda: liveness.rows()[0].stopped_s == 0)
    assert liveness.ends == []


def test_the_stack_of_a_rank(liveness: Liveness, start: Start, tmp_path: Path) -> None:
    process = start(4, "def stuck():\n    while True: pass\nstuck()")
    go(process)
    until(liveness, lambda: liveness.rows()[0].cpu_s > 0.1)
    assert "in stuck" in liveness.stacks(4, tmp_path / "4.log", timeout_s=30)
    process.send_signal(signal.SIGSTOP)
    until(liveness, lambda: liveness.rows()[0].stopped_s > 0)
    assert "is stopped" in liveness.stacks(4, tmp_path / "4.log")
    assert liveness.stacks(5, tmp_path / "5.log") == "rank 5 has not connected yet"


def test_a_stop_reaches_ranks_that_are_there_and_that_come(liveness: Liveness, start: Start) -> None:
    program = "print(heartbeat.connection.recv(9) == STOP, flush=True)"
    first = start(4, program)
    liveness.stop()
    second = start(5, program)
    for process in (first, second):
        go(process)
        assert process.stdout
        assert process.stdout.readline() == "True\n"


def test_a_process_of_another_rank_is_turned_away(liveness: Liveness, start: Start) -> None:
    start(4)
    for rank in (4, 6, 3):
        command = [
            sys.executable,
            "-c",
            f"import os; from disttrain.heartbeat import Heartbeat; Heartbeat.connect(os.environ, {rank})",
        ]
        process = subprocess.Popen(
            command, env=os.environ | liveness.environment, stderr=subprocess.PIPE, text=True
        )
        until(liveness, lambda process=process: process.poll() is not None)
        assert f"does not expect rank {rank}" in process.communicate()[1]
    assert connected(liveness) == [4]


def test_another_user_is_not_heard(liveness: Liveness, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "\0" + liveness.environment[ADDRESS].removeprefix("@")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        if os.getuid() == 0:  # root may connect
            os.seteuid(65534)
            try:
                stranger.connect(address)
            finally:
                os.seteuid(0)
        else:
            monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
            stranger.connect(address)
        begin = time.monotonic()
        liveness.wait(1)
        assert time.monotonic() - begin < 3, "nobody waits for what a stranger has to say"
        assert stranger.recv(9) == b""
    assert connected(liveness) == []


def test_time_in_which_the_launcher_did_not_run_does_not_count(liveness: Liveness, start: Start) -> None:
    start(4)
    time.sleep(4)
    liveness.wait(0.05)
    assert liveness.rows()[0].still_s < 3


def test_a_watch_leaves_nothing_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Liveness(0, 1) as liveness:
        address = liveness.environment
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with pytest.raises(ConnectionError):
        Heartbeat.connect(address, 0)
    assert ADDRESS in address
    assert STACKS > signal.SIGRTMIN
