"""`disttrain eval`: the numbers of the run itself, on any number of processes, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from disttrain.errors import UsageError
from disttrain.inference.classifier import load_model
from disttrain.inference.eval import report
from disttrain.inference.run import open_run
from disttrain.runs.evaluation import class_rows, evaluation_of
from disttrain.shards.datasets import CIFAR10_CLASSES
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options, pack
from disttrain.shards.writer import Sample
from kit.commands import Run
from kit.marks import nightly
from kit.run_files import evaluation_with
from kit.shards import read_split
from kit.toy import Listed

DIGITS = tuple("0123456789")


def evaluated(disttrain: Run, *arguments: object) -> dict[str, Any]:
    done = disttrain("eval", *arguments, "--json", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def last_evaluation(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["kind"] == "eval"
    return record


@pytest.fixture(scope="module")
def by_hand(trained_run: Path, digits_root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and labels of the validation split, from the network in plain torch."""
    index = load_index("digits", str(digits_root))
    samples = list(read_split(index, "val"))
    images = torch.tensor(np.stack([decode_image(image, 1) for _, image, _ in samples])).double() / 255
    images = (images - index.mean[0]) / index.std[0]
    network = load_model(trained_run, "latest").network.double()
    with torch.inference_mode():
        scores = network(images.permute(0, 3, 1, 2))
    return scores, torch.tensor([label for _, _, label in samples])


