"""What trackers and Prometheus get of a run, and that a run does not suffer from them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disttrain.config import Config
from disttrain.errors import UsageError
from disttrain.monitor import trackers
from disttrain.monitor.samples import MetricValue, samples
from disttrain.monitor.trackers import Feed, Prometheus, Tracker, prometheus_text
from disttrain.preflight import check_trackers
from disttrain.runs.jsonl import parts
from disttrain.runs.records import METRICS, EvalRecord, GpuMeans, Process, StepTimes, TrainRecord
from kit.commands import Run
from kit.run_files import eval_record, train_record

RECORD = train_record(
    20, epoch=1, loss=0.5, mfu_pct=None, lr=math.inf, phases_ms=StepTimes(data=1.5),
    gpus=(
        GpuMeans(host="n1", index=0, uuid="GPU-a", name="A", power_w=300.5),
        GpuMeans(host="n2", index=0, uuid="MIG-b", name="B", memory_used_mib=7),
        GpuMeans(host="n2", index=None, uuid="GPU-c", name="C", power_w=0.0),
    ),
    processes=(Process(rank=3, host="n1", cpu_pct=99.0),),
)  # fmt: skip

RUN = ["run", "--procs", "1", "--run-dir", "run", "tiny.yaml"]
SAVE_OFTEN = ["checkpoint.every_steps=10", "checkpoint.keep=9"]


def experiment(**monitor: Any) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "data": {"name": "digits"},
            "model": {"name": "cnn_mnist"},
            "train": {"epochs": 1, "batch_size": 64},
            "optim": {"lr": 0.1},
            "monitor": monitor,
        }
    )


# --- Names ------------------------------------------------------------------------------------------


def test_every_number_of_a_record_has_its_name_and_nothing_else_has() -> None:
    assert {sample.name: sample.value for sample in samples(RECORD)} == {
        "train/step": 20, "train/epoch": 1, "train/samples": 200, "train/loss": 0.5, "train/accuracy": 0.4,
        "train/images_per_s": 10, "train/step_time_s": 1, "train/data_wait_pct": 20, "train/skipped": 0,
        "train/phases_ms/data": 1.5,
        "gpu/n1/0/power_w": 300.5, "gpu/n2/MIG-b/memory_used_mib": 7, "gpu/n2/GPU-c/power_w": 0.0,
        "process/n1/3/cpu_pct": 99.0,
    }  # fmt: skip
    names = [sample.name for sample in samples(eval_record(3, 0.25))]
    assert names == [
        f"eval/{key}" for key in ("loss", "accuracy", "correct", "total", "skipped", "step", "epoch")
    ]


# --- Prometheus -------------------------------------------------------------------------------------


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns {(metric, labels): value} by Prometheus's own parser; all must be documented gauges."""
    parser = pytest.importorskip("prometheus_client.parser")
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert (family.type, bool(family.documentation)) == ("gauge", True)
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def test_prometheus_text() -> None:
    text = prometheus_text(
        [
            MetricValue("train", {}, "loss", 0.5),
            MetricValue("gpu", {"host": "n1", "index": "0"}, "power_w", 300),
        ],
        {"run": "runs/a"},
        1700000000.25,
    )
    assert text == (
        "# HELP disttrain_train_loss train loss in the last record of metrics.jsonl\n"
        "# TYPE disttrain_train_loss gauge\n"
        'disttrain_train_loss{run="runs/a"} 0.5\n'
        "# HELP disttrain_gpu_power_w gpu power_w in the last record of metrics.jsonl\n"
        "# TYPE disttrain_gpu_power_w gauge\n"
        'disttrain_gpu_power_w{run="runs/a",host="n1",index="0"} 300\n'
        "# HELP disttrain_updated_timestamp_seconds time of the last record, since 1970\n"
        "# TYPE disttrain_updated_timestamp_seconds gauge\n"
        'disttrain_updated_timestamp_seconds{run="runs/a"} 1700000000.25\n'
    )


def test_prometheus_reads_all_of_a_record_with_its_labels() -> None:
    strange = 'a "run" \\ of\ntwo lines'
    found = parsed(prometheus_text(samples(RECORD), {"run": strange}, 5.0))
    assert found[("disttrain_gpu_power_w", (("host", "n1"), ("index", "0"), ("run", strange)))] == 300.5
    assert found[("disttrain_train_phases_ms_data", (("run", strange),))] == 1.5
    assert len(found) == len(list(samples(RECORD))) + 1


