"""Ranks that die, hang or must stop, on one node and on two: real processes, real faults."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from disttrain.runs.manifest import latest_valid
from kit.commands import NO_LOG_FOLDER, wait_for
from kit.marks import nightly
from kit.run_results import metrics, status
from kit.supervision import (
    HOST,
    STALL_S,
    Start,
    descendants,
    ended,
    run,
)

# --- A rank dies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "when", "procs", "words"),
    [
        ("kill", "training", 3, ["rank 1 on {host} was killed by SIGKILL in step"]),
        ("raise", "training", 2, ["rank 1 on {host} failed: RuntimeError: the pump is dry", "in forward"]),
        *nightly(
            ("kill", "start", 2, ["rank 1 on {host} was killed by SIGKILL while starting"]),
            ("kill", "evaluation", 2, ["was killed by SIGKILL in the evaluation after step 30"]),
            ("exit", "training", 2, ["rank 1 on {host} exited early with exit code 0"]),
            ("sys.exit", "training", 2, ["rank 1 on {host} failed: SystemExit: 0", "in fail"]),
            ("raise", "evaluation", 2, ["rank 1 on {host} failed: RuntimeError: the pump is dry"]),
        ),
    ],
)  # fmt: skip
def test_a_rank_that_dies_is_named_and_ends_the_run(
    how: str, when: str, procs: int, words: list[str], start: Start, tmp_path: Path
) -> None:
    code, output, seconds = ended(run(start, "--procs", str(procs), how=how, when=when), tmp_path)
    assert code == 70, output
    for word in words:
        assert word.format(host=HOST) in output
    last = output.splitlines()[-1]
    assert last.startswith(f"disttrain: rank 1 on {HOST}"), "the verdict is last on screen"
    assert "rank 0" not in last
    state = status(tmp_path / "run")
    assert (state["state"], state["exit_code"], state["rank"], state["host"]) == ("failed", 70, 1, HOST)
    assert seconds < 30


@pytest.mark.parametrize(("how", "code"), [("loop", 71), *nightly(("exit", 70))])
def test_a_single_process_is_watched_too(how: str, code: int, start: Start, tmp_path: Path) -> None:
    found, output, _ = ended(run(start, "--procs", "1", how=how, rank=0), tmp_path)
    assert found == code, output
    assert f"rank 0 on {HOST}" in output.splitlines()[-1]
    assert "wait for" not in output
    assert status(tmp_path / "run")["exit_code"] == code


def test_the_words_of_a_rank_that_cannot_even_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    print(\"ModuleNotFoundError: No module named 'libbroken'\", file=sys.stderr, flush=True)\n"
        "    os._exit(1)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = start("run", "tiny.yaml", "--procs", "2", "--run-dir", "run", "-q", PYTHONPATH=path)
    code, output, _ = ended(process, tmp_path)
    assert code == 70, output
    words, verdict = output.splitlines()[-2:]
    assert words == "ModuleNotFoundError: No module named 'libbroken'"
    assert verdict.startswith(f"disttrain: rank 1 on {HOST} ended with exit code 1")


# --- A rank hangs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "when", "procs", "words"),
    [
        ("stop", "training", 3, "while computing (the process is stopped); ranks 0 and 2 wait for it"),
        *nightly(
            ("stop", "start", 2, "while starting (the process is stopped); rank 0 waits for it"),
            ("loop", "evaluation", 2, "in the evaluation after step 30; rank 0 waits for it"),
            ("stop", "evaluation", 2, "in the evaluation after step 30 (the process is stopped)"),
            ("stop", "data", 2, "while loading data (the process is stopped); rank 0 waits for it"),
            ("loop", "training", 3, "while computing; ranks 0 and 2 wait for it"),
            ("loop", "data", 2, "while loading data; rank 0 waits for it"),
        ),
    ],
)
def test_a_rank_that_hangs_is_named_and_not_its_victims(
    how: str, when: str, procs: int, words: str, start: Start, tmp_path: Path
) -> None:
    code, output, seconds = ended(run(start, "--procs", str(procs), how=how, when=when), tmp_path)
    assert code == 71, output
    last = output.splitlines()[-1]
    assert re.match(rf"disttrain: rank 1 on {HOST} hangs: no progress for \d+ s ", last)
    assert words in last
    if how == "loop":
        assert "in never_ends" in output, "its stack is shown"
    else:
        assert "a debugger): no stack" in output or "has not connected yet" in output
    state = status(tmp_path / "run")
    assert (state["state"], state["exit_code"], state["rank"], state["host"]) == ("failed", 71, 1, HOST)
    assert STALL_S - 1 < seconds < STALL_S + 30


@pytest.mark.nightly
def test_a_hang_is_survived_with_max_restarts(start: Start, tmp_path: Path) -> None:
    arguments = ["--procs", "2", "--max-restarts", "1", "train.epochs=2", "model.args.once=true"]
    code, output, _ = ended(run(start, *arguments, how="loop"), tmp_path)
    assert code == 0, output
    assert "restart 1 of 1" in output
    assert status(tmp_path / "run")["restarts"] == 1


# --- A stop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [1.6, *nightly(0.0, 0.8, 2.4, 3.2, 4.0, 4.8)])
def test_a_stop_at_any_time_of_the_start_loses_nothing(delay_s: float, start: Start, tmp_path: Path) -> None:
    epochs = "train.epochs=2" if delay_s == 0 else "train.epochs=300"
    process = run(start, "--procs", "2", epochs)
    wait_for(lambda: (tmp_path / "run/status.json").exists(), process)
    time.sleep(delay_s)
    process.terminate()
    code, output, _ = ended(process, tmp_path)
    assert code == 75, output
    state = status(tmp_path / "run")
    assert (state["state"], state["exit_code"]) == ("stopped", 75)
    assert state["reason"] in output
    if delay_s == 0:
        assert "stopped before training began" in output
        code, output, _ = ended(run(start, "--procs", "2", epochs), tmp_path)
        assert code == 0, output
        assert status(tmp_path / "run")["samples_seen"] == 2 * 1438


@pytest.mark.nightly
def test_ranks_of_torchrun_end_at_once_when_stopped_at_start(start: Start, tmp_path: Path) -> None:
    # Rank 1 is not there yet, so that rank 0 waits for it inside torch.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    open({str(fifo)!r}).read()\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    torchrun = ("-m", "torch.distributed.run", "--standalone", *NO_LOG_FOLDER, "--nproc-per-node", "2")
    process = start(
        "-m", "disttrain.worker", "tiny.yaml", "--run-dir", "run", program=torchrun, PYTHONPATH=path
    )
    ranks: list[psutil.Process] = []

    def rank_0_waits() -> bool:
        with contextlib.suppress(psutil.ZombieProcess):  # of torchrun's own, at its start
            children = psutil.Process(process.pid).children()
            ranks[:] = [child for child in children if "disttrain.worker" in child.cmdline()]
        return len(ranks) == 2 and any(
            line.laddr and line.status == psutil.CONN_ESTABLISHED
            for rank in ranks
            for line in rank.net_connections()
        )

    wait_for(rank_0_waits, process)
    time.sleep(1)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert "stopped before training began; nothing is lost" in output
    assert not descendants(tmp_path)


def test_no_worker_survives_the_launcher_even_if_it_is_frozen(start: Start, tmp_path: Path) -> None:
    process = run(start, "--procs", "2", "monitor.stall_timeout_s=600", how="stop")
    wait_for(lambda: (tmp_path / "failed-at").exists(), process)
    time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "accelerate and two workers"
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("program", "ignored"),
    [
        ("disttrain run", False),
        ("disttrain.worker", True),
        *nightly(("disttrain run", True), ("disttrain.worker", False)),
    ],
)
def test_a_terminal_that_closes_stops_and_saves_the_run(
    program: str, ignored: bool, tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    leader, follower = os.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    epochs = "train.epochs=4" if ignored else "train.epochs=300"
    process = subprocess.Popen(
        [sys.executable, "-m", *program.split(), config_file, "--run-dir", "run", epochs],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root), "TERM": "xterm"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    os.close(follower)
    wait_for(lambda: metrics(tmp_path / "run"), process)
    os.close(leader)  # as when ssh drops or the window is closed: the kernel sends SIGHUP
    assert process.wait(120) == (0 if ignored else 75)
    state = status(tmp_path / "run")
    assert state["state"] == ("finished" if ignored else "stopped")
    assert not descendants(tmp_path)
    saved = latest_valid(tmp_path / "run/checkpoints")[0]
    assert saved is not None
    assert saved.name == f"step_{state['step']:08d}"
