"""Tests of the comparison of runs."""

import io
import json
from pathlib import Path

import msgspec
import pytest
import rich
import rich.console

from disttrain.errors import UsageError
from disttrain.report.class_differences import class_table
from disttrain.report.compare import compare, table, to_json, write_comparison
from disttrain.runs.evaluation import FILE, Evaluation
from disttrain.runs.manifest import entry, write_manifest
from kit.commands import Run as Command
from kit.run_files import CONFIG, eval_record, write_run


def runs(folder: Path, settings: dict[str, tuple[float, float]]) -> list[Path]:
    """Writes a run for each name: its learning rate and its last accuracy; the seed is its place."""
    paths = []
    for seed, (name, (lr, accuracy)) in enumerate(settings.items()):
        config = CONFIG.replace("lr: 0.1", f"lr: {lr}") + f"seed: {seed}\n"
        paths.append(write_run(folder / name, accuracies=(0.5, 0.6, accuracy), config=config))
    return paths


def test_seeds_of_one_setting_are_one_group(tmp_path: Path) -> None:
    settings = {"a0": (0.1, 0.70), "a1": (0.1, 0.71), "a2": (0.1, 0.72)}
    settings |= {"b0": (0.2, 0.80), "b1": (0.2, 0.81), "b2": (0.2, 0.82)}
    found = compare(runs(tmp_path, settings))
    assert [(group.setting, group.titles) for group in found.groups] == [
        ("optim.lr=0.2", ["b0", "b1", "b2"]), ("optim.lr=0.1", ["a0", "a1", "a2"]),
    ]  # fmt: skip
    assert [group.mean for group in found.groups] == pytest.approx([0.81, 0.71])
    assert [group.deviation for group in found.groups] == pytest.approx([0.01, 0.01])
    assert dict(found.differences)["optim.lr"] == ["0.1"] * 3 + ["0.2"] * 3
    assert dict(found.differences)["seed"] == list("012345")
    assert "train.epochs" not in dict(found.differences)


def test_on_a_terminal_each_run_has_one_line(tmp_path: Path) -> None:
    settings = {"optim.lr=0.005,seed=0": (0.1, 0.70), "optim.lr=0.005,seed=1": (0.1, 0.71)}
    found = compare(runs(tmp_path, settings))
    texts = []
    for width in (200, 80, 40):
        console = rich.console.Console(file=io.StringIO(), width=width)
        console.print(table(found, width))
        texts.append(console.file.getvalue())
    for text in texts[:2]:
        assert [line for line in text.splitlines() if line.startswith("optim.lr=0.005,seed=1  ")]
    heads = [" ".join(text.split("optim", maxsplit=1)[0].split()) for text in texts]
    assert "images/s" in heads[0]
    assert "images/s" in heads[1]
    assert "training to" in heads[0]
    assert "training to" not in heads[1], "it would not fit"
    assert "best" in heads[2], "both accuracies are always shown"
    assert not any("…" in text for text in texts[:2])


def test_settings_are_ranked_by_the_metric_of_eval_best(tmp_path: Path) -> None:
    paths = runs(tmp_path, {"a0": (0.1, 0.70), "a1": (0.1, 0.72), "b": (0.2, 0.90)})
    for path, lowest in zip(paths, (0.25, 0.35, 0.5), strict=True):
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config + "eval: {best: loss}\n")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["kind"] == "eval"
        lines[-1] = json.dumps(last | {"loss": lowest})
        (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = compare(paths)
    assert found.metric.key == "loss"
    assert [(group.titles, group.text) for group in found.groups] == [
        (["a0", "a1"], "0.3000 ± 0.0707"), (["b"], "0.5000"),
    ]  # fmt: skip
    page = write_comparison(found, tmp_path / "page.html").read_text()
    assert "Settings and their validation loss" in page
    as_json = to_json(found)
    assert (as_json["metric"], as_json["groups"][0]["mean"]) == ("loss", pytest.approx(0.3))
    (paths[0] / "config.yaml").write_text(config)
    assert compare(paths).metric.key == "accuracy", "if the runs have several"


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    found = compare(runs(tmp_path, {"a": (0.1, 0.7), "b": (0.2, 0.9), "c": (0.2, 0.91)}))
    assert [group.deviation is None for group in found.groups] == [False, True]


def test_time_and_images_to_an_accuracy(tmp_path: Path) -> None:
    paths = runs(tmp_path, {"a": (0.1, 0.7), "b": (0.2, 0.9)})
    found = compare(paths)
    assert found.target == 0.7  # the best that both have reached
    assert found.rows["images_to_target"] == [300, 300]
    found = compare(paths, 0.55)
    assert found.rows["epochs_to_target"] == [2, 2]
    assert found.rows["images_to_target"] == [200, 200]
    assert found.rows["training_to_target_s"] == pytest.approx([20, 20])
    assert compare(paths, 0.8).rows["training_to_target_s"][0] is None


def test_runs_that_failed_or_tell_nothing_are_shown_but_not_judged(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "x" / "run", status={"state": "failed", "exit_code": 70}),
        write_run(tmp_path / "y" / "run", accuracies=()),
    ]
    (paths[1] / "env.json").unlink()
    found = compare(paths)
    assert list(found.runs) == ["x/run", "y/run"]
    assert found.rows["state"] == ["failed", "finished"]
    assert found.rows["last_accuracy"] == [0.75, None]
    assert found.groups == []
    json.dumps(to_json(found), allow_nan=False)
    page = write_comparison(found, tmp_path / "page.html")
    assert "No run has finished with an evaluation" in page.read_text()


