"""Kills processes that save checkpoints, and looks at what is left. Prints one JSON document.

    killed_saves.py kills FOLDER NUMBER SEED    SIGKILL at random moments, as many times
    killed_saves.py sweep FOLDER STEPS STEP     at every call to the system, STEP after STEPS

The processes are forked from this one, which has imported torch and runs no thread.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from disttrain.runs.checkpoint import load, snapshot, write
from disttrain.runs.manifest import latest_valid, verify_checkpoint

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.scandir", "os.listdir"}
"""Events of Python's audit hook; what it does not tell of is wrapped in `kill_at`."""

LARGE, SMALL = 500_000, 500


def save(folder: Path, step: int, value: int, *, size: int = SMALL, keep: int = 2) -> None:
    """Saves a checkpoint whose numbers are all `value`; every fifth step is the best."""
    tensor = torch.full((size,), float(value))
    parts = {
        "model": {"weight": tensor},
        "optimizer": {"state": {0: {"average": tensor}}},
        "ema": {"w": tensor},
    }
    write(folder, snapshot(step, parts, {"value": value}), keep=keep, best=step % 5 == 1)


def look(folder: Path) -> tuple[int, int, list[str]]:
    """Returns step and value of the newest sound checkpoint, and what was found to be damaged."""
    found, damages = latest_valid(folder)
    assert found is not None
    for path in folder.glob("step_*"):
        verify_checkpoint(path)  # older ones too are whole or not there
    loaded = load(found)
    value = loaded.state["value"]
    assert bool((loaded.parts["model"]["weight"] == value).all())
    assert bool((loaded.parts["optimizer"]["state"][0]["average"] == value).all())
    return int(found.name.removeprefix(".").split("_")[1].split(".")[0]), value, list(map(str, damages))


def forked(work: Callable[[], None]) -> int:
    """Returns the number of a process that does some work and ends."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def kill_at_random(folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Kills a process that saves one step after the other; the next goes on from what is left."""
    chance = random.Random(seed)
    save(folder, 0, 0, size=LARGE)
    began = time.monotonic()
    save(folder, 0, 0, size=LARGE)
    one_save_s = time.monotonic() - began
    trials = []
    for trial in range(1, number + 1):
        begin, _, _ = look(folder)
        receive, send = os.pipe()

        def work(begin: int = begin, trial: int = trial, send: int = send) -> None:
            for step in range(begin, 10**6):  # the first one exists already
                save(folder, step, 10**6 * trial + step, size=LARGE)
                os.write(send, step.to_bytes(8))

        child = forked(work)
        os.close(send)
        time.sleep(chance.uniform(0, 4 * one_save_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = [begin - 1]
        while data := os.read(receive, 8):
            told.append(int.from_bytes(data))
        os.close(receive)
        step, value, damages = look(folder)
        trials.append(
            {
                "begin": begin,
                "told": told[-1],
                "step": step,
                "new": value // 10**6 == trial,
                "damages": damages,
            }
        )
    step, _, _ = look(folder)
    save(folder, step + 1, 1)
    return {"trials": trials, "last": look(folder), "left": sorted(path.name for path in folder.iterdir())}


def kill_at(place: int) -> Callable[[], int]:
    """Ends this process at a call to the system; returns how to ask for the number of calls so far."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            count()
            if name == "write" and calls + 1 == place:  # in the middle of a file
                arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
            return original(*arguments)

        setattr(os, name, call)

    sys.addaudithook(lambda event, _: count() if event in CALLS else None)
    for name in ("write", "fsync", "close"):
        before(name)
    return lambda: calls


def sweep(folder: Path, steps: list[int], step: int) -> dict[str, Any]:
    """Kills a save at its first call to the system, at its second, and so on to the last."""
    template = folder / "template"
    for earlier in steps:
        save(template, earlier, earlier, keep=1)
    trials = []
    ended = False
    while not ended:
        place = len(trials) + 1
        here = folder / str(place)
        shutil.copytree(template, here, symlinks=True)

        def work(here: Path = here, place: int = place) -> None:
            kill_at(place)
            save(here, step, 99, keep=1)

        _, status = os.waitpid(forked(work), 0)
        ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        assert ended or os.WTERMSIG(status) == signal.SIGKILL
        found, value, damages = look(here)
        save(here, step + 1, 100, keep=1)
        trials.append(
            {
                "step": found,
                "value": value,
                "damages": damages,
                "further": look(here)[:2],
                "left": sorted(path.name for path in here.iterdir()),
            }
        )
        shutil.rmtree(here)
    return {"trials": trials}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "kills":
        result = kill_at_random(Path(folder), *map(int, rest))
    else:
        result = sweep(Path(folder), json.loads(rest[0]), int(rest[1]))
    print(json.dumps(result), flush=True)
