"""Nothing is lost: kills, flipped bits, full and read-only disks, with real processes."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from disttrain.config import load_config
from disttrain.errors import CheckpointError
from disttrain.preflight import open_index
from disttrain.runs.fingerprint import fingerprint
from disttrain.runs.manifest import MANIFEST, latest_valid, list_steps
from disttrain.runs.resume import resume_point
from disttrain.runs.runfolder import RunFolder
from kit import PROGRAMS
from kit.commands import Run, wait_for
from kit.marks import nightly
from kit.run_results import computed_records as records
from kit.run_results import ids_per_step, status

CONFIG = """
name: small
data: {name: digits}
augment: {crop_padding: 1}
model: {name: "mine:Net", args: {width: 64}}
train: {epochs: 3, batch_size: 64, ema: 0.9, precision: fp32, channels_last: false, trace_samples: true}
optim: {name: adam, lr: 1e-3}
checkpoint: {every_steps: 5, keep: 3}
monitor: {log_every_steps: 5}
"""
MODEL = """
import os, signal, time
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        layers = nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, num_classes)
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.stop, self.passes = int(os.environ.get("STOP_AT", 0)), 0

    def forward(self, images):
        self.passes += self.training
        if self.training and self.passes == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # a thread hears it: before the step is over
        return self.layers(images)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with an experiment whose checkpoints are as large as asked for by model.args.width."""
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text(MODEL)
    return tmp_path


def small(disttrain: Run, run: str | Path, *more: str, stop_at: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the experiment in a folder, and stops it as SIGTERM does in a step."""
    arguments = ["run", "small.yaml", "--procs", "1", "--run-dir", run, *more]
    return disttrain(*arguments, env={"STOP_AT": str(stop_at), "OMP_NUM_THREADS": "1"})


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


# --- Killed while saving ----------------------------------------------------------------------------


