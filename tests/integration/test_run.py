"""Whole runs through the doors a user uses, with real processes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from disttrain.config import load_config
from disttrain.runs import manifest
from kit import REPOSITORY
from kit.commands import Run, background, succeeded, wait_for
from kit.marks import nightly
from kit.run_results import computed_records as records
from kit.run_results import ids_per_step, metrics, status

# --- The main job ---------------------------------------------------------------------------------


def test_quickstart_leaves_a_complete_run_folder(disttrain: Run, tmp_path: Path) -> None:
    result = disttrain(
        "run",
        REPOSITORY / "configs/quickstart.yaml",
        "--procs",
        "1",
        env={"DISTTRAIN_DATA": str(tmp_path / "d"), "DISTTRAIN_REPORT": "1"},
    )
    assert succeeded(result)
    (run_dir,) = (tmp_path / "runs" / "quickstart").iterdir()
    last = records(run_dir)[-1]
    assert last["kind"] == "eval"
    assert last["total"] == 359
    assert last["accuracy"] >= 0.95
    assert f"accuracy {100 * last['accuracy']:.2f} % ({last['correct']} of 359)" in result.stdout
    assert "\x1b" not in result.stdout, "no escape codes where there is no terminal"
    assert result.stdout.splitlines()[-1] == f"report: {run_dir.relative_to(tmp_path)}/report.html"
    assert f"finished: accuracy {100 * last['accuracy']:.2f} %" in (run_dir / "report.html").read_text()
    for name in (
        "config.yaml",
        "env.json",
        "gpu.jsonl",
        "logs/rank_00000.log",
        "checkpoints/latest/MANIFEST.json",
    ):
        assert (run_dir / name).exists(), name
    assert (run_dir / "checkpoints" / "best" / "model.safetensors").exists()
    state = status(run_dir)
    assert (state["state"], state["exit_code"], state["samples_seen"]) == ("finished", 0, 20 * 1438)
    environment = json.loads((run_dir / "env.json").read_text())
    assert environment["data"]["train"] == 1438
    assert environment["run"]["parameters"] == 1898
    assert "disttrain run" in environment["command"]


def test_a_terminal_gets_the_dashboard_and_its_cursor_back(
    tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "disttrain", "run", str(config_file), "--procs", "1"],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root), "TERM": "xterm-256color"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    output = b""
    while process.poll() is None:
        time.sleep(0.05)
        try:
            output += os.read(master, 65536)
        except (BlockingIOError, OSError):
            continue
    os.close(master)
    assert process.returncode == 0, output.decode(errors="replace")
    assert b"\x1b[?25l" in output, "the dashboard hides the cursor"
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l"), "and shows it again"
    assert b"rank 0" in output
    assert b"finished" in output


# --- Choices of the config ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.accumulate=4", "train.ema=0.9", "model.name=lenet_bn", "data.name=digits32"],
        *nightly(
            ["train.precision=bf16", "train.grad_clip=1.0"],
            [
                "optim.name=muon",
                "optim.lr=1e-2",
                "augment.mixup=0.2",
                "augment.cutmix=1",
                "augment.flip=true",
            ],
            ["optim.name=adamw", "schedule.name=one_cycle", "eval.tta=flip", "data.remainder=drop"],
            ["train.reproducible=true", "train.channels_last=false", "data.normalize=unit"],
        ),
    ],
    ids=["accumulate-ema-batchnorm", "bf16-clip", "muon-mixup-cutmix", "one-cycle-tta-drop", "deterministic"],
)
def test_settings_train_on_two_ranks(
    overrides: list[str], disttrain: Run, tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    env = {"DISTTRAIN_DATA": str(digits_root)}
    if "data.name=digits32" in overrides:  # the digits as 32x32, through the door for own images
        env = {"DISTTRAIN_DATA": str(tmp_path / "data")}
        write_class_folders(tmp_path / "images")
        assert succeeded(disttrain("data", "pack", "images", "--name", "digits32", "--size", "32", env=env))
        overrides = [*overrides, "train.batch_size=32"]
    result = disttrain("run", config_file, *overrides, "--procs", "2", "--run-dir", "run", env=env)
    assert succeeded(result)
    first, *_, last = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert last["loss"] < first["loss"]


def test_a_checkpoint_that_is_being_written_outlives_a_failure(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    (tmp_path / "brittle.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    steps = 0\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "    def forward(self, images):\n"
        "        self.steps += self.training\n"
        "        if self.steps == 8:\n"
        "            raise RuntimeError('the eighth step')\n"
        "        return super().forward(images)\n"
    )
    arguments = ["model.name=brittle:Net", "checkpoint.every_steps=1", "train.precision=fp32"]
    arguments += ["train.channels_last=true", "--procs", "1", "--run-dir", "run"]  # nothing to measure
    done = disttrain("run", config_file, *arguments)
    assert done.returncode == 70
    assert "the eighth step" in done.stderr
    latest = tmp_path / "run/checkpoints/latest"
    assert latest.resolve().name == "step_00000007"
    manifest.verify_checkpoint(latest)


def test_a_finished_run_goes_on_for_more_epochs_and_with_what_may_change(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    run = ("run", config_file, "--procs", "1", "--run-dir", "run", "schedule.name=cosine")
    succeeded(disttrain(*run))
    again = disttrain(*run)
    assert succeeded(again)
    assert "already finished" in again.stdout
    # What messages ask for: more often saved, in smaller parts.
    changes = ("train.epochs=4", "checkpoint.every_steps=10", "train.accumulate=2")
    longer = disttrain(*run, *changes)
    assert succeeded(longer)
    for change in ("train.epochs: 2 -> 4", "checkpoint.every_steps: None -> 10", "train.accumulate: 1 -> 2"):
        assert f"resuming with {change}" in longer.stdout
    folder = tmp_path / "run"
    records = metrics(folder)
    assert [record["epoch"] for record in records if record["kind"] == "eval"] == [1, 2, 3, 4]
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert min(rates[:-1]) > 0  # half way through the longer cosine
    assert load_config(folder / "config.yaml").train.epochs == 4
    assert [load_config(kept).train.epochs for kept in folder.glob("config.*.yaml")] == [2]
    shorter = disttrain(*run, "train.epochs=3")
    assert shorter.returncode == 2
    assert "train.epochs: 4 -> 3" in shorter.stderr


@pytest.mark.nightly
def test_compiled_model_trains(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    assert succeeded(disttrain("run", config_file, "train.compile=true", "--procs", "1", "--run-dir", "run"))
    assert records(tmp_path / "run")[-1]["accuracy"] > 0.8


def write_class_folders(folder: Path) -> None:
    """Writes some digits as PNG files in train/<class>/ and val/<class>/."""
    from importlib.resources import files

    import numpy as np
    from PIL import Image

    with np.load(str(files("disttrain") / "assets" / "digits.npz"), allow_pickle=False) as digits:
        for i in range(300):
            path = folder / ("val" if i % 5 == 0 else "train") / f"digit {digits['labels'][i]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits["images"][i] * 15).save(path)


def test_own_model_class_from_the_working_folder(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    result = disttrain("run", config_file, "model.name=mine:Net", "model.args.width=32", "--procs", "2")
    assert succeeded(result)


OWN_MODEL = """
import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, width=16, fail=None, rank=1):
        super().__init__()
        pixels = in_channels * image_size[0] * image_size[1]
        layers = nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, num_classes)
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.fail, self.passes = (fail, 0) if os.environ.get("RANK", "0") == str(rank) else (None, 0)

    def forward(self, images):
        self.passes += self.training
        if self.passes == 8 and self.fail == "raise":
            raise RuntimeError("the pump is dry")
        if self.passes == 8 and self.fail == "memory":
            images.new_empty(2**50)
        if self.passes == 8 and self.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        scale = float("nan") if self.passes >= 8 and self.fail == "nan" else 1.0
        return self.layers(images) * scale
