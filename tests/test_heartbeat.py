"""What a rank shows of itself."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from disttrain.heartbeat import ADDRESS, Heartbeat, Phase, doing, pack, unpack
from disttrain.launch.liveness import Liveness


def test_progress_reads_back_and_orders_steps_phases_and_parts() -> None:
    places = list(itertools.product((0, 1, 2**20), Phase, (0, 1, 2**24 - 1)))
    packed = [pack(phase, step, part) for step, phase, part in places]
    assert packed == sorted(packed)
    assert len(set(packed)) == len(packed)
    assert [unpack(number) for number in packed] == [(phase, step, part) for step, phase, part in places]


def test_a_pulse_without_a_launcher_leads_nowhere() -> None:
    heartbeat = Heartbeat.connect({}, 3)
    heartbeat.beat(Phase.COMPUTE, 12, 1)
    heartbeat.saving(True)
    heartbeat.leave(0)
    assert heartbeat.connection is None
    assert heartbeat.place == (Phase.COMPUTE, 12, 1)


def test_a_launcher_that_has_gone_is_not_waited_for() -> None:
    with pytest.raises(ConnectionError):
        Heartbeat.connect({ADDRESS: "@disttrain-nobody"}, 0)


def test_what_a_rank_is_at_in_words() -> None:
    assert doing(pack(Phase.START, 0, 4)) == "while starting"
    assert doing(pack(Phase.DATA, 1234)) == "in step 1,234 while loading data"
    assert doing(-1) == "while starting"
    assert len({doing(pack(phase, 1)) for phase in Phase}) == len(Phase)


_SIGNALLED = """
import os, signal, sys, time
os.environ |= {"RANK": "0"}
from disttrain.errors import StoppedError
from disttrain.heartbeat import Phase
from disttrain.training.rank import Rank

rank = Rank(0, None)
rank.listen()
if sys.argv[1] == "training":
    rank.heartbeat.beat(Phase.DATA, 1)
print("ready", flush=True)
while not rank.stop:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(600)
"""


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
@pytest.mark.parametrize("when", ["starting", "training"])
def test_signals_of_a_rank_that_no_launcher_watches(number: int, when: str) -> None:
    command = [sys.executable, "-c", _SIGNALLED, when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stderr
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            if when == "starting":
                assert process.wait(60) == 75
                assert "stopped before training began" in process.stderr.read()
                return
            process.send_signal(number)  # as the terminal and torchrun do at the same time
            assert process.stdout.readline() == "asked\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
            os.kill(process.pid, number)
            if number == signal.SIGHUP:  # the terminal is gone already: there is nobody to insist
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                return
            assert process.wait(60) == 128 + number
        finally:
            process.kill()


def connected(watch: Liveness) -> bool:
    return any(found.progress >= 0 for found in watch.rows())


def test_a_rank_ends_with_its_launcher_even_if_its_parent_lives() -> None:
    with Liveness(0, 1) as watch:
        command = [sys.executable, "-c", _SIGNALLED, "training"]
        environ = os.environ | watch.environment
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        while process.poll() is None and not connected(watch):
            watch.wait(0.1)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    try:
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


@pytest.mark.integration
@pytest.mark.parametrize("ask", ["launcher", "signal"])
def test_a_watched_rank_leaves_its_end_to_the_launcher(ask: str) -> None:
    with Liveness(0, 1) as watch:
        command = [sys.executable, "-c", _SIGNALLED, "training"]
        environ = os.environ | watch.environment
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        try:
            while process.poll() is None and not connected(watch):
                watch.wait(0.1)
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            watch.stop() if ask == "launcher" else process.terminate()
            assert process.stdout.readline() == "asked\n"
            for _ in range(2):
                time.sleep(0.7)
                process.terminate()  # as torchrun does when another rank has left
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            process.kill()
            process.communicate()