def killed_saves(*arguments: object, timeout_s: float = 500) -> Any:
    command = [sys.executable, PROGRAMS / "killed_saves.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def survived(folder: Path, kills: int, seed: int, timeout_s: float) -> int:
    """Kills a process that saves so many times; returns after how many of them nothing was lost."""
    found = killed_saves("kills", folder, kills, seed, timeout_s=timeout_s)
    assert len(found["trials"]) == kills
    lost = [
        trial
        for trial in found["trials"]
        if trial["damages"] or trial["step"] not in {max(trial["told"], trial["begin"]), trial["told"] + 1}
    ]
    assert not lost
    begun = sum(trial["new"] for trial in found["trials"])
    assert 0 < begun < kills or kills < 50, "killed both before the first save was complete and after that"
    step, value, _ = found["last"]
    assert value == 1, "a further save works"
    assert [name for name in found["left"] if name.startswith(".")] == []
    assert f"step_{step:08d}" in found["left"]
    print(f"{kills} of {kills} kills survived, {begun} of them after a save was complete")
    return kills - len(lost)


@pytest.mark.nightly
def test_kills_at_random_moments_of_a_save_lose_nothing(tmp_path: Path) -> None:
    assert survived(tmp_path, 50, random.randrange(10**9), 500) == 50


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_thousand_kills_lose_nothing(tmp_path: Path) -> None:
    assert survived(tmp_path, 1000, random.randrange(10**9), 3500) == 1000


@pytest.mark.parametrize(
    ("steps", "step"),
    [([1, 2], 3), ([1, 2], 2), *nightly(([2], 2), ([2], 3))],
    ids=["new", "existing", "the only one", "after the only one"],
)
def test_a_kill_at_any_call_to_the_system_loses_nothing(tmp_path: Path, steps: list[int], step: int) -> None:
    trials = killed_saves("sweep", tmp_path, json.dumps(steps), step)["trials"]
    assert len(trials) >= 40
    for trial in trials:
        assert trial["damages"] == []
        assert (trial["step"], trial["value"]) in {(steps[-1], steps[-1]), (step, 99)}
        assert trial["further"] == [step + 1, 100]
        best = [f"step_{best:08d}" for best in {*steps, step, step + 1} if best % 5 == 1]
        links = ["best", "latest"] if best else ["latest"]
        assert trial["left"] in ([*links, *sorted({*best, f"step_{step + 1:08d}"})],), trial
    assert [trial["value"] for trial in (trials[0], trials[-1])] == [steps[-1], 99]
    switches = sum(a["value"] != b["value"] for a, b in itertools.pairwise(trials))
    assert switches == 1, "one call makes the difference between the old and the new one"


# --- Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path) -> Path:
    """A run that was stopped in its second epoch, at step 37; copies of it are gone on with."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "small.yaml").write_text(CONFIG)
    (folder / "mine.py").write_text(MODEL)
    variables = {"DISTTRAIN_DATA": digits_root, "DISTTRAIN_CACHE": decoded_cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", "run", "small.yaml", "--procs", "1", "--run-dir", "run"],
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in variables.items()} | {"STOP_AT": "37"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 75, done.stderr
    assert [path.name for path in list_steps(folder / "run/checkpoints")] == [
        f"step_{step:08d}" for step in (37, 35, 30, 23)
    ], "three, and the best"
    return folder


@pytest.fixture
def copy(stopped: Path, here: Path) -> Path:
    """The folder of the stopped run, to be changed."""
    shutil.copytree(stopped / "run", here / "run", symlinks=True)
    return here / "run"


@pytest.fixture
def resume(copy: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Decides where the stopped run goes on, as launcher and worker do."""
    monkeypatch.setenv("DISTTRAIN_DATA", str(digits_root))
    config = load_config(copy / "config.yaml")
    now = fingerprint(config, open_index(config, print))
    return lambda: resume_point(RunFolder(copy), "auto", now)


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_taken(
    copy: Path, resume: Callable[[], Any]
) -> None:
    chance = random.Random(0)
    newest, before, *_ = list_steps(copy / "checkpoints")
    assert resume().checkpoint == newest
    flips = 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        places = chance.sample(range(len(whole)), min(len(whole), 100))
        for place in {0, len(whole) - 1, *places}:
            flip(path, place, chance.randrange(8))
            start = resume()
            assert start.checkpoint == before
            named = newest if path.name == MANIFEST else path  # its format is that of the checkpoint
            kinds = "damaged: found .*sha256 [0-9a-f]{64}|damaged: not|checkpoint format"
            assert re.match(rf"{named}.*: ({kinds})", start.notes[0])
            path.write_bytes(whole)
            flips += 1
    assert flips >= 400
    assert resume().checkpoint == newest
    print(f"{flips} of {flips} flips noticed")


def test_cut_and_missing_files_are_noticed(copy: Path, resume: Callable[[], Any]) -> None:
    newest, before, *_ = list_steps(copy / "checkpoints")
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1, len(whole) + 1, None):
            path.unlink()
            if length is not None:
                path.write_bytes((whole + b"\0")[:length])
            start = resume()
            assert start.checkpoint == before
            assert str(path) in start.notes[0]
        path.write_bytes(whole)
    assert resume().checkpoint == newest
    for path in list_steps(copy / "checkpoints"):
        (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        resume()
    assert str(caught.value).count("model.safetensors: missing") == 4


@pytest.mark.nightly
def test_a_damaged_run_goes_on_and_ends_as_if_it_had_never_been_stopped(
    disttrain: Run, copy: Path, here: Path
) -> None:
    flip(copy / "checkpoints/step_00000037/optimizer.safetensors", 5000, 3)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4')  # torn
    done = small(disttrain, "run")
    assert done.returncode == 0, done.stderr
    assert "step_00000037/optimizer.safetensors: damaged: found " in done.stdout
    assert "is kept as damaged_step_00000037" in done.stdout
    assert "resuming from" in done.stdout
    assert "step_00000035, step 35" in done.stdout
    assert (copy / "checkpoints/damaged_step_00000037").is_dir()
    assert small(disttrain, "whole").returncode == 0
    assert records(here / "run") == records(here / "whole")
    assert ids_per_step(here / "run") == ids_per_step(here / "whole")
    ours, theirs = (
        (here / run / "checkpoints/latest/model.safetensors").read_bytes() for run in ("run", "whole")
    )
    assert ours == theirs


def test_resume_from_an_earlier_checkpoint_forgets_what_came_after(
    disttrain: Run, copy: Path, here: Path
) -> None:
    done = small(disttrain, "run", "--resume", "run/checkpoints/step_00000030", stop_at=3)
    assert done.returncode == 75, done.stderr
    assert "abandoned_step_00000037" in done.stdout
    found, _ = latest_valid(copy / "checkpoints")
    assert found == copy / "checkpoints/step_00000033", "and not the 37 of the other attempt"
    assert [record["step"] for record in records(copy) if record["kind"] == "train"][-2:] == [25, 30]


def test_no_part_can_be_left_out(stopped: Path, digits_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAMS / "left_out.py", stopped / "run"],
        cwd=stopped,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop(".") == [0, 37], "with all of them it goes on"
    assert {"parts.model", "parts.optimizer", "parts.ema", "state.step", "state.scaler"} <= set(outcomes)
    for name, (code, message) in outcomes.items():
        assert code == 66, (name, message)
        assert re.search(rf"has no {name.partition('.')[2]}\b", message), (name, message)


# --- Changes ----------------------------------------------------------------------------------------


def test_a_change_is_refused_shown_and_with_force_recorded(disttrain: Run, copy: Path) -> None:
    before = (copy / "config.yaml").read_text()
    refused = small(disttrain, "run", "optim.lr=2e-3", "train.batch_size=32")
    assert refused.returncode == 2
    assert "optim.lr: 0.001 -> 0.002" in refused.stderr
    assert "train.batch_size: 64 -> 32" in refused.stderr
    assert (copy / "config.yaml").read_text() == before

    changes = ["optim.lr=2e-3", "train.batch_size=32"]
    stopped = small(disttrain, "run", *changes, "--force", stop_at=3)
    assert stopped.returncode == 75, stopped.stderr
    assert "epoch 2 starts again" in stopped.stdout
    assert (copy / "config.37.yaml").read_text() == before
    assert load_config(copy / "config.yaml").optim.lr == 2e-3
    epoch = [step for step, ids in ids_per_step(copy).items() if step[1] > 37 and len(ids) == 32]
    assert epoch == [(2, 38), (2, 39), (2, 40)]

    done = small(disttrain, "run", *changes)
    assert done.returncode == 0, done.stderr
    for document in (status(copy), json.loads((copy / "env.json").read_text())):
        (forced,) = document["forced"]
        assert forced["step"] == 37
        assert forced["changes"] == ["optim.lr: 0.001 -> 0.002", "train.batch_size: 64 -> 32"]
    epochs: dict[int, list[int]] = {}
    for (number, step), ids in ids_per_step(copy).items():
        if step > 37:
            epochs.setdefault(number, []).extend(ids)
    assert [sorted(ids) for ids in epochs.values()] == [list(range(1438))] * 2


@pytest.mark.nightly
def test_an_average_that_the_config_does_not_use_any_more(disttrain: Run, copy: Path) -> None:
    done = small(disttrain, "run", "train.ema=null", "--force")
    assert done.returncode == 0, done.stderr
    assert not (copy / "checkpoints/latest/ema.safetensors").exists()
    again = small(disttrain, "run", "train.ema=0.9", "train.epochs=4", "--force")
    assert again.returncode == 66
    assert "has no ema" in again.stderr


# --- Storage ----------------------------------------------------------------------------------------


def mount(*arguments: str | Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a system that lets root mount: {done.stderr}")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", path)
    yield path
    subprocess.run(["umount", path], check=True)


WIDE = ("model.args.width=8192", "checkpoint.keep=20")  # 9.6 MB each, with both averages of Adam and the EMA


def test_a_disk_that_fills_up_ends_the_run_which_then_goes_on(
    disttrain: Run, here: Path, tiny_disk: Path
) -> None:
    run = tiny_disk / "run"
    full = small(disttrain, run, *WIDE)
    assert full.returncode == 74, full.stderr
    assert "Traceback" not in full.stderr
    numbers = re.search(
        r"No space left on device \(([0-9,]+) bytes needed, ([0-9,]+) bytes free\)", full.stderr
    )
    assert numbers is not None, full.stderr
    needed, free = (int(number.replace(",", "")) for number in numbers.groups())
    assert 0 <= free < needed < 20 * 2**20
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 74)
    assert "No space left" in status(run)["reason"]
    found, damages = latest_valid(run / "checkpoints")
    assert found is not None
    assert damages == []

    again = small(disttrain, run, *WIDE)
    assert again.returncode == 74
    assert re.search(r"disk is full: [0-9,]+ bytes needed, [0-9,]+ bytes free", again.stderr)

    mount("-o", "remount,size=400m", tiny_disk)
    done = small(disttrain, run, *WIDE)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {found}" in done.stdout
    steps = [record["step"] for record in records(run) if record["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert {step for _, step in ids_per_step(run)} == set(range(1, 70))


def test_a_disk_that_metrics_fill_up_ends_the_run_too(disttrain: Run, here: Path, tiny_disk: Path) -> None:
    run = tiny_disk / "run"
    filler = "import mine, os\nclass Net(mine.Net):\n    def forward(self, images):\n"
    filler += "        if self.passes == 7:\n            with open(os.environ['FILL'], 'wb', 0) as file:\n"
    filler += "                try:\n                    while True: file.write(bytes(512))\n"
    filler += "                except OSError: pass\n        return super().forward(images)\n"
    (here / "filling.py").write_text(filler)
    arguments = ["run", "small.yaml", "model.name=filling:Net", "--procs", "1", "--run-dir", run]
    full = disttrain(*arguments, "train.epochs=1", env={"FILL": str(tiny_disk / "fill")})
    assert full.returncode == 74, full.stderr
    assert re.search(r"jsonl?: cannot be written: No space left on device \(", full.stderr)
    assert "Traceback" not in full.stderr
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 74), "told on a full disk"


def test_a_limit_on_the_size_of_files(disttrain: Run, here: Path, digits_root: Path) -> None:
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", sys.executable, "-m", "disttrain", "run",
         "small.yaml", "--procs", "1", "--run-dir", "run", *WIDE],
        cwd=here,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert limited.returncode == 74, limited.stderr
    assert re.search(r"File too large \([0-9,]+ bytes needed, .*ulimit -f", limited.stderr)
    assert latest_valid(here / "run/checkpoints") == (None, [])
    done = small(disttrain, "run", *WIDE, "train.epochs=1", "--force")
    assert done.returncode == 0, done.stderr
    assert "no checkpoint yet; starting from scratch" in done.stdout


