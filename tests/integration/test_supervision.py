"""Ranks that die, hang or must stop, on one node and on two: real processes, real faults."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit.marks import nightly

Start = Callable[..., subprocess.Popen[str]]
STALL_S = 4
HOST = socket.gethostname()

# Fails on one rank in a pass of the wished kind: training, evaluation or (before any) its own construction.
MODEL = """
import os, signal, sys, time
from torch import nn

def fail(how):
    open("failed-at", "w").write(repr(time.time()))
    if how == "raise":
        raise RuntimeError("the pump is dry")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "exit":
        os._exit(0)
    if how == "sys.exit":
        sys.exit(0)
    def never_ends():
        while True:
            pass
    if how == "loop":
        never_ends()

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, fail=None, rank=1, when="training", once=False):
        super().__init__()
        pixels = in_channels * image_size[0] * image_size[1]
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes))
        here = os.environ.get("RANK", "0") == str(rank) and not (once and os.path.exists("failed-at"))
        self.how, self.when, self.passes = fail if here else None, when, 0
        if self.how and when == "start":
            fail_now(self.how)
        if self.how and when == "data":
            from disttrain.data.cached import Cached
            real = Cached.batches
            def batches(self, *arguments):
                for number, batch in enumerate(real(self, *arguments)):
                    if number == 5:
                        fail_now(fail)
                    yield batch
            Cached.batches = batches

    def forward(self, images):
        self.passes += self.training
        if self.how and self.passes >= 8 and self.training == (self.when == "training"):
            fail_now(self.how)
        return self.layers(images)

fail_now = fail
"""
QUIET = [
    "train.batch_size=48",
    "train.precision=fp32",
    "train.channels_last=true",
    "train.epochs=300",
    f"monitor.stall_timeout_s={STALL_S}",
]


@pytest.fixture
def start(tmp_path: Path, config_file: Path, digits_root: Path) -> Iterator[Start]:
    """Starts a program in tmp_path; at the end none of its processes may be left."""
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "tmp").mkdir()
    started = []

    def start(*arguments: object, program: tuple[str, ...] = ("-m", "disttrain"), **env: str) -> Any:
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"DISTTRAIN_DATA": str(digits_root), "TMPDIR": str(tmp_path / "tmp")} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    left = descendants(tmp_path)
    for process in [*left, *started]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    for process in started:
        process.communicate()
    assert not left, "processes are left behind"


def descendants(tmp_path: Path) -> list[psutil.Process]:
    """Returns the processes that work in a folder, zombies too if they were once seen to."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(tmp_path):
                found.append(process)
    return found


def run(start: Start, *arguments: str, how: str = "", when: str = "training", rank: int = 1) -> Any:
    model = ["model.name=mine:Net"]
    if how:
        model += [f"model.args.fail={how}", f"model.args.rank={rank}", f"model.args.when={when}"]
    return start("run", "tiny.yaml", "--run-dir", "run", *QUIET, *model, *arguments)


def ended(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str, float]:
    """Returns exit code, output and the seconds from the fault to the end; checks that nothing is left."""
    output, _ = process.communicate(timeout=120)
    now = time.time()
    assert not descendants(tmp_path), output
    assert not list((tmp_path / "tmp").glob("torchelastic_*")), "folders of torchrun are left"
    failed = tmp_path / "failed-at"
    return process.returncode, output, now - float(failed.read_text()) if failed.exists() else 0.0