def test_runs_evaluated_on_different_data_are_not_compared_in_silence(tmp_path: Path) -> None:
    paths = runs(tmp_path, {"a": (0.1, 0.7), "b": (0.2, 0.9), "c": (0.2, 0.9), "unknown": (0.1, 0.8)})
    for path, digit in zip(paths, "aab", strict=False):
        env = json.loads((path / "env.json").read_text())
        env["data"] = {"name": "photos", "digest": digit * 64}
        (path / "env.json").write_text(json.dumps(env))
    assert compare(paths[:2]).warning == ""
    found = compare(paths)
    assert found.warning.endswith(
        "a, b: 1,000 images of photos (digest aaaaaaaa); c: 1,000 images of photos (digest bbbbbbbb)"
    )
    page = write_comparison(found, tmp_path / "page.html").read_text()
    assert found.warning in page
    assert f'<td title="{64 * "b"}">bbbbbbbb</td>' in page


def evaluated(run: Path, classes: tuple[str, ...], cells: list[tuple[int, int, int]]) -> None:
    """Stores an evaluation as the only part of the best checkpoint."""
    step = run / "checkpoints" / "step_00000030"
    step.mkdir(parents=True)
    data = msgspec.json.encode(Evaluation(eval_record(30, 0.7), 0, classes, cells, []))
    (step / FILE).write_bytes(data)
    write_manifest(step, {FILE: entry(FILE, data)})
    (run / "checkpoints" / "best").symlink_to(step.name)


def test_of_a_thousand_classes_those_that_differ_most_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = runs(tmp_path, {"a": (0.1, 0.7), "b": (0.2, 0.9), "c": (0.2, 0.9)})
    names = tuple(f"{label}, a class with <many> names" for label in range(1000))
    own = [(label, label, 40 if label != 1 else 1) for label in range(999)]  # of the last one, none
    evaluated(paths[0], names, own)
    worse = {7: 10, 8: 30, 1: 0}
    cells = [(a, b, worse.get(a, count)) for a, b, count in own]
    cells += [(label, 999, 40 - worse[label]) for label in (7, 8)] + [(1, 2, 1)]
    evaluated(paths[1], names[::-1], [(999 - a, 999 - b, count) for a, b, count in cells])
    found = compare(paths)
    assert len(found.classes) == 999
    assert [(row.name, row.samples, row.accuracies) for row in found.classes[:3]] == [
        (names[7], 40, [1, 0.25, None]), (names[8], 40, [1, 0.75, None]), (names[1], 1, [1, 0, None]),
    ]  # fmt: skip
    assert len(to_json(found)["classes"]) == 999
    page = write_comparison(found, tmp_path / "page.html").read_text()
    assert "The 20 of 999 classes that differ most" in page
    assert page.count("&lt;many&gt;") == 20
    two = compare(paths[:2])
    assert two.classes[0].text == "-75.00"
    rich.print(class_table(two.runs, two.classes))
    shown = capsys.readouterr().out
    assert shown.count("<many>") == 10
    assert max(map(len, shown.splitlines())) <= 80
    assert compare(paths[1:]).classes == [], "one of them has no evaluation"


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UsageError, match="the same run twice"):
        compare([run, tmp_path / "other" / ".." / "run"])


def test_the_command_prints_a_table_or_json_and_writes_the_page(tmp_path: Path, disttrain: Command) -> None:
    paths = runs(tmp_path, {"a": (0.1, 0.7), "<b>": (0.2, 0.9), "c": (0.2, 0.92)})
    result = disttrain("report", *paths, "--target", "55")
    assert (result.returncode, result.stderr) == (0, "")
    assert "last" in result.stdout
    assert "90.00 %" in result.stdout
    assert "optim.lr=0.2: 91.00 % ± 1.41 (n = 2)" in result.stdout
    assert result.stdout.splitlines()[-1] == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.split("<script>")[0]
    same = disttrain("report", *paths, "--json", "--output", "page.html")
    assert (tmp_path / "page.html").exists()
    rows = json.loads(same.stdout)["runs"]
    assert [row["last_accuracy"] for row in rows] == [0.7, 0.9, 0.92]
