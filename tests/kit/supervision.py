"""Runs whose ranks fail on demand."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

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

# Its steps are slow until there is a file `hurry`.
SLOW = """
import os, time
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, images):
        if self.training and not os.path.exists("hurry"):
            time.sleep(0.1)
        return self.layers(images)
"""

QUIET = [
    "train.batch_size=48",
    "train.precision=fp32",
    "train.channels_last=true",
    "train.epochs=300",
    f"monitor.stall_timeout_s={STALL_S}",
]


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