def test_prometheus_file_has_the_last_records_and_goes_with_the_run(tmp_path: Path) -> None:
    config = experiment(prometheus_dir=str(tmp_path))
    first, second = (Prometheus(config, tmp_path / name / "run") for name in "ab")
    for sink in (first, second):
        sink.start()
        sink.log(train_record(1, loss=2.0))
        sink.log(train_record(2, loss=1.0))
        sink.log(eval_record(2, 0.5))
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".prom", ".prom"]  # of two runs of one name; nothing else
    values = {name: value for (name, _), value in parsed(files[0].read_text()).items()}
    assert abs(values.pop("disttrain_updated_timestamp_seconds") - time.time()) < 600
    assert (values["disttrain_train_step"], values["disttrain_train_loss"]) == (2, 1.0)
    assert (values["disttrain_eval_step"], values["disttrain_eval_accuracy"]) == (2, 0.5)
    first.finish()
    assert len(list(tmp_path.iterdir())) == 1
    second.finish()
    assert list(tmp_path.iterdir()) == []


# --- Queues -----------------------------------------------------------------------------------------


class Tool:
    """A sink that waits for `gate` before it takes a record, and fails where it is told to."""

    name = "tool"

    def __init__(self, fail: tuple[object, ...] = ()) -> None:
        self.fail = fail
        self.gate = threading.Event()
        self.taken: list[Any] = []

    def start(self) -> None:
        self._do("start")

    def log(self, record: TrainRecord | EvalRecord) -> None:
        self.gate.wait()
        self._do(record.step)

    def finish(self) -> None:
        self._do("finish")

    def _do(self, what: object) -> None:
        if what in self.fail:
            raise SystemExit(3) if what == "start" else ConnectionError(f"no way\nto {what}")
        self.taken.append(what)


def test_a_slow_tool_costs_the_loop_nothing_and_loses_the_oldest() -> None:
    tool, said = Tool(), list[str]()
    feed = Feed(tool, said.append, most=3)
    feed.start()
    for step in range(10):
        feed.put(train_record(step))  # returns, though the tool takes nothing
    tool.gate.set()
    feed.end()
    feed.join(time.monotonic() + 60)
    assert tool.taken[-4:] == [7, 8, 9, "finish"]
    lost = 10 - (len(tool.taken) - 2)
    assert lost in (6, 7)  # whether the first was being taken already
    assert said == [f"tool: {lost} records were not delivered; metrics.jsonl has them all"]


def fed(tool: Tool) -> list[str]:
    """Sends five records to a tool, and returns what was said."""
    said: list[str] = []
    feed = Feed(tool, said.append)
    feed.start()
    for step in range(5):
        feed.put(train_record(step))
    feed.end()
    feed.join(time.monotonic() + 60)
    return said


def test_a_tool_that_fails_is_said_once_and_gets_what_comes_later() -> None:
    tool = Tool(fail=(1, 2))
    tool.gate.set()
    said = fed(tool)
    assert tool.taken == ["start", 0, 3, 4, "finish"]
    assert said == [
        "tool: failed (ConnectionError: no way to 1); training goes on, metrics.jsonl has it all",
        "tool: 2 records were not delivered; metrics.jsonl has them all",
    ]


def test_a_tool_that_does_not_start_is_said_once() -> None:
    tool = Tool(fail=("start",))
    said = fed(tool)
    assert (tool.taken, len(said)) == ([], 1)
    assert said[0].startswith("tool: failed (SystemExit: 3)")


def test_a_tool_that_hangs_is_left_behind() -> None:
    tool, said = Tool(), list[str]()
    feed = Feed(tool, said.append)
    feed.start()
    feed.put(train_record(1))
    feed.put(train_record(2))
    feed.end()
    feed.join(time.monotonic() + 0.5)
    assert said[0] == "tool: did not finish in time; abandoned"
    told = len(said)
    tool.fail = (1, 2)
    tool.gate.set()
    feed.join(time.monotonic() + 60)
    assert len(said) == told  # nothing more is said after the end


