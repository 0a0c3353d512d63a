"""`disttrain top`: the GPUs of a run, from its files, and of a node, on terminals and through pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from rich.cells import cell_len

from disttrain.monitor import top
from disttrain.monitor.top import Gpu, Snapshot, lines
from disttrain.runs import jsonl
from disttrain.runs.records import GpuReading
from kit import REPOSITORY, nvml
from kit.commands import Run
from kit.run_files import eval_record, train_record, write_lines

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
READING = Gpu(
    time=NOW.isoformat(), uuid="GPU-x", name="NVIDIA H100 80GB HBM3",
    utilization_pct=97, memory_utilization_pct=40, memory_used_mib=71000, memory_used_by_us_mib=70000,
    memory_total_mib=81559, power_w=650.4, power_limit_w=700.0, temperature_c=64, sm_clock_mhz=1980,
    memory_clock_mhz=2619, throttle=("power",), sm_activity_pct=81.2, tensor_activity_pct=41.5,
    pcie_rx_mib_per_s=12345.6, pcie_tx_mib_per_s=234.5, nvlink_rx_mib_per_s=123456.7,
    nvlink_tx_mib_per_s=123456.7, ecc_corrected=2, ecc_uncorrected=0, xids=(), lost=False,
)  # fmt: skip
TRAIN = train_record(
    1200, epoch=3, loss=0.45123, accuracy=0.832, images_per_s=12345.4, step_time_s=0.04, data_wait_pct=3.1
)
EVAL = eval_record(1000, 0.8125, epoch=2, correct=8125, total=10000)
STATUS = {
    "state": "running", "exit_code": None, "reason": None, "rank": None, "host": None, "step": 1200,
    "epoch": 2, "updated_at": NOW.isoformat(),
}  # fmt: skip


def gpus(count: int, per_host: int = 8) -> list[Gpu]:
    return [
        replace(
            READING, host=f"cluster-node-{i // per_host:04d}", index=i % per_host, uuid=f"GPU-{i:04d}",
            utilization_pct=i % 100,
        )
        for i in range(count)
    ]  # fmt: skip


def snapshot(rows: Sequence[Gpu], **changes: Any) -> Snapshot:
    known: dict[str, Any] = {
        "run": "runs/alexnet/1", "time": NOW + timedelta(seconds=2), "status": STATUS,
        "last_sign_age_s": 1.5, "train": TRAIN, "eval": EVAL,
        "gpus": [replace(row, age_s=1.5) for row in rows],
    }  # fmt: skip
    return Snapshot(**known | changes)


def plain(shown: Snapshot, width: int = 80, height: int | None = None) -> list[str]:
    return [line.plain for line in lines(shown, width, height)]


# --- What is drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_gpu_fits_its_line(width: int) -> None:
    shown = plain(snapshot(gpus(16)), width)
    assert all(cell_len(line) <= width for line in shown)
    assert sum(" GPU " in line for line in shown) == 16
    row = next(line for line in shown if line.startswith("…ter-node-0001 GPU 5 "))
    for part in (" 13 % ", " 69.3/79.6 GiB ", " 650/700 W ", " 64 °C ", " 2 s"):
        assert part in row
    assert re.search("━.*─", row), "a bar that is read without colour"


def test_a_wide_terminal_shows_more_of_each() -> None:
    shown = plain(snapshot(gpus(1)), 200)
    (row,) = (line for line in shown if line.startswith("GPU 0"))
    (titles,) = (line for line in shown if "SM clock" in line)
    for title, cell in (
        ("SM clock", "1980 MHz"), ("SMs", "81 %"), ("tensor", "42 %"), ("mem use", "40 %"),
        ("ours", "68.4 GiB"),
        ("PCIe in/out MiB/s", "12,346/234"), ("NVLink in/out MiB/s", "123,457/123,457"), ("ECC", "2/0"),
        ("slowed by", "power"),
    ):  # fmt: skip
        end = titles.index(title) + len(title)
        assert row[:end].endswith(" " + cell), title


def test_more_gpus_than_lines_are_folded_and_a_pipe_gets_all() -> None:
    shown = plain(snapshot(gpus(64)), 80, 20)
    assert len(shown) == 20
    named = sum(line.count(" GPU ") for line in shown)
    assert shown[-1] == f"+{64 - named} more   use of all 64: mean 32 %, least 0 %, most 63 %"
    assert named >= 24
    assert sum(" GPU " in line for line in plain(snapshot(gpus(64)), 80, None)) == 64
    for height in range(1, 12):
        assert len(plain(snapshot(gpus(64)), 80, height)) <= height


def test_what_is_unknown_is_said_to_be() -> None:
    row = Gpu(host="a", uuid="GPU-1")
    (shown,) = (line for line in plain(snapshot([], gpus=[row]), 200) if line.startswith("GPU n/a"))
    assert re.fullmatch(r"GPU n/a ─+ +n/a +n/a/n/a +n/a/n/a( +n/a){7} +n/a/n/a +n/a/n/a +n/a/n/a +n/a", shown)
    bare = snapshot([], train=None, eval=None, status={}, last_sign_age_s=None)
    assert plain(bare)[1] == "starting, last sign of life n/a ago"
    assert plain(bare)[-1] == "no readings yet"


def test_instances_of_a_split_gpu_are_told_apart() -> None:
    rows = [replace(row, index=0, uuid=f"MIG-{i}a{i}b-1") for i, row in enumerate(gpus(2))]
    assert [line[:10] for line in plain(snapshot(rows))[-2:]] == ["GPU 0/0a0b", "GPU 0/1a1b"]


def test_what_is_wrong_stands_below() -> None:
    rows = gpus(4, per_host=2)
    rows[1] = Gpu(host=rows[1].host, index=1, uuid=rows[1].uuid, lost=True, xids_seen=(63, 79))
    rows[2] = replace(rows[2], throttle=("power", "thermal"), ecc_uncorrected=3)
    assert plain(snapshot(rows), 200)[-2:] == [
        "…ter-node-0000 GPU 1: is lost: it has fallen off the bus or must be reset, Xid 63, Xid 79",
        "…ter-node-0001 GPU 0: 3 uncorrectable memory errors, slowed by thermal",
    ]
    assert plain(snapshot(rows), 200, 9)[-1].startswith("…ter-node-0001 GPU 0: 3 unc"), "folding keeps it"


@pytest.mark.parametrize(
    ("status", "silent_s", "expected"),
    [
        (STATUS, 1.5, "running, last sign of life 2 s ago"),
        (STATUS, 7300, "running, last sign of life 2 h ago"),
        (
            STATUS | {"state": "finished", "exit_code": 0, "reason": "all epochs done"},
            9.0,
            "finished 2 s ago, exit code 0: all epochs done",
        ),
        (
            STATUS
            | {"state": "failed", "exit_code": 70, "reason": "CUDA error\nat 1", "rank": 3, "host": "node2"},
            9.0,
            "failed 2 s ago, exit code 70, rank 3 on node2: CUDA error",
        ),
    ],
)
def test_the_state_of_the_run_comes_first(status: dict[str, Any], silent_s: float, expected: str) -> None:
    shown = plain(snapshot(gpus(1), status=status, last_sign_age_s=silent_s), 120)
    assert shown[:3] == [
        "disttrain top  runs/alexnet/1",
        expected,
        "step 1,200  epoch 3  loss 0.4512  accuracy 83.20 %  12,345 images/s  wait 3 %  eval 81.25 %",
    ]


def test_nothing_in_a_name_moves_the_cursor() -> None:
    rows = [replace(row, host="a\x1b[2J") for row in gpus(1)] + gpus(1)
    assert not any("\x1b" in line for line in plain(snapshot(rows, status={"state": "x\x1b[H"})))


# --- The files of a run -------------------------------------------------------------------------------


def readings(rows: Sequence[Gpu]) -> list[GpuReading]:
    """Returns what gpu.jsonl has of them."""
    return [msgspec.convert(row, GpuReading, from_attributes=True) for row in rows]


def step_of(found: Snapshot) -> int:
    assert found.train is not None
    return found.train.step


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run on two nodes of two GPUs, as of now."""
    now = datetime.now(UTC).isoformat()
    rows = [replace(row, time=now) for row in gpus(4, per_host=2)]
    devices = [
        {"rank": i, **{k: getattr(row, k) for k in ("host", "index", "uuid", "name")}}
        for i, row in enumerate(rows)
    ]
    write_lines(tmp_path / "run/gpu.jsonl", readings(rows))
    write_lines(tmp_path / "run/metrics.jsonl", [EVAL, TRAIN])
    (tmp_path / "run/env.json").write_text(json.dumps({"devices": devices}))
    (tmp_path / "run/status.json").write_text(json.dumps(STATUS | {"updated_at": now}))
    return tmp_path / "run"


