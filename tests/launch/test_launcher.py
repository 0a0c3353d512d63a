"""`launch`, with small stand-ins for the training processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from disttrain.errors import DataError
from disttrain.launch import launcher
from disttrain.launch.supervisor import Outcome
from disttrain.runs.runfolder import RunFolder
from kit.commands import wait_for
from kit.plans import ONE
from kit.run_results import status

pytestmark = pytest.mark.integration

TWO = replace(ONE, processes=2, threads=1)
HOST = socket.gethostname()


# --- Launching --------------------------------------------------------------------------------------

_STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from disttrain.errors import DataError
from disttrain.heartbeat import Phase, Heartbeat
from disttrain.runs.runfolder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
heartbeat = Heartbeat.connect(os.environ, 0)
attempts = folder.path / "attempts"
attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
attempt = len(attempts.read_text())

def settle(state, exit_code):
    folder.update_status(state=state, exit_code=exit_code, reason=state)
    leave(exit_code)

def fail(error):
    folder.write_error(0, error)
    leave(1)

def leave(exit_code):
    heartbeat.leave(exit_code)
    sys.exit(exit_code)

"""


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture
def launch(folder, monkeypatch):
    """Returns a function that launches a program in place of the training process; it ends soon or never."""

    def run(program, plan=ONE, *, max_restarts=0, say=lambda text: None, connected=True):
        stand_in = (
            _STAND_IN
            if connected
            else _STAND_IN.replace("heartbeat = Heartbeat.connect", "lambda: Heartbeat.connect")
        )
        command = [sys.executable, "-c", stand_in + program, str(folder.path)]
        monkeypatch.setattr(launcher, "command", lambda plan: command)
        return launcher.launch(plan, folder, max_restarts=max_restarts, say=say)

    return run


def attempts(folder):
    return len((folder.path / "attempts").read_text())


def test_a_run_that_finishes(launch, folder):
    assert launch("settle('finished', 0)") == Outcome(0)
    assert folder.status()["state"] == "finished"
    assert folder.status()["exit_code"] == 0


def test_a_run_that_was_stopped_ends_with_its_own_code(launch):
    assert launch("settle('stopped', 75)") == Outcome(75)


def test_the_command_gets_environment_folder_and_log(launch, folder):
    program = """
from disttrain.runs.runfolder import COMMAND
print(os.environ["OMP_NUM_THREADS"], COMMAND in os.environ, folder.locked_by_launcher(), file=sys.stderr)
settle('finished', 0)
"""
    assert launch(program).exit_code == 0
    assert folder.launch_log(0).read_text() == "4 True True\n"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_mistake_of_the_user_ends_the_run_with_its_message_and_code(launch, folder):
    outcome = launch("fail(DataError('no such data'))")
    assert outcome == Outcome(65, "no such data")
    status = folder.status()
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", 65, "no such data")
    assert (status["rank"], status["host"]) == (0, HOST)


def test_a_rank_that_cannot_write_its_error_ends_the_run_with_its_code(launch, folder):
    outcome = launch("print('disttrain: the disk is full', file=sys.stderr, flush=True); leave(74)")
    assert (outcome.exit_code, outcome.detail) == (74, "disttrain: the disk is full")
    assert folder.status()["exit_code"] == 74


def test_the_first_error_wins_over_those_of_its_victims(launch, folder):
    outcome = launch(
        """
folder.write_error(1, ValueError("the cause"))
fail(ValueError("a victim"))
""",
        TWO,
    )
    assert (outcome.exit_code, outcome.message) == (70, f"rank 1 on {HOST} failed: ValueError: the cause")
    assert "ValueError: the cause" in outcome.detail
    status = folder.status()
    assert (status["rank"], status["exit_code"], status["reason"]) == (1, 70, "ValueError: the cause")