def trains(tmp_path: Path) -> bool:
    """Tells whether the first log point is behind the run: the file is made before training begins."""
    metrics = tmp_path / "run/metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def status(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "run/status.json").read_text())
    return content


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- A rank dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "when", "procs", "words"),
    [
        ("kill", "training", 3, ["rank 1 on {host} was killed by SIGKILL in step"]),
        ("kill", "start", 2, ["rank 1 on {host} was killed by SIGKILL while starting"]),
        ("raise", "training", 3, ["rank 1 on {host} failed: RuntimeError: the pump is dry", "in forward"]),
        *nightly(
            ("kill", "evaluation", 2, ["was killed by SIGKILL in the evaluation after step 30"]),
            ("exit", "training", 2, ["rank 1 on {host} left early with exit code 0"]),
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
    state = status(tmp_path)
    assert (state["state"], state["exit_code"], state["rank"], state["host"]) == ("failed", 70, 1, HOST)
    assert seconds < 30


@pytest.mark.parametrize(("how", "code"), [("exit", 70), ("loop", 71)])
def test_a_single_process_is_watched_too(how: str, code: int, start: Start, tmp_path: Path) -> None:
    found, output, _ = ended(run(start, "--procs", "1", how=how, rank=0), tmp_path)
    assert found == code, output
    assert f"rank 0 on {HOST}" in output.splitlines()[-1]
    assert "wait for" not in output
    assert status(tmp_path)["exit_code"] == code


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


# --- A rank hangs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "when", "procs", "words"),
    [
        ("stop", "training", 3, "while computing (the process is stopped); ranks 0 and 2 wait for it"),
        ("stop", "start", 2, "while starting (the process is stopped); rank 0 waits for it"),
        ("loop", "evaluation", 2, "in the evaluation after step 30; rank 0 waits for it"),
        *nightly(
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
        assert "shows no stack" in output or "has not said a word" in output
    state = status(tmp_path)
    assert (state["state"], state["exit_code"], state["rank"], state["host"]) == ("failed", 71, 1, HOST)
    assert STALL_S - 1 < seconds < STALL_S + 30


@pytest.mark.nightly
def test_a_hang_is_survived_with_max_restarts(start: Start, tmp_path: Path) -> None:
    arguments = ["--procs", "2", "--max-restarts", "1", "train.epochs=2", "model.args.once=true"]
    code, output, _ = ended(run(start, *arguments, how="loop"), tmp_path)
    assert code == 0, output
    assert "restart 1 of 1" in output
    assert status(tmp_path)["restarts"] == 1


# --- A stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 1.6, 3.2, *nightly(0.8, 2.4, 4.0, 4.8)])
def test_a_stop_at_any_time_of_the_start_loses_nothing(delay_s: float, start: Start, tmp_path: Path) -> None:
    epochs = "train.epochs=2" if delay_s == 0 else "train.epochs=300"
    process = run(start, "--procs", "2", epochs)
    wait_for(lambda: (tmp_path / "run/status.json").exists(), process)
    time.sleep(delay_s)
    process.terminate()
    code, output, _ = ended(process, tmp_path)
    assert code == 75, output
    state = status(tmp_path)
    assert (state["state"], state["exit_code"]) == ("stopped", 75)
    assert state["reason"] in output
    if delay_s == 0:
        assert "stopped before training began" in output
        code, output, _ = ended(run(start, "--procs", "2", epochs), tmp_path)
        assert code == 0, output
        assert status(tmp_path)["samples_seen"] == 2 * 1438


def test_ranks_of_torchrun_end_at_once_when_stopped_at_start(start: Start, tmp_path: Path) -> None:
    # Rank 1 is not there yet, so that rank 0 waits for it inside torch.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    open({str(fifo)!r}).read()\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
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


# --- Two nodes --------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
    return number


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


def test_two_nodes_train(start: Start, tmp_path: Path, port: int) -> None:
    codes, outputs = both(two_nodes(start, port, "train.epochs=2"), tmp_path)
    assert codes == [0, 0], outputs
    state = status(tmp_path)
    assert (state["state"], state["world_size"], state["samples_seen"]) == ("finished", 2, 2 * 1438)
    assert (tmp_path / "run/logs/launch_00001.log").exists()


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise", 70, f"rank 1 on {HOST} failed: RuntimeError: the pump is dry"),
        ("loop", 71, f"rank 1 on {HOST} hangs"),
        *nightly(
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
    state = status(tmp_path)
    assert (state["state"], state["exit_code"], state["rank"]) == ("failed", code, 1)


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
    assert status(tmp_path)["reason"] == f"node 1 ({HOST}) is gone"


@pytest.mark.parametrize("rank", [1, *nightly(0)])
def test_a_stop_of_one_node_stops_and_saves_on_both(
    rank: int, start: Start, tmp_path: Path, port: int
) -> None:
    processes = two_nodes(start, port)
    wait_for(lambda: trains(tmp_path), processes[0])
    processes[rank].send_signal(signal.SIGUSR2)
    codes, outputs = both(processes, tmp_path)
    assert codes == [75, 75], outputs
    assert status(tmp_path)["state"] == "stopped"
    assert (tmp_path / "run/checkpoints/latest/MANIFEST.json").exists()


def test_a_second_signal_on_one_node_ends_both(start: Start, tmp_path: Path, port: int) -> None:
    processes = two_nodes(start, port, "monitor.stall_timeout_s=100", how="loop")
    wait_for(lambda: (tmp_path / "failed-at").exists(), processes[0])
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1)
    codes, outputs = both(processes, tmp_path)
    assert codes == [143, 143], outputs


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
    assert status(tmp_path)["exit_code"] == 71


def test_a_port_that_is_taken(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, output, _ = ended(node(start, 0, port), tmp_path)
    assert code == 73, output
    assert f"port {port} on {HOST} cannot be used" in output
    assert not (tmp_path / "run/logs/launch_00000.log").exists(), "nothing was started"


# --- Other doors ------------------------------------------------------------------------------------


def worker(start: Start, rank: int, port: int, *arguments: str) -> Any:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = ("-m", "disttrain.worker")
    return start("tiny.yaml", "--run-dir", "run", *arguments, program=program, **place, **address)


def test_ranks_with_other_settings_are_refused_without_our_launcher(
    start: Start, tmp_path: Path, port: int
) -> None:
    ranks = [worker(start, rank, port, f"seed={rank}") for rank in (0, 1)]
    codes, outputs = both(ranks, tmp_path)
    assert codes == [2, 2], outputs
    assert f"seed is 0 on rank 0 on {HOST} and 1 on rank 1 on {HOST}" in outputs[0]


def test_a_rank_whose_port_is_taken(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, output, _ = ended(worker(start, 0, port), tmp_path)
    assert code == 73, output
    assert f"127.0.0.1:{port} is taken on {HOST}" in output


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
    assert f"rank 0 on {HOST} waited 31 s for the others in step" in output