def test_new_lines_are_followed_and_torn_ones_left(run_dir: Path) -> None:
    file = run_dir / "gpu.jsonl"
    look = top._run(run_dir)
    assert [gpu.utilization_pct for gpu in look().gpus] == [0, 1, 2, 3]
    with file.open("a") as end:
        end.write('torn\n[1]\n{"uuid": "GPU-0001", "utilization_pct": 50}\n{"uuid": "GPU-0002", "utiliz')
    assert [gpu.utilization_pct for gpu in look().gpus] == [0, 50, 2, 3]
    with file.open("a") as end:
        end.write('ation_pct": 60}\n')
    assert [gpu.utilization_pct for gpu in look().gpus] == [0, 50, 60, 3]
    assert step_of(look()) == 1200
    # A run that goes on drops the records after its checkpoint: the file is another one.
    write_lines(run_dir / "other", [replace(TRAIN, step=1000)])
    (run_dir / "other").replace(run_dir / "metrics.jsonl")
    assert step_of(look()) == 1000
    write_lines(run_dir / "metrics.jsonl", [replace(TRAIN, step=1001)], "ab")
    assert step_of(look()) == 1001


def test_the_last_reading_of_a_node_that_fell_silent_is_found_far_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_FIRST_BYTES", 2000)
    lost = replace(gpus(4)[3], xids=(79,), lost=True)
    later = [replace(row, utilization_pct=i) for i in range(500) for row in gpus(3)]
    write_lines(run_dir / "gpu.jsonl", readings([lost, *later]), "ab")
    rows = top._run(run_dir)().gpus
    assert [row.utilization_pct for row in rows] == [499, 499, 499, 3]
    assert (rows[3].lost, rows[3].xids_seen) == (True, (79,))