"""


# --- Ends -----------------------------------------------------------------------------------------


def test_the_batch_whose_loss_was_not_finite_is_written_down(
    disttrain: Run, tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    arguments = ["model.name=mine:Net", "model.args.fail=nan", "train.trace_samples=true"]
    arguments += ["train.precision=fp32", "train.channels_last=true", "--procs", "2", "--run-dir", "run"]
    result = disttrain("run", config_file, *arguments, "--report")
    assert result.returncode == 70, result.stderr
    assert "failed with exit code 70" in (tmp_path / "run/report.html").read_text()
    assert "not finite at step 8 (epoch 1, first on rank 1)" in result.stderr
    assert "optim.lr" in result.stderr
    state = status(tmp_path / "run")
    assert (state["state"], state["exit_code"]) == ("failed", 70)
    batch = json.loads((tmp_path / "run/errors/batch_00000008.json").read_text())
    assert batch["ids"] == ids_per_step(tmp_path / "run")[1, 8]
    keys: list[str] = []
    for shard in sorted((digits_root / "digits").glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            keys += [Path(name).stem for name in tar.getnames() if name.endswith(".png")]
    assert batch["keys"] == [keys[id_] for id_ in batch["ids"]]


def test_too_little_memory_is_named_with_its_remedy(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    memory = ["model.name=mine:Net", "model.args.fail=memory"]
    result = disttrain("run", config_file, *memory, "--procs", "2", "--run-dir", "run")
    assert result.returncode == 70
    assert "Traceback" not in result.stderr
    state = status(tmp_path / "run")
    assert re.fullmatch(
        r"rank 1 on \S+ ran out of memory in step 8 while computing: can't allocate memory: you tried to "
        r"allocate 4503599627370496 bytes.*; raise train\.accumulate, so that fewer images go through the "
        r"network at once, or lower train\.batch_size and continue this run with --force",
        state["reason"],
    ), state["reason"]


def test_ranks_that_have_lost_one_another_write_no_number(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    skipping = OWN_MODEL.replace(
        'raise RuntimeError("the pump is dry")',
        "import sys\n"
        "            frame = sys._getframe()\n"
        "            while 'progress' not in frame.f_locals:\n"
        "                frame = frame.f_back\n"
        "            frame.f_locals['progress'].step += 5",
    )
    (tmp_path / "mine.py").write_text(skipping)
    arguments = ["model.name=mine:Net", "model.args.fail=raise", "train.precision=fp32"]
    arguments += ["train.channels_last=true", "--procs", "2", "--run-dir", "run"]
    result = disttrain("run", config_file, *arguments)
    assert result.returncode == 70, result.stderr
    assert "rank 0 report of step 10, rank 1 report of step 15" in result.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == [5]


@pytest.mark.nightly
def test_a_crash_is_survived_with_max_restarts(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    once = OWN_MODEL.replace(
        'self.fail == "kill"', 'self.fail == "kill" and not os.path.exists("crashed")'
    ).replace("os.kill(os", 'open("crashed", "w").close(); os.kill(os')
    (tmp_path / "mine.py").write_text(once)
    arguments = ["model.name=mine:Net", "model.args.fail=kill", "checkpoint.every_steps=3"]
    result = disttrain(
        "run", config_file, *arguments, "--procs", "2", "--run-dir", "run", "--max-restarts", "1"
    )
    assert succeeded(result)
    assert "restart 1 of 1" in result.stdout
    assert status(tmp_path / "run")["restarts"] == 1
    steps = [record["step"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "neither duplicates nor disorder after the restart"


def test_the_config_is_read_once(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    """A restart after a crash goes on with what was read, whatever the file holds by then."""
    crash = 'open("tiny.yaml", "w").write("name: another"); os.kill(os'
    once = OWN_MODEL.replace(
        'self.fail == "kill"', 'self.fail == "kill" and "model" in open("tiny.yaml").read()'
    )
    (tmp_path / "mine.py").write_text(once.replace("os.kill(os", crash))
    arguments = ["model.name=mine:Net", "model.args={fail: kill, rank: 0}", "checkpoint.every_steps=3"]
    options = ["--procs", "1", "--run-dir", "run", "--max-restarts", "1"]
    heard = 'monitor.on_end=echo "$DISTTRAIN_STATE $DISTTRAIN_RESTARTS" >>ended'
    assert succeeded(disttrain("run", config_file, *arguments, *options, heard))
    assert (tmp_path / "ended").read_text() == "finished 1\n", "only the last end counts"
    assert config_file.read_text() == "name: another"
    assert status(tmp_path / "run")["restarts"] == 1


def test_a_requeued_job_keeps_the_config_that_it_began_with(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    assert succeeded(disttrain("run", config_file, "--procs", "1", "--run-dir", "run", "train.epochs=1"))
    before = load_config(tmp_path / "run/config.yaml")
    (tmp_path / "run/status.json").write_text('{"state": "stopped", "exit_code": 75}')
    config_file.write_text(config_file.read_text().replace("1e-2", "1e-3"))
    result = disttrain(
        "run", config_file, "--procs", "1", "--run-dir", "run", "train.epochs=1",
        env={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
    )  # fmt: skip
    assert succeeded(result)
    said = "has changed since the job began (optim.lr: 0.01 -> 0.001); continuing with run/config.yaml"
    assert said in result.stderr
    assert load_config(tmp_path / "run/config.yaml") == before


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_one_process_trains_and_resumes_without_the_compiler(
    optimizer: str, tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    """Its import takes most of a second. The optimizers of torch do it at their first step."""
    command = [sys.executable, "-X", "importtime", "-m", "disttrain.worker", str(config_file)]
    command += [f"optim.name={optimizer}", "--run-dir", "run"]
    environment = os.environ | {"DISTTRAIN_DATA": str(digits_root)}
    for epochs in (1, 2):
        result = subprocess.run(
            [*command, f"train.epochs={epochs}"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert succeeded(result)
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert "torch.optim" in imported
        assert not {name for name in imported if name.startswith("torch._dynamo")}


@pytest.mark.nightly
def test_the_config_may_come_through_a_pipe(tmp_path: Path, config_file: Path, digits_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", "run", "-", "--procs", "2", "--run-dir", "run", "train.epochs=1"],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        input=config_file.read_text(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert succeeded(done)
    assert load_config(tmp_path / "run/config.yaml").name == "tiny"


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(
    disttrain: Run, tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    first = background(
        ["run", str(config_file), "--procs", "1", "--run-dir", "run", "train.epochs=60"],
        tmp_path,
        digits_root,
    )
    wait_for(lambda: metrics(tmp_path / "run"), first)
    second = disttrain("run", config_file, "--procs", "1", "--run-dir", "run", "train.epochs=60")
    assert second.returncode == 73
    assert re.search(rf"process {first.pid} on \S+ is running here", second.stderr)
    first.send_signal(signal.SIGTERM)
    assert "stopped" in first.communicate(timeout=120)[0]


@pytest.mark.nightly
def test_no_worker_survives_the_launcher(tmp_path: Path, config_file: Path, digits_root: Path) -> None:
    process = background(
        ["run", str(config_file), "--procs", "2", "--run-dir", "run", "train.epochs=200"],
        tmp_path,
        digits_root,
    )
    wait_for(lambda: metrics(tmp_path / "run"), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "accelerate and two workers"
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_changed_config_is_not_resumed(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    assert succeeded(disttrain("run", config_file, "--procs", "1", "--run-dir", "run"))
    result = disttrain("run", config_file, "--procs", "1", "--run-dir", "run", "optim.lr=0.5")
    assert result.returncode == 2
    assert "optim.lr: 0.01 -> 0.5" in result.stderr


@pytest.mark.nightly
def test_a_run_that_began_from_a_checkpoint_goes_on_by_itself(
    disttrain: Run, tmp_path: Path, config_file: Path
) -> None:
    assert succeeded(disttrain("run", config_file, "--procs", "1", "--run-dir", "first", "train.epochs=1"))
    arguments = ["run", config_file, "--procs", "1", "--run-dir", "second", "train.epochs=3", "optim.lr=0.02"]
    refused = disttrain(*arguments, "--resume", "first")
    assert refused.returncode == 2
    assert "optim.lr: 0.01 -> 0.02" in refused.stderr
    assert succeeded(disttrain(*arguments, "--resume", "first", "--force"))
    requeued = disttrain(*arguments, "--resume", "first", "--dry-run", env={"SLURM_RESTART_COUNT": "1"})
    assert succeeded(requeued), "a requeued job has the same command line"
    again = disttrain(*arguments)
    assert succeeded(again)
    assert "already finished" in again.stdout
    assert status(tmp_path / "second")["samples_seen"] == 3 * 1438


def test_a_damaged_checkpoint_is_refused(disttrain: Run, tmp_path: Path, config_file: Path) -> None:
    assert succeeded(disttrain("run", config_file, "--procs", "1", "--run-dir", "run"))
    weights = tmp_path / "run/checkpoints/latest/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    result = disttrain("run", config_file, "--procs", "1", "--resume", "run/checkpoints/latest")
    assert result.returncode == 66
    assert re.search(r"model\.safetensors: damaged: found .* sha256 [0-9a-f]{64}, the", result.stderr)
