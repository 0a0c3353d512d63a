"""The dashboard on a real terminal, and in files and pipes."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from msgspec.structs import replace

from kit import REPOSITORY
from kit.console import EVAL, INFO, TRAIN, gpus, timeless
from kit.run_files import write_lines

PROGRAM = """
import sys
from disttrain.monitor.console import Console
from disttrain.monitor.dashboard import RunInfo
info = RunInfo("demo", "runs/demo", "cnn", 10, "digits", "1 process, CPU", "fp32", 64, 2, 10, 640)
step = 0
shown = Console(info, verbosity=0, position=lambda: (step, 64 * step))
"""


def on_terminal(program: str, *, columns: int = 80, rows: int = 24, **variables: str) -> tuple[int, str]:
    """Runs a program with a pseudo-terminal for its input and output; returns exit code and what it wrote."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], cwd=REPOSITORY, stdin=follower, stdout=follower,
        stderr=follower, env=environment | {"TERM": "xterm-256color"} | variables,
    )  # fmt: skip
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError as error:  # Linux answers so when the other end is closed
        if error.errno != errno.EIO:
            raise
    finally:
        os.close(leader)
    return child.wait(timeout=60), output.decode()


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.integration
def test_on_a_terminal_the_dashboard_moves_and_gives_the_cursor_back() -> None:
    program = (
        PROGRAM
        + """
import threading, time
with shown:
    for step in range(1, 11):
        time.sleep(0.1)
    print("printed by the model")
    shown.finish("finished [bold]well[/bold]", ok=True)
assert threading.active_count() <= 2
"""
    )
    code, output = on_terminal(program)
    assert code == 0
    assert output.count(HIDE) == output.count(SHOW) == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    steps = {int(step) for step in re.findall(r"step (\d+)/20", plain)}
    assert len(steps) >= 2
    assert max(steps) == 10
    assert plain.count("printed by the model") == 1
    last = output[output.rindex("elapsed") : output.rindex(SHOW)]
    assert "step 10/20" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last)
    assert plain.rstrip().endswith("finished [bold]well[/bold]\r\nrun folder runs/demo")
    assert plain.count("elapsed") <= 12  # at most four frames a second


@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "raise RuntimeError('bug')", "sys.exit(3)"])
def test_whatever_ends_the_run_the_cursor_comes_back(end: str) -> None:
    code, output = on_terminal(f"{PROGRAM}\nwith shown:\n    {end}\n")
    assert code != 0
    assert HIDE in output
    assert output.rindex(SHOW) > output.rindex(HIDE)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"JPY_PARENT_PID": "1"}], ids=str)
def test_where_nothing_can_move_there_are_plain_lines(variables: dict[str, str]) -> None:
    code, output = on_terminal(f"{PROGRAM}\nwith shown:\n    shown.note('hello')\n", **variables)
    assert code == 0
    assert "\x1b" not in output
    assert len(timeless(output)) == 5


def test_errors_sent_to_a_file_stay_in_the_file(tmp_path: Path) -> None:
    log = tmp_path / "errors"
    program = f"import sys\nsys.stderr = open({str(log)!r}, 'w')\n{PROGRAM}"
    program += (
        "with shown:\n    print('oops', file=sys.stderr)\nsys.stderr.close()\nsys.stderr = sys.__stderr__\n"
    )
    code, output = on_terminal(program)
    assert code == 0
    assert "oops" not in output
    assert log.read_text() == "oops\n"


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    program = (
        PROGRAM + "with shown:\n    for _ in range(9999):\n        shown.note('saved')\n    sys.exit(75)\n"
    )
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert (child.wait(timeout=60), errors) == (75, b"")


def test_console_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pynvml', 'psutil'}"
    program = f"import sys, disttrain.monitor.console; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_picture_of_a_run_is_drawn_from_its_folder(tmp_path: Path) -> None:
    choices = {key: f"{key}: why" for key in ("cache", "precision", "compile")}
    about = {"run": dataclasses.asdict(INFO), "choices": choices, "devices": [{"host": "a"}]}
    (tmp_path / "env.json").write_text(json.dumps(about))
    write_lines(tmp_path / "metrics.jsonl", [replace(TRAIN, gpus=gpus(2)), EVAL])
    picture = tmp_path / "dashboard.svg"
    command = [sys.executable, REPOSITORY / "docs" / "dashboard_svg.py", tmp_path, picture]
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True)
    text = picture.read_text().replace("&#160;", " ")
    for expected in (
        "2,466,000 parameters",
        "3/10",
        "step 234/980",
        "8,123/10,000",
        "GPU 1",
        "4 x NVIDIA H100",
    ):
        assert expected in text
    assert "url(" not in picture.read_text().replace("url(#", ""), "the picture loads nothing from elsewhere"