def test_gpus_without_a_reading_are_shown_too(run_dir: Path) -> None:
    (run_dir / "gpu.jsonl").unlink()
    look = top._run(run_dir)
    assert [gpu.utilization_pct for gpu in look().gpus] == [None] * 4
    assert "GPU 1" in "\n".join(plain(look()))
    write_lines(run_dir / "gpu.jsonl", readings(gpus(1)))
    assert [gpu.utilization_pct for gpu in look().gpus] == [0, None, None, None]


# --- The command --------------------------------------------------------------------------------------


def test_through_a_pipe_all_is_shown_once(disttrain: Run, run_dir: Path) -> None:
    done = disttrain("top", run_dir, env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.splitlines()
    assert sum(" GPU " in line for line in shown) == 4
    assert shown[1].startswith("running, last sign of life ")
    assert all(cell_len(line) <= 80 for line in shown[2:])
    assert "\x1b" not in done.stdout
    ascii_only = disttrain("top", run_dir, env={"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0
    assert ascii_only.stdout.isascii()


def test_json_is_printed_once(disttrain: Run, run_dir: Path) -> None:
    (run_dir / "status.json").write_text(
        json.dumps(STATUS | {"state": "failed", "exit_code": 70, "reason": "killed", "rank": 1, "host": "b"})
    )
    done = disttrain("top", run_dir, "--json")
    found = json.loads(done.stdout)
    assert [row["uuid"] for row in found["gpus"]] == [f"GPU-{i:04d}" for i in range(4)]
    assert found["gpus"][0]["power_w"] == 650.4
    assert found["gpus"][0]["age_s"] < 600
    assert (found["status"]["exit_code"], found["eval"]["correct"]) == (70, 8125)


def test_a_folder_without_a_run_is_a_mistake(disttrain: Run, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        done = disttrain("top", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr
            == f"disttrain: {path}: holds no run; give a run folder, such as runs/<name>/<UTC time>\n"
        )


def test_a_run_on_cpus_shows_its_processes_after_the_end(disttrain: Run, config_file: Path) -> None:
    run = disttrain("run", config_file, "--procs", "1", "--run-dir", "run", "train.epochs=1")
    assert run.returncode == 0, run.stderr
    done = disttrain("top", "run", env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^finished \d+ s ago, exit code 0: all epochs done$", done.stdout, re.MULTILINE)
    assert re.search(r"^rank 0 [━╾─]+ +[\d.]+ % +[\d.]+ GiB$", done.stdout, re.MULTILINE)
    assert "eval " in done.stdout


def test_without_a_run_the_gpus_of_this_node(disttrain: Run, tmp_path: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(nvml.build(tmp_path)), "COLUMNS": "200", "FAKE_NVML_MIG": "1:2"}
    environment |= {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_THROTTLE": "3:32"}
    shown = disttrain("top", env=environment).stdout
    rows = re.findall(r"^(GPU \S+) .* GiB", shown, re.MULTILINE)
    assert rows == ["GPU 0", "GPU 1", "GPU 1/0100", "GPU 1/0101", "GPU 2", "GPU 3"]
    assert "350/700 W" in shown
    assert "310/320" in shown, "rates, which need two readings"
    assert shown.endswith("GPU 3: slowed by thermal\n")
    found = json.loads(disttrain("top", "--json", env=environment).stdout)
    assert [row["index"] for row in found["gpus"]] == [0, 1, 1, 1, 2, 3]


def test_a_node_without_gpus_says_so(disttrain: Run, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    done = disttrain("top", env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("no NVIDIA GPU that NVML knows\n")


def test_a_node_whose_gpus_cannot_be_read_says_why_and_fails(disttrain: Run, tmp_path: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(nvml.build(tmp_path)), "FAKE_NVML_INIT": "18"}
    for arguments in ([], ["--json"]):
        done = disttrain("top", *arguments, env=environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "disttrain: the GPUs of this node cannot be read: NVML: RM has detected an NVML/RM version "
            "mismatch; run `disttrain doctor`\n"
        )


def test_a_gpu_that_was_lost_before_is_a_row(disttrain: Run, tmp_path: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(nvml.build(tmp_path)), "COLUMNS": "100"}
    environment["FAKE_NVML_ERROR"] = "nvmlDeviceGetHandleByIndex_v2:2:15"
    shown = disttrain("top", env=environment).stdout
    rows = re.findall(r"^(GPU \d) (\S*) +[━╾─]+ +(\d+ %|n/a) ", shown, re.MULTILINE)
    assert rows == [
        ("GPU 0", "idle", "5 %"), ("GPU 1", "", "15 %"), ("GPU 2", "lost", "n/a"), ("GPU 3", "", "35 %"),
    ]  # fmt: skip
    assert shown.endswith("GPU 2: is lost: NVML: GPU is lost\n")
    found = json.loads(disttrain("top", "--json", env=environment).stdout)
    assert [row["lost"] for row in found["gpus"]] == [False, False, True, False]


def test_memory_that_is_shared_or_not_known_is_marked(disttrain: Run, tmp_path: Path) -> None:
    path = f"{nvml.build(tmp_path)}:{nvml.build_cuda(tmp_path)}"
    environment = {"LD_LIBRARY_PATH": path, "COLUMNS": "100", "FAKE_NVML_GPUS": "2"}
    unknown = environment | {"FAKE_NVML_TOTAL": "1:0"}
    assert re.search(r"^GPU 1 .* n/a/n/a ", disttrain("top", env=unknown).stdout, re.MULTILINE)
    shown = disttrain("top", env=unknown | {"FAKE_CUDA_INTEGRATED": "1"}).stdout
    assert re.search(r"^GPU 0 .* 0\.1/80\.0 GiB  +50/700 W", shown, re.MULTILINE)
    assert re.search(r"^GPU 1 .* [\d.]+/[\d.]+ GiB shared +150/700 W", shown, re.MULTILINE)


class Terminal:
    """A terminal of 24 rows and 80 columns in which a command runs."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "disttrain", *map(str, arguments)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=REPOSITORY,
            env=environment | {"TERM": "xterm-256color"} | variables,
            start_new_session=True,
        )
        os.close(follower)
        self.output = ""

    def read(self, until: Callable[[str], bool], limit_s: float = 120) -> bool:
        """Reads what the command writes until it satisfies, or it ends."""
        end = time.monotonic() + limit_s
        while not until(self.output) and time.monotonic() < end:
            if select.select([self.leader], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.leader, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        return until(self.output)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.leader)


@pytest.mark.integration
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_is_live_and_calm_and_ends_cleanly(run_dir: Path, end: signal.Signals) -> None:
    with contextlib.closing(Terminal("top", run_dir)) as terminal:
        assert terminal.read(lambda text: "GPU 1" in text)
        write_lines(run_dir / "gpu.jsonl", readings([replace(gpus(4)[1], power_w=77.0)]), "ab")
        assert terminal.read(lambda text: "77/700 W" in text)
        began, before = time.monotonic(), terminal.output.count("disttrain top")
        terminal.read(lambda text: False, limit_s=3)
        frames = terminal.output.count("disttrain top") - before
        assert 1 <= frames <= 2 * (time.monotonic() - began) + 1
        terminal.child.send_signal(end)
        terminal.read(lambda text: False, limit_s=60)
        assert terminal.child.wait(timeout=60) == 0
        assert terminal.output.count("\x1b[?25l") == terminal.output.count("\x1b[?25h") == 1
        assert "Traceback" not in terminal.output
        assert "Aborted" not in terminal.output


def test_without_colour_nothing_is_coloured(run_dir: Path) -> None:
    with contextlib.closing(Terminal("top", run_dir, NO_COLOR="1")) as terminal:
        assert terminal.read(lambda text: "GPU 1" in text)
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.output)


def test_a_dumb_terminal_gets_it_once(run_dir: Path) -> None:
    with contextlib.closing(Terminal("top", run_dir, TERM="dumb")) as terminal:
        terminal.read(lambda text: False)
        assert terminal.child.wait(timeout=60) == 0
        assert terminal.output.count("disttrain top") == 1
        assert "\x1b" not in terminal.output