def test_a_process_that_was_killed_is_named_with_its_signal(launch, folder):
    outcome = launch("print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.exit_code == 70
    cause = "was killed by SIGKILL while starting"
    assert outcome.message == f"rank 0 on {HOST} {cause}; see {folder.launch_log(0)}"
    assert outcome.detail == "last words"
    status = folder.status()
    assert (status["state"], status["reason"], status["rank"]) == ("failed", f"rank 0 {cause}", 0)


@pytest.mark.parametrize("code", [0, 1, 70])
@pytest.mark.parametrize("connected", [True, False])
def test_an_end_without_a_report_is_a_failure_whatever_its_code(launch, folder, code, connected):
    outcome = launch(f"sys.exit({code})", connected=connected)
    cause = f"ended with exit code {code} and left no report"
    if code == 0:
        cause = "exited early with exit code 0 and left no report"
    assert outcome.exit_code == 70
    assert outcome.message == f"rank 0 on {HOST} {cause} while starting; see {folder.launch_log(0)}"
    assert folder.status()["state"] == "failed"


def test_a_rank_that_says_it_is_done_without_a_finished_run_is_a_failure(launch, folder):
    outcome = launch("leave(0)")
    assert outcome.exit_code == 70
    assert "and left no report" in outcome.message


def test_a_rank_killed_before_it_connects_is_named_before_its_victims(launch, folder):
    outcome = launch(
        """
from disttrain.heartbeat import report_exits
folder.write_error(0, RuntimeError("connection closed by peer"))
print("last words", file=sys.stderr, flush=True)
report_exits(os.environ, {0: -15, 1: -9})
sys.exit(1)
""",
        TWO,
        connected=False,
    )
    assert outcome.message.startswith(f"rank 1 on {HOST} was killed by SIGKILL while starting")
    assert (folder.status()["rank"], outcome.detail) == (1, "last words")


def test_the_cause_is_waited_for_when_its_victim_ends_first(launch, folder):
    outcome = launch(
        """
from disttrain.heartbeat import report_exits
folder.write_error(0, RuntimeError("connection closed by peer"))
heartbeat.leave(1)
time.sleep(0.5)
report_exits(os.environ, {0: 1, 1: -9})
sys.exit(1)
""",
        TWO,
    )
    assert outcome.message.startswith(f"rank 1 on {HOST} was killed by SIGKILL")


def test_the_last_words_are_those_of_the_log_that_has_them(launch, folder):
    outcome = launch(
        """
from disttrain.heartbeat import report_exits
folder.log(1).write_text("terminate called after throwing an instance of 'c10::Error'")
report_exits(os.environ, {1: -6})
time.sleep(60)
""",
        TWO,
        connected=False,
    )
    assert outcome.message.startswith(f"rank 1 on {HOST} was killed by SIGABRT")
    assert outcome.message.endswith(f"see {folder.log(1)}")
    assert outcome.detail == "terminate called after throwing an instance of 'c10::Error'"


@pytest.mark.parametrize("earlier", ["stopped", "finished"])
def test_the_end_of_an_earlier_run_is_not_taken_for_the_end_of_this_one(launch, folder, earlier):
    folder.update_status(state=earlier, exit_code=75, reason=earlier, restarts=2)
    folder.write_error(0, DataError("of the earlier run"))
    folder.launch_log(0).write_text("of the earlier run\n")
    outcome = launch("sys.exit(3)")
    assert outcome.exit_code == 70
    assert outcome.message.startswith(f"rank 0 on {HOST} ended with exit code 3")
    assert (folder.status()["state"], folder.status()["restarts"]) == ("failed", 2)


def test_processes_that_hang_after_an_error_are_ended_in_seconds(launch, folder):
    begin = time.monotonic()
    outcome = launch(
        """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder.write_error(1, ValueError("the cause"))
heartbeat.leave(1)
time.sleep(600)
""",
        TWO,
    )
    assert time.monotonic() - begin < 60
    assert (outcome.exit_code, outcome.message) == (70, f"rank 1 on {HOST} failed: ValueError: the cause")
    assert folder.status()["rank"] == 1


@pytest.mark.parametrize("seconds", [0.5, 600])
def test_a_checkpoint_that_rank_0_is_writing_gets_a_moment(launch, folder, seconds):
    begin = time.monotonic()
    outcome = launch(
        f"""
heartbeat.saving(True)
if os.fork() == 0:
    Heartbeat.connect(os.environ, 1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep({seconds})
(folder.path / "saved").touch()
heartbeat.saving(False)
time.sleep(600)
""",
        TWO,
    )
    assert (outcome.exit_code, folder.status()["rank"]) == (70, 1)
    assert "SIGKILL" in outcome.message
    assert (folder.path / "saved").exists() == (seconds < 2)
    assert time.monotonic() - begin < 60


# --- Restarts ---------------------------------------------------------------------------------------


def test_a_crash_is_followed_by_a_restart(launch, folder):
    said = []
    outcome = launch(
        "settle('finished', 0) if attempt == 3 else os.kill(os.getpid(), signal.SIGKILL)",
        max_restarts=5,
        say=said.append,
    )
    assert outcome == Outcome(0)
    assert (attempts(folder), folder.status()["restarts"]) == (3, 2)
    assert [text.splitlines()[1] for text in said] == [
        "restart 1 of 5 from the last checkpoint",
        "restart 2 of 5 from the last checkpoint",
    ]
    assert "SIGKILL" in said[0]


def test_a_run_that_makes_no_progress_is_not_restarted_for_ever(launch, folder):
    outcome = launch("os.kill(os.getpid(), signal.SIGKILL)", max_restarts=9)
    assert (outcome.exit_code, attempts(folder)) == (70, 4)
    assert outcome.message.startswith("no progress in 3 restarts: each began at step 0 and saved nothing")
    assert folder.status()["reason"] == outcome.message
    launch("os.kill(os.getpid(), signal.SIGKILL)")
    assert attempts(folder) == 5, "a person may try again"


def test_a_run_that_gets_on_is_restarted_as_often_as_it_needs(launch, folder):
    program = """
(folder.checkpoints / f"step_{attempt:08d}").mkdir(parents=True)
settle('finished', 0) if attempt == 7 else os.kill(os.getpid(), signal.SIGKILL)
"""
    assert launch(program, max_restarts=9) == Outcome(0)
    assert (attempts(folder), folder.status()["restarts"]) == (7, 6)


def test_a_requeued_job_counts_as_a_restart(launch, folder, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    codes = [launch("settle('stopped', 75)").exit_code for _ in range(5)]
    assert codes == [75, 75, 75, 75, 70]
    assert (attempts(folder), folder.status()["restarts"]) == (4, 4)


def test_the_last_failure_is_reported_when_no_restart_is_left(launch, folder):
    outcome = launch("fail(ValueError(f'attempt {attempt}'))", max_restarts=1)
    assert outcome.message.endswith("ValueError: attempt 2")
    assert (attempts(folder), folder.status()["restarts"]) == (2, 1)


@pytest.mark.parametrize("program", ["fail(DataError('x'))", "settle('stopped', 75)"])
def test_what_a_restart_cannot_mend_is_not_restarted(launch, folder, program):
    assert launch(program, max_restarts=5).exit_code in {65, 75}
    assert attempts(folder) == 1


def test_a_restart_goes_on_where_the_run_was(folder, monkeypatch):
    plans = []

    def command(plan):
        plans.append(plan)
        return [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr(launcher, "command", command)
    plan = replace(ONE, resume="runs/other")
    launcher.launch(plan, folder, max_restarts=1, say=lambda text: None)
    assert [plan.resume for plan in plans] == ["runs/other"] * 2, "it crashed before it began"
    folder.config.write_text("name: mine")
    launcher.launch(plan, folder, max_restarts=1, say=lambda text: None)
    assert [plan.resume for plan in plans[2:]] == ["runs/other", "auto"]


# --- Signals ----------------------------------------------------------------------------------------

_LAUNCHER = """
import sys
from pathlib import Path
from disttrain.launch import launcher
from disttrain.launch.plan import LaunchPlan
from disttrain.runs.runfolder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.create()
launcher.command = lambda plan: [sys.executable, "-c", sys.argv[2], sys.argv[1]]
plan = LaunchPlan(Path("a.yaml"), (), folder.path, "auto", "cpu", 1, (), 1)
outcome = launcher.launch(plan, folder, max_restarts=3, say=print)
print(outcome.message)
sys.exit(outcome.exit_code)
"""
# Counts the requests to stop; ends after the first if `polite`.
_TRAINING = (
    _STAND_IN
    + """
heartbeat.beat(Phase.DATA, 1)
(folder.path / "ready").write_text(str(os.getpid()))
received = [heartbeat.connection.recv(64)]
heartbeat.connection.settimeout(1)
try:
    received.append(heartbeat.connection.recv(64))
except TimeoutError:
    pass
folder.update_status(received=[word.decode() for word in received])
if {polite}:
    settle("stopped", 75)
time.sleep(600)
"""
)


@pytest.fixture
def launched(tmp_path):
    """Starts the launcher in a process of its own; returns it with the process that it has started."""
    started = []

    def start(program):
        path = tmp_path / "run"
        command = [sys.executable, "-c", _LAUNCHER, path, program]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        wait_for(lambda: (path / "ready").exists() and (path / "ready").read_text())
        child = psutil.Process(int((path / "ready").read_text()))
        started.append(child)
        return process, child

    yield start
    for process in reversed(started):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started[:1]:
        process.communicate()


def gone(child):
    try:
        return child.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_stop_is_handed_on_once_and_the_run_saves(launched, tmp_path, number):
    process, child = launched(_TRAINING.replace("{polite}", "True"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (75, "\n")
    state = status(tmp_path / "run")
    assert (state["state"], state["received"]) == ("stopped", ["stop"])
    assert gone(child)


def test_a_second_signal_ends_the_run_at_once(launched, tmp_path):
    process, child = launched(_TRAINING.replace("{polite}", "False"))
    folder = RunFolder(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: folder.status().get("received"))
    assert child.is_running()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "ended by SIGINT; the last checkpoint is intact\n")
    status = folder.status()
    assert (status["state"], status["exit_code"]) == ("stopped", 130)
    assert gone(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_stop_before_training_has_begun_loses_nothing(launched, tmp_path, number):
    process, child = launched(
        _STAND_IN + "(folder.path / 'ready').write_text(str(os.getpid())); time.sleep(600)"
    )
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert output == "stopped before training began; nothing is lost, run the same command again\n"
    status = RunFolder(tmp_path / "run").status()
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert gone(child)


def test_no_process_outlives_a_launcher_that_was_killed(launched):
    process, child = launched(_TRAINING.replace("{polite}", "False"))
    assert not gone(child)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: gone(child))
    assert gone(child)


def test_the_handlers_of_the_caller_are_put_back(launch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    launch("settle('finished', 0)")
    assert [signal.getsignal(number) for number in numbers] == before
