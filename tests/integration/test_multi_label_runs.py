"""docs/multi_label.md: its commands, and the same run on several ranks."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from integration.test_own_images import commands_of, printed_by
from safetensors.torch import load_file

import disttrain as package
from disttrain.errors import DataError
from disttrain.inference.eval import open_data
from disttrain.inference.run import open_run
from disttrain.runs.evaluation import evaluation_of
from disttrain.training.metrics import average_precision
from kit import REPOSITORY
from kit.run_results import computed_records, ids_per_step

DOCUMENT = REPOSITORY / "docs/multi_label.md"


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the page begin with, and its packed data set."""
    folder = tmp_path_factory.mktemp("strips")
    text = DOCUMENT.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (folder / "make.py").write_text(program)
    (folder / "strips.yaml").write_text(config)
    first, second, *_ = commands_of(DOCUMENT)
    printed_by(first, folder)
    printed_by(f"{sys.executable} make.py", folder)
    printed_by(second, folder)
    return folder


def test_every_command_of_the_page_runs_and_the_labels_are_learnt(strips: Path) -> None:
    printed = {command.split()[1]: printed_by(command, strips) for command in commands_of(DOCUMENT)[2:]}
    (found,) = re.findall(r"finished: mAP ([\d.]+) %", printed["run"])
    assert float(found) > 85
    assert re.search(r"^mAP +[\d.]+ %, micro F1 ", printed["eval"], re.MULTILINE)
    assert len(re.findall(r"^\d +[\d.]+ % ", printed["eval"], re.MULTILINE)) == 10
    assert len(re.findall(r"strips/val-\d.png  (?:none|\d \d+\.\d+ %)", printed["predict"])) == 3
    run = strips / "runs/strips"
    assert "the sigmoid of each" in (run / "export/safetensors/README.md").read_text()
    page = (run / "report.html").read_text()
    assert "Average precision per class, worst first" in page
    assert "Confusion matrix" not in page
    the_file_of_the_classes_has_the_figures_of_the_evaluation(run)
    predictions_have_the_labels_above_the_threshold(strips, run)
    the_average_precision_is_that_of_the_scores(strips, run)
    trained = open_run(run)
    with pytest.raises(
        DataError, match="digits: has one label a sample, but the run was trained on any number"
    ):
        open_data(trained.config, trained.facts, "digits", str(strips / "data"))


def the_file_of_the_classes_has_the_figures_of_the_evaluation(run: Path) -> None:
    with (run / "report_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = evaluation_of(run / "checkpoints/best")
    assert kept is not None
    assert kept.labels is not None
    assert [float(row["average_precision"]) for row in rows] == [one.average_precision for one in kept.labels]
    assert [int(row["correct"]) for row in rows] == [one.correct for one in kept.labels]
    known = [one.average_precision or 0.0 for one in kept.labels]
    assert kept.record.map == pytest.approx(sum(known) / len(known))


def predictions_have_the_labels_above_the_threshold(folder: Path, run: Path) -> None:
    files = [folder / f"strips/val-{number}.png" for number in range(40)]
    found = {
        threshold: package.predict(run, files, top=2, threshold=threshold) for threshold in (0.2, 0.5, 0.9)
    }
    for threshold, predictions in found.items():
        for one in predictions:
            assert one.labels == tuple(label for label, chance in one.top if chance >= threshold)
            assert len(one.top) == max(2, len(one.labels))
            assert one.as_json()["labels"] == one.labels
    assert len({len(one.labels or ()) for one in found[0.5]}) > 2
    with (folder / "strips.csv").open() as file:
        truth = {row["file"]: row["labels"].split() for row in csv.DictReader(file)}
    assert sum(sorted(one.labels or ()) == truth[Path(one.image).name] for one in found[0.5]) > 20


def the_average_precision_is_that_of_the_scores(folder: Path, run: Path) -> None:
    model = package.load_model(run)
    (batch,) = package.open_data("strips", "val", batch_size=1000, root=str(folder / "data"))
    with torch.inference_mode():
        scores = model(batch.images).numpy()
    kept = evaluation_of(run / "checkpoints/best")
    assert kept is not None
    for label, one in enumerate(kept.labels or ()):
        expected = average_precision(scores[:, label], batch.labels[:, label].numpy())
        assert one.average_precision == pytest.approx(expected, abs=2e-3)


def train(folder: Path, name: str, *options: str) -> Path:
    command = f"{sys.executable} -m disttrain run strips.yaml --run-dir runs/{name} train.trace_samples=true"
    printed_by(" ".join([command, *options]), folder)
    return folder / "runs" / name


@pytest.mark.nightly
def test_three_ranks_train_and_evaluate_as_one_does(strips: Path) -> None:
    options = ("train.epochs=2", "train.class_weights=balanced", "augment.mixup=0.2", "train.batch_size=66")
    one, three = (train(strips, f"of{n}", *options, f"--procs {n}") for n in (1, 3))
    assert ids_per_step(one) == ids_per_step(three)
    ours, theirs = computed_records(one)[-1], computed_records(three)[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert ours["map"] == pytest.approx(theirs["map"], abs=0.02)
    command = f"{sys.executable} -m disttrain eval {one} --json --procs"
    found = [json.loads(printed_by(f"{command} {n}", strips)) for n in (1, 3)]
    counts = [[(row["correct"], row["total"]) for row in one["per_class"]] for one in found]
    assert counts[0] == counts[1]
    assert found[0]["confusion"] is None
    assert found[0]["map"] == pytest.approx(found[1]["map"], abs=1e-6)
    assert found[0]["map"] == pytest.approx(ours["map"], abs=1e-6)
    assert "webdataset" in printed_by(
        f"{sys.executable} -m disttrain data bench strips --samples 500", strips
    )


@pytest.mark.nightly
def test_a_reproducible_run_has_the_same_bits_on_two_ranks_after_a_stop(strips: Path) -> None:
    options = ("train.reproducible=true", "train.loss=focal", "schedule.name=constant")
    whole = train(strips, "whole", *options, "train.epochs=3", "--procs 1")
    train(strips, "parts", *options, "--procs 2", "train.epochs=1")
    parts = train(strips, "parts", *options, "--procs 1", "train.epochs=3")
    weights = [load_file(run / "checkpoints/latest/model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