# --- Before the launch ------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed(tmp_path: Path, disttrain: Run, config_file: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # what wandb leaves behind is not wandb
    done = disttrain(*RUN, "monitor.trackers=[wandb]")
    message = 'monitor.trackers: wandb is not installed; run pip install "disttrain[wandb]" or remove it'
    assert (done.returncode, done.stderr) == (2, f"disttrain: {message}\n")
    worker = [sys.executable, "-m", "disttrain.worker", str(config_file), "monitor.trackers=[wandb]"]
    other_door = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (other_door.returncode, other_door.stderr) == (2, f"disttrain: {message}\n")
    assert not (tmp_path / "run").exists()


def test_a_prometheus_folder_that_is_not_there(tmp_path: Path) -> None:
    check_trackers(experiment(prometheus_dir=str(tmp_path)))
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(UsageError, match=rf"^monitor\.prometheus_dir: .*{name} is not a writable folder"):
            check_trackers(experiment(prometheus_dir=str(tmp_path / name)))


# --- Runs -------------------------------------------------------------------------------------------


def metrics(run_dir: Path) -> list[TrainRecord | EvalRecord]:
    return [record for part in parts(run_dir / "metrics.jsonl", METRICS) for record in part.rows]


def test_tensorboard_has_what_the_records_have_once_also_after_going_back(
    disttrain: Run, config_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    prom = tmp_path / "prom"
    prom.mkdir()
    monitor = ["monitor.trackers=[tensorboard]", f"monitor.prometheus_dir={prom}"]
    arguments = [*RUN, *SAVE_OFTEN, *monitor]
    assert disttrain(*arguments).returncode == 0
    back = disttrain(*arguments, "--resume", "run/checkpoints/step_00000020")
    assert back.returncode == 0, back.stderr
    assert "tensorboard:" not in back.stdout  # no word of a failure

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {
        (name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)
    }
    assert sum(len(events.Scalars(name)) for name in events.Tags()["scalars"]) == len(found)
    expected = {
        (sample.name, record.step): sample.value
        for record in metrics(tmp_path / "run")
        for sample in samples(record)
    }
    assert {name for name, _ in found} >= {"train/loss", "eval/accuracy", "train/images_per_s"}
    computed = {key: value for key, value in expected.items() if not key[0].startswith("process/")}
    assert {key: found[key] for key in computed} == pytest.approx(computed, rel=1e-6)
    assert found.keys() == expected.keys()
    assert "config/text_summary" in events.Tags()["tensors"]
    assert list(prom.iterdir()) == []


@pytest.mark.integration
def test_prometheus_can_read_a_run_at_work(digits_root: Path, config_file: Path, tmp_path: Path) -> None:
    prom = tmp_path / "prom"
    prom.mkdir()
    command = [sys.executable, "-m", "disttrain", "run", str(config_file), "--procs", "1", "--run-dir", "run",
               "train.epochs=100000", f"monitor.prometheus_dir={prom}"]  # fmt: skip
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(digits_root)},
        stdout=subprocess.DEVNULL,
    ) as run:
        try:
            found: dict[Any, float] = {}
            limit = time.monotonic() + 120
            while not any(name == "disttrain_eval_accuracy" for name, _ in found) and run.poll() is None:
                assert time.monotonic() < limit
                time.sleep(0.05)
                for file in prom.glob("*.prom"):
                    found = parsed(file.read_text())
            run.terminate()
            assert run.wait(120) == 75
        finally:
            run.kill()
    names = {name for name, _ in found}
    assert {"disttrain_train_loss", "disttrain_eval_accuracy", "disttrain_process_cpu_pct"} <= names
    assert list(prom.iterdir()) == []


