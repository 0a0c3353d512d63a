"""Tests of the report of a run: what stands in the page, whatever there is of the run."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disttrain.config import load_config
from disttrain.errors import StorageError
from disttrain.report.activations import view_checkpoint
from disttrain.report.charts import PALETTE
from disttrain.report.confusion import axis_start, drawing, worst_first, write_classes
from disttrain.report.facts import outcome
from disttrain.report.page import write_report
from disttrain.report.pictures import mosaic
from disttrain.report.run import read_run
from disttrain.runs import checkpoint, evaluation
from disttrain.runs.evaluation import class_rows, most_confused
from disttrain.runs.manifest import MANIFEST, read_manifest, write_manifest
from disttrain.shards.index import load_index
from kit.commands import Run as Command
from kit.run_files import CONFIG, evaluation_with, stamp, write_run
from kit.run_results import metrics

SECTIONS = ("summary", "learning", "speed", "devices", "classes", "examples", "network", "data", "setup")


def visible(page: Path) -> str:
    """Returns the text of a page outside of its scripts and styles."""
    text = re.sub(r"(?s)<(script|style)>.*?</\1>", "", page.read_text())
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)))


def check_sections(page: Path) -> None:
    for name in SECTIONS:
        assert f'<section id="{name}"' in page.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path) -> Path:
    """A finished run on the digits, two processes, with a moving average."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(
        "name: tiny\ndata: {name: digits}\nmodel: {name: cnn_mnist}\n"
        "train: {epochs: 3, batch_size: 64, ema: 0.9, precision: fp32}\noptim: {name: adam, lr: 1e-2}\n"
        "monitor: {log_every_steps: 5}\n"
    )
    environment = os.environ | {"DISTTRAIN_DATA": str(digits_root), "DISTTRAIN_CACHE": str(decoded_cache)}
    subprocess.run(
        [sys.executable, "-m", "disttrain", "run", "tiny.yaml", "--procs", "2", "--run-dir", "run",
         "--profile", "all"],
        cwd=folder,
        env=environment,
        check=True,
        timeout=300,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def digits(digits_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTRAIN_DATA", str(digits_root))


def test_the_report_of_a_real_run_says_what_the_run_knows(
    trained: Path, tmp_path: Path, disttrain: Command
) -> None:
    page = tmp_path / "page.html"
    result = disttrain("report", trained, "--output", page)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == str(page)
    assert page.stat().st_size < 6e6
    with (tmp_path / "page_classes.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list("0123456789")
    check_sections(page)
    text = visible(page)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"finished: accuracy {100 * last['accuracy']:.2f} % ({last['correct']} of 359)" in text
    assert f"{100 * last['accuracy']:.2f} % of 359 validation images are classified correctly" in text
    assert "2 processes, CPU, 1 thread each" in text
    assert "rank 0" in text
    assert "rank 1" in text
    assert "features.0, Conv2d: 8 of 8 maps of 8x8" in text
    assert "checkpoint of step" in text
    assert "evaluation after epoch 3" in text
    assert "data: {name: digits" in text
    assert "run tiny.yaml --procs 2 --run-dir run" in text
    traces = sorted(path.name for path in (trained / "profile").glob("*.gz"))
    assert traces == ["rank_00000.trace.json.gz", "rank_00001.trace.json.gz"]
    assert "The costliest operators on the CPU Time of their own in steps 13 to 17 of rank 0" in text
    assert "cannot be" not in text.replace("cannot be used", "")


@pytest.mark.integration
def test_the_confusion_matrix_is_that_of_the_last_evaluation(trained: Path, digits: None) -> None:
    index = load_index("digits", None)
    view = view_checkpoint(trained, load_config(trained / "config.yaml"), index, budget_s=600)
    best = read_run(trained).best
    assert best is not None
    assert view.evaluation.confusion.sum() == best.total == 359
    assert view.evaluation.confusion.trace() == best.correct
    assert view.evaluation.confusion.sum(1).tolist() == list(index.splits["val"].class_counts)
    assert all(image.predicted != image.true for image in view.mistakes)
    chances = [shot.probability or 0 for shot in view.mistakes]
    assert chances == sorted(chances, reverse=True)
    assert len(view.mistakes) == min(24, 359 - view.evaluation.confusion.trace())
    assert view.image is not None
    assert view.image.true == view.image.predicted
    names = [(layer.name, layer.kind, layer.maps, layer.width) for layer in view.layers]
    assert names[:3] == [
        ("features.0", "Conv2d", 8, 8), ("features.1", "ReLU", 8, 8), ("features.2", "MaxPool2d", 8, 4),
    ]  # fmt: skip


def test_a_slow_network_is_shown_fewer_images_and_the_page_says_so(
    trained: Path, digits: None, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    best = run / "checkpoints" / "best"
    (best / evaluation.FILE).unlink()  # as in a checkpoint that was saved between two evaluations
    parts = read_manifest(best)
    del parts[evaluation.FILE]
    (best / MANIFEST).unlink()
    write_manifest(best, parts)
    view = view_checkpoint(run, load_config(run / "config.yaml"), load_index("digits", None), budget_s=0)
    assert view.samples == 359
    assert view.evaluation.confusion.sum() == 256
    text = visible(write_report(run, tmp_path / "page.html", budget_s=1e-9))
    assert "of 256 randomly chosen validation images (of 359, limited by time) are classified" in text


@pytest.mark.integration
def test_a_damaged_checkpoint_costs_only_the_sections_that_need_it(
    trained: Path, digits: None, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "env.json", "status.json", "metrics.jsonl"):
        (run / name).write_bytes((trained / name).read_bytes())
    text = visible(write_report(run))
    assert text.count("latest: there is no checkpoint; the run has saved none yet") == 3
    assert "Training images" in text

    taken = checkpoint.snapshot(
        1, {"model": checkpoint.load(trained / "checkpoints/best").parts["model"]}, {}
    )
    path = checkpoint.write(run / "checkpoints", taken, keep=1, best=True)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    text = visible(write_report(run))
    assert "model.safetensors: damaged" in text
    assert "Training images" in text


def test_without_the_data_set_the_page_says_so(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", gpus=2))
    check_sections(page)
    text = visible(page)
    assert "there is no data set 'none'" in text
    assert "needs the config and the data set of the run" in text
    assert "node0 GPU 1" not in text  # one host: its name would only be noise
    assert "GPU 1 NVIDIA H100 91 (91 to 91) %" in text


@pytest.mark.parametrize("missing", ["config.yaml", "env.json", "status.json", "metrics.jsonl", "gpu.jsonl"])
def test_every_file_of_a_run_may_be_missing(missing: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gpus=1)
    (run / missing).unlink()
    check_sections(write_report(run))


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running"}')
    page = write_report(tmp_path)
    check_sections(page)
    assert "The run has no log point yet." in visible(page)
    assert "chart-data" not in page.read_text()


def test_a_run_of_an_earlier_version_without_times(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = metrics(run)
    for line in lines:
        del line["time"]
        line["processes"] = [{"rank": 0, "cpu_pct": 50.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = visible(write_report(run))
    assert "rank 0 CPU 50 (50 to 50) %" in text
    assert "What happened" not in text


def test_the_time_is_shared_out(tmp_path: Path) -> None:
    text = "input-bound: 20 % of a step is waiting for data"
    verdict = {"name": "input-bound", "text": text, "key": None}
    text = visible(write_report(write_run(tmp_path / "run", status={"verdict": verdict})))
    assert verdict["text"] in text
    # 31 s in all, 30 steps of a second; each evaluation ends half a second later
    for row in ("forward and backward passes 15.0 s 48.4 %",
                "waiting for the gradients of other ranks 3.0 s 9.7 %",
                "optimizer 1.5 s 4.8 %", "augmentation 0.6 s 1.9 %",
                "waiting for data 4.5 s 14.5 %", "copying to the device 0.9 s 2.9 %",
                "evaluation 1.5 s 4.8 %",
                "startup, log points, checkpoints, pauses 4.0 s 12.9 %"):  # fmt: skip
        assert row in text
    assert "Time per step on each of the 2 ranks Milliseconds, means over the last 29 log points." in text
    assert "1 150.16 30.16 20.16 500.16 100.16 50.16" in text


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ({}, "finished", "finished: accuracy 75.00 % (750 of 1,000), best 80.00 % after epoch 2"),
        (
            {"reason": "stopped early after epoch 3 of 9: why"},
            "finished",
            "2; stopped early after epoch 3 of 9",
        ),
        (
            {"state": "failed", "exit_code": 70, "reason": "the loss is not finite\nat all", "step": 25},
            "failed",
            "failed with exit code 70 after epoch 3, step 25: the loss is not finite; accuracy 75.00 %",
        ),
        ({"state": "running", "updated_at": "now"}, "running", "running, epoch 3, step 30; accuracy 75.00 %"),
        ({"state": "running", "updated_at": stamp(0)}, "silent", "was most likely killed after epoch 3"),
        ({"state": "stopped", "exit_code": 75, "reason": "stopped at step 25"}, "stopped", "exit code 75"),
    ],
)
def test_the_outcome_in_one_line(status: dict[str, Any], state: str, words: str, tmp_path: Path) -> None:
    if status.get("updated_at") == "now":
        status = status | {"updated_at": datetime.now(UTC).isoformat()}
    found, text = outcome(read_run(write_run(tmp_path / "run", status=status)))
    assert found == state
    assert words in text
    assert "\n" not in text


def test_the_outcome_says_which_metric_was_the_best(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", config=CONFIG + "eval: {best: loss}\n"))
    assert outcome(run)[1].endswith("(750 of 1,000), best validation loss 0.2000 after epoch 2")


def test_whatever_stands_in_the_files_is_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7 * 7 }}"
    config = CONFIG.replace("name: demo", f"name: {json.dumps('x' + evil)}")
    run = write_run(tmp_path / "run", config=config, gpus=1, status={"state": "failed", "reason": evil})
    env = json.loads((run / "env.json").read_text())
    env |= {"command": evil, "choices": {evil: evil}, "devices": [{"host": evil, "name": evil}]}
    (run / "env.json").write_text(json.dumps(env))
    samples = [
        json.loads(line) | {"host": evil, "name": evil}
        for line in (run / "gpu.jsonl").read_text().splitlines()
    ]
    samples += [sample | {"host": "b", "uuid": "other"} for sample in samples]
    (run / "gpu.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report(run)
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert visible(page).count(evil) >= 5


def test_a_page_that_cannot_be_written_is_one_clear_line(tmp_path: Path, disttrain: Command) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(StorageError, match=r"nowhere/page.html: cannot be written: No such file"):
        write_report(run, tmp_path / "nowhere/page.html")
    result = disttrain("report", tmp_path)
    assert result.returncode == 2
    assert "is not a run folder" in result.stderr


def test_the_most_confused_classes_come_first() -> None:
    confusion = np.diag(np.full(40, 90))
    confusion[3, 7], confusion[7, 3], confusion[0, 39], confusion[5, 5] = 10, 4, 4, 6
    confusion[5, 1] = 4
    assert most_confused(confusion, 3) == [(3, 7, 10, 0.1), (5, 1, 4, 0.4), (0, 39, 4, 4 / 94)]
    assert most_confused(np.diag([5, 5])) == []
    picture = mosaic(np.zeros((10, 3, 2)), columns=4)
    assert (picture.width, picture.height) == (4 * 3 - 1, 3 * 4 - 1)


def test_the_figures_of_each_class_and_their_file(tmp_path: Path) -> None:
    confusion = np.array([[6, 1, 3, 0], [2, 8, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]])
    names = ["a, b", "=c", 'd "e"', "f"]
    rows = class_rows(evaluation_with(confusion, names))
    assert [row[:8] for row in rows] == [
        ("a, b", 10, 6, 0.6, 0.75, 12 / 18, 'd "e"', 3), ("=c", 10, 8, 0.8, 8 / 9, 16 / 19, "a, b", 2),
        ('d "e"', 0, 0, None, 0, 0, "", 0), ("f", 2, 0, 0, None, 0, 'd "e"', 2),
    ]  # fmt: skip
    assert [row.name for row in worst_first(rows)] == ["f", "a, b", "=c", 'd "e"']
    assert [axis_start(some) for some in (rows, rows[:2], rows[1:2], rows[2:3])] == [0, 0.5, 0.8, 0]
    write_classes(rows, tmp_path / "classes.csv", multi_label=False)
    with (tmp_path / "classes.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["class"] for row in read] == names
    assert [row["accuracy"] for row in read] == ["0.6", "0.8", "", "0.0"]
    assert [row["mistaken_for"] for row in read] == ['d "e"', "a, b", "", 'd "e"']


def test_a_large_matrix_is_drawn_from_its_counts_without_zeros() -> None:
    confusion = np.diag(np.arange(40))
    confusion[3, 7] = 10
    names = [f"class {label}" for label in range(40)]
    drawn = drawing(confusion, names)
    assert drawn is not None
    assert (drawn["names"], drawn["rows"][:4]) == (names, [[], [1, 1], [2, 2], [3, 3, 7, 10]])
    assert drawing(confusion[:30, :30], names[:30]) is None, "a table shows it"


def test_colours_are_seen_on_white_and_on_black() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in PALETTE:
        own = luminance(color)
        assert 1.05 / (own + 0.05) >= 3, color  # WCAG 2.2, 1.4.11
        assert (own + 0.05) / (luminance("#14171a") + 0.05) >= 3, color