@pytest.mark.parametrize("inside", ["", "checkpoints"])
@pytest.mark.parametrize("module", ["disttrain", "disttrain.worker"])
def test_nothing_starts_in_a_read_only_folder(
    copy: Path, here: Path, digits_root: Path, inside: str, module: str
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / ".lock").touch()
    target = copy / inside
    mount("--bind", target, target)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", target], check=True)
        command = ["run", "small.yaml", "--procs", "1"] if module == "disttrain" else ["small.yaml"]
        done = subprocess.run(
            [sys.executable, "-m", module, *command, "--run-dir", "run"],
            cwd=here,
            env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        subprocess.run(["umount", target], check=True)
    assert done.returncode == 73, done.stderr
    assert f"{Path('run') / inside}: cannot be written: Read-only file system; choose another" in done.stderr
    after = {path: path.read_bytes() for path in before}
    del before[copy / ".lock"], after[copy / ".lock"]
    assert after == before


def test_a_second_run_leaves_the_first_alone(disttrain: Run, here: Path, digits_root: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "disttrain", "run", "small.yaml", "--procs", "1", "--run-dir", "run",
         "train.epochs=1000"],
        cwd=here,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        wait_for((here / "run/checkpoints/latest").exists, first)
        second = small(disttrain, "run", "train.epochs=1000")
        assert second.returncode == 73
        assert re.search(rf"run: process {first.pid} on \S+ is running here; choose another", second.stderr)
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=120)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 75, output
    assert (status(here / "run")["state"], status(here / "run")["restarts"]) == ("stopped", 0)


NO_LINKS = """
import errno, os
def refuse(*arguments, **options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
os.symlink = refuse
"""


@pytest.mark.nightly
@pytest.mark.usefixtures("here")
def test_a_run_goes_on_without_links(disttrain: Run, stopped: Path, tmp_path: Path) -> None:
    """After `cp -rL`, and on a file system that has no links."""
    shutil.copytree(stopped / "run", tmp_path / "run")  # follows links
    (tmp_path / "no_links").mkdir()
    (tmp_path / "no_links/sitecustomize.py").write_text(NO_LINKS)
    arguments = ["run", "small.yaml", "--procs", "1", "--run-dir", "run"]
    done = disttrain(*arguments, env={"PYTHONPATH": str(tmp_path / "no_links")})
    assert done.returncode == 0, done.stderr
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert latest == f"step_{status(tmp_path / 'run')['step']:08d}"
    assert disttrain("eval", "run").returncode == 0