def test_trackers_that_fail_or_hang_do_not_stop_a_run(
    disttrain: Run, config_file: Path, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "trackio.py").write_text(
        "from types import SimpleNamespace\n"
        "class Run:\n"
        "    def log(self, values, step):\n"
        "        raise ConnectionError('the network is down')\n"
        "    def finish(self):\n"
        "        raise ConnectionError('the network is still down')\n"
        "config = SimpleNamespace(update=lambda values, **options: None)\n"
        "def init(**options):\n"
        "    return Run()\n"
    )
    (packages / "mlflow.py").write_text("import time\ntime.sleep(3600)\n")
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    done = disttrain(
        *RUN, "monitor.trackers=[trackio, mlflow]",
        env={"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trackio: failed (ConnectionError: the network is down)") == 1
    assert "still down" not in done.stdout
    assert done.stdout.count("mlflow: did not finish in time; abandoned") == 1
    records = metrics(tmp_path / "run")
    assert f"trackio: {len(records)} records were not delivered" in done.stdout
    assert isinstance(records[-1], EvalRecord)


def _read_wandb(folder: Path, run_dir: Path) -> tuple[int, int]:
    files = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    keys = sum(file.read_bytes().count(b"train/loss") for file in files)
    return len({file.name for file in files}), keys // 2  # once in the history, once in the summary


def _read_mlflow(folder: Path, run_dir: Path) -> tuple[int, int]:
    database = sqlite3.connect(folder / "mlflow.db")
    (runs,) = database.execute("select count(*) from runs").fetchone()
    (losses,) = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    database.close()
    return runs, losses


def _read_trackio(folder: Path, run_dir: Path) -> tuple[int, int]:
    database = sqlite3.connect(folder / "trackio" / "tiny.db")
    rows = database.execute("select run_id, metrics from metrics").fetchall()
    database.close()
    return len({run for run, _ in rows}), sum("train/loss" in json.loads(values) for _, values in rows)


@pytest.mark.parametrize(
    ("name", "read"), [("wandb", _read_wandb), ("mlflow", _read_mlflow), ("trackio", _read_trackio)]
)
def test_real_trackers_get_the_records_and_go_on_with_their_run(
    name: str,
    read: Callable[[Path, Path], tuple[int, int]],
    disttrain: Run,
    config_file: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip(name)
    arguments = [*RUN, *SAVE_OFTEN, f"monitor.trackers=[{name}]"]
    home = {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip
    done = disttrain(*arguments, env=home)
    assert done.returncode == 0, done.stderr
    count = sum(isinstance(record, TrainRecord) for record in metrics(tmp_path / "run"))
    back = disttrain(*arguments, "--resume", "run/checkpoints/step_00000020", env=home)
    assert back.returncode == 0, back.stderr
    assert f"{name}: " not in done.stdout + back.stdout
    assert any(isinstance(r, TrainRecord) and r.step > 20 for r in metrics(tmp_path / "run"))
    assert read(tmp_path, tmp_path / "run") == (1, count), "each step once"


# --- The run of a tracker, over several processes of one run ------------------------------------------


class Killed(BaseException):
    """The process ends at once."""


class Book:
    """A tracker that remembers what it is given; its process may be killed at a moment of its start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.opened: list[str | None] = []
        self.rows: list[tuple[int, float]] = []
        self.configs = 0
        self.killed_at = ""
        monkeypatch.setitem(trackers._OPEN, name, self.open)

    def open(self, config: Config, folder: Path, step: int, known: str | None) -> tuple[Any, str | None]:
        self.opened.append(known)
        self._moment("open")
        return self, known

    def store_init_configuration(self, settings: dict[str, Any]) -> None:
        self._moment("settings")
        self.configs += 1

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(values["step"] if step is None else step), values["train/loss"]))

    def _moment(self, name: str) -> None:
        if name == self.killed_at:
            raise Killed


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("moment", ["open", "settings"])
def test_kill_while_a_tracker_opens_leaves_one_run_with_settings(
    name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book(monkeypatch, name)
    book.killed_at = moment
    with pytest.raises(Killed):
        Tracker(name, experiment(), tmp_path, 0).start()
    book.killed_at = ""
    for _ in range(2):
        Tracker(name, experiment(), tmp_path, 0).start()
    assert book.opened[0]
    assert len(set(book.opened)) == 1
    assert book.configs == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_step_once_also_after_a_kill(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book(monkeypatch, name)
    first = Tracker(name, experiment(), tmp_path, 0)
    first.start()
    for step in (10, 20, 30):
        first.log(train_record(step, loss=1 / step))
    again = Tracker(name, experiment(), tmp_path, 20)  # the last checkpoint was at 20
    again.start()
    for step in (30, 40):
        again.log(train_record(step, loss=1 / step))
    assert book.rows == [(step, 1 / step) for step in (10, 20, 30, 40)]


def test_a_tracker_of_an_older_run_folder_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book(monkeypatch, "wandb")
    (tmp_path / ".wandb-run").write_text("abc123")
    Tracker("wandb", experiment(), tmp_path, 20).start()
    assert (book.opened, book.configs) == (["abc123"], 0)