@pytest.mark.parametrize("processes", [1, *nightly(2, 3)])
def test_every_number_is_that_of_the_run_and_of_plain_torch(
    disttrain: Run, trained_run: Path, by_hand: tuple[torch.Tensor, torch.Tensor], processes: int
) -> None:
    result = evaluated(disttrain, trained_run, "--checkpoint", "latest", "--procs", processes)
    record = last_evaluation(trained_run)
    assert result["processes"] == processes
    assert (result["correct"], result["total"]) == (record["correct"], 359)
    assert result["accuracy"] == record["accuracy"]
    assert result["loss"] == pytest.approx(record["loss"], rel=1e-5)
    scores, labels = by_hand
    predicted = scores.argmax(1)
    confusion = [[int(((labels == i) & (predicted == j)).sum()) for j in range(10)] for i in range(10)]
    assert result["confusion"] == confusion
    kept = evaluation_of(trained_run / "checkpoints" / "latest")
    assert kept is not None
    assert (kept.classes, kept.top5_correct) == (DIGITS, result["top5_correct"])
    assert kept.confusion.tolist() == confusion
    assert msgspec.to_builtins(kept.record) | {"time": record["time"]} == record
    assert [row["correct"] for row in result["per_class"]] == [confusion[i][i] for i in range(10)]
    assert [row["total"] for row in result["per_class"]] == [sum(row) for row in confusion]
    assert [row["class"] for row in result["per_class"]] == list(DIGITS)
    columns = [sum(row[i] for row in confusion) for i in range(10)]
    assert [row["precision"] for row in result["per_class"]] == [
        confusion[i][i] / columns[i] for i in range(10)
    ]
    means = {key: result[key] for key in ("macro_precision", "macro_recall", "macro_f1")}
    assert means == {key: record[key] for key in means}
    assert means["macro_f1"] == pytest.approx(sum(row["f1"] for row in result["per_class"]) / 10)
    top5 = int((scores.topk(5).indices == labels[:, None]).sum())
    assert (result["top5_correct"], result["top5_accuracy"]) == (top5, top5 / 359)
    assert result["loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


@pytest.mark.nightly
def test_augmentation_stands_beside_the_result_without_it(disttrain: Run, trained_run: Path) -> None:
    result = evaluated(disttrain, trained_run, "--tta", "flip", "--checkpoint", "latest")
    assert result["tta"] == "flip"
    assert result["plain_correct"] == last_evaluation(trained_run)["correct"]
    assert result["correct"] < result["plain_correct"], "mirrored digits are not digits"
    assert sum(map(sum, result["confusion"])) == 359


def test_the_screen_shows_accuracy_classes_and_confusion(disttrain: Run, trained_run: Path) -> None:
    done = disttrain("eval", trained_run, "--checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    record = last_evaluation(trained_run)
    share = f"accuracy {100 * record['accuracy']:.2f} % ({record['correct']} of 359), loss "
    lines = done.stdout.splitlines()
    assert share in done.stdout
    assert f"macro F1 {100 * record['macro_f1']:.2f} %, precision " in done.stdout
    assert len([line for line in lines if line.endswith((" 36", " 37"))]) >= 3
    assert len(lines) == 4 + 1 + 11 + 1 + 11


def result_of(confusion: Any, classes: list[str]) -> dict[str, Any]:
    rows = [
        {"class": row.name, "correct": row.correct, "total": row.samples}
        | {"accuracy": row.accuracy, "precision": row.precision, "f1": row.f1}
        for row in class_rows(evaluation_with(confusion, classes))
    ]
    return {
        "checkpoint": "c", "data": "d", "split": "val", "processes": 1, "precision": "fp32", "loss": 0.5,
        "correct": 150, "total": 156, "top5_correct": 156, "skipped": 2, "per_class": rows,
        "classes": classes, "confusion": confusion.tolist(), "macro_f1": 0.9, "macro_precision": 0.8,
        "macro_recall": 0.7, "calibration_error": None,
    }  # fmt: skip


def test_many_classes_show_what_is_confused_most() -> None:
    confusion = np.eye(30, dtype=int) * 5
    confusion[3, 7], confusion[7, 3] = 4, 2
    lines = list(report(result_of(confusion, [f"class {i}" for i in range(30)])))
    assert [line.split(maxsplit=3) for line in lines[-2:]] == [
        ["4", "44.4", "%", "class 3 as class 7"], ["2", "28.6", "%", "class 7 as class 3"],
    ]  # fmt: skip
    assert "skipped  2 unusable samples" in lines
    assert "macro F1 90.00 %, precision 80.00 %, recall 70.00 %; calibration error n/a" in lines
    assert sum(line.startswith("class ") for line in lines) == 1 + 30


def test_a_thousand_classes_show_the_worst_and_the_best() -> None:
    confusion = np.eye(1000, dtype=int) * 9
    confusion[range(100), range(100, 200)] = 100 - np.arange(100)
    confusion[999, 999] = 0
    names = [
        f"{label:03}, a class with so many names that no terminal is wide enough" for label in range(1000)
    ]
    result = result_of(confusion, names)
    lines = list(report(result, 70))
    assert len(lines) < 45
    assert max(map(len, lines[3:])) <= 80
    assert lines[6] == "the 10 worst and best of 1,000 classes, 1 without samples (--json has all)"
    rows = [line for line in lines if line.endswith(" %") or line[:3].isdecimal()]
    assert [row[:3] for row in rows] == [f"{label:03}" for label in (*range(10), *range(100, 110))]
    assert rows[0].startswith("000, a class w...     8.26 %   100.00 %    15.25 %         9       109")
    assert lines[-10] == "    100   91.7 %  000, a class with so... as 100, a class with so..."
    whole = "\n".join(report(result))
    assert names[0] in whole
    assert "..." not in whole


def repacked(root: Path, name: str, classes: tuple[str, ...], digits_root: Path, **options: Any) -> None:
    """Packs the digits, 40 and the whole validation split, under other labels."""
    index = load_index("digits", str(digits_root))
    samples = [
        Sample(image, "png", classes.index(options.get("names", DIGITS)[label]))
        for _, image, label in read_split(index, "val")
    ]
    splits = {"train": Listed(samples[:40]), "val": Listed(samples)}
    pack(name, str(root), splits, classes, options.get("channels", 1), Options())


@pytest.mark.nightly
def test_another_data_set_is_matched_by_the_names_of_its_classes(
    disttrain: Run, trained_run: Path, digits_root: Path, tmp_path: Path
) -> None:
    repacked(tmp_path, "backwards", DIGITS[::-1], digits_root)
    own = evaluated(disttrain, trained_run)
    other = evaluated(disttrain, trained_run, "--data", "backwards", "--root", tmp_path)
    assert other["data"] == "backwards"
    assert other["confusion"] == own["confusion"]


MISTAKES: dict[str, tuple[int, Callable[[Path], list[object]], str]] = {
    "no run": (2, lambda run: ["nowhere"], "nowhere: is not a run folder (it has no config.yaml)"),
    "no checkpoint": (66, lambda run: [run, "--checkpoint", "step_9"],
        "step_9: there is no checkpoint; give --checkpoint best or latest"),
    "no data": (65, lambda run: [run, "--data", "none"], "there is no data set 'none'"),
    "no GPU": (2, lambda run: [run, "--gpus", "2"], "--gpus 2: this machine has no usable GPU"),
    "other classes": (65, lambda run: [run, "--data", "planes", "--root", "."],
        "planes: its classes differ from those of the run: only planes has airplane, automobile, bird, cat, "
        "deer, dog, frog, horse, ship, truck; only the run has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    "other images": (65, lambda run: [run, "--data", "colour", "--root", "."],
        "colour: its images are 3x8x8, but the run was trained on 1x8x8; pack it again with --size 8"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    disttrain: Run, trained_run: Path, digits_root: Path, tmp_path: Path, mistake: str
) -> None:
    code, arguments, message = MISTAKES[mistake]
    if mistake == "other classes":
        repacked(tmp_path, "planes", CIFAR10_CLASSES, digits_root, names=CIFAR10_CLASSES)
    if mistake == "other images":
        repacked(tmp_path, "colour", DIGITS, digits_root, channels=3)
    done = disttrain("eval", *arguments(trained_run))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{", "{}", '{"data": {"shape": [1, 8, 8], "name": "digits"}}'])
def test_a_run_without_the_facts_of_its_images_says_where_they_come_from(
    trained_run: Path, tmp_path: Path, content: str | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    (run / "env.json").unlink()
    if content is not None:
        (run / "env.json").write_text(content)
    with pytest.raises(UsageError, match=r"env\.json: does not describe the images of the run"):
        open_run(run)


@pytest.mark.parametrize("processes", [2, *nightly(1)])
def test_a_damaged_checkpoint_is_named_by_any_number_of_processes(
    disttrain: Run, trained_run: Path, tmp_path: Path, processes: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    weights = run / "checkpoints" / "best" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    done = disttrain("eval", run, "--procs", processes)
    assert (done.returncode, done.stdout) == (66, "")
    assert "ema.safetensors: damaged" in done.stderr
    assert done.stderr.count("\n") == 1


def test_weights_of_another_network_are_refused(disttrain: Run, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("cnn_mnist", "resnet18"))
    done = disttrain("eval", run)
    assert done.returncode == 66
    assert "does not fit the network resnet18: " in done.stderr
    assert len(done.stderr) < 600
