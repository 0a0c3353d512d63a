"""The list of runs of `disttrain serve`: what is found, what a row says, and when it is read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.errors import UsageError
from disttrain.report import listing
from disttrain.report.listing import Listing, Row, to_json
from disttrain.runs.runfolder import utc_now
from kit.run_files import BEGIN, CONFIG, eval_record, stamp, train_record, write_lines, write_run
from kit.run_results import status


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_KEPT_S", 0.0)


def by_path(found: Listing) -> dict[str, Row]:
    return {row.path: row for row in found.rows()}


def test_a_row_has_the_figures_of_its_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status={"world_size": 4})
    (row,) = Listing(tmp_path).rows()
    assert (row.path, row.name, row.about, row.state) == ("a", "demo", "cnn_mnist, none", "finished")
    assert (row.epoch, row.epochs, row.step, row.world_size) == (3, 3, 30, 4)
    assert (row.accuracy, row.best, row.loss) == (0.75, 0.8, 2 / 30)
    assert (row.started_s, row.duration_s, row.note) == (BEGIN, 31.0, "")
    (shown,) = to_json([row])["rows"]
    texts = {title: text for title, (_, text) in zip(listing.COLUMNS, shown["cells"], strict=True)}
    assert texts == {
        "state": "finished",
        "accuracy": "75.00 %",
        "best accuracy": "80.00 %",
        "training loss": "0.0667",
        "epoch": "3 of 3",
        "step": "30",
        "started, UTC": "2026-11-20 23:59",
        "duration": "31.0 s",
        "ranks": "4",
    }


def test_a_multi_label_run_is_listed_by_its_map(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    metrics = tmp_path / "a/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    scores = iter((0.9, 0.6, 0.7))
    with metrics.open("w") as file:
        for line in lines:
            more = {"map": next(scores)} if line["kind"] == "eval" else {}
            file.write(json.dumps(line | more) + "\n")
    (shown,) = to_json(Listing(tmp_path).rows())["rows"]
    cells = dict(zip(listing.COLUMNS, shown["cells"], strict=True))
    assert cells["accuracy"] == (0.7, "70.00 % mAP")
    assert cells["best accuracy"] == (0.9, "90.00 % mAP")


def test_runs_are_found_at_any_depth_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside")
    folder = tmp_path / "runs"
    for path in ("one", "a/b/c/two", ".trash/three", "one/checkpoints/four"):
        write_run(folder / path)
    (folder / "a/loop").symlink_to(folder)
    (folder / "elsewhere").symlink_to(outside)
    (folder / "experiments").mkdir()
    (folder / "experiments/config.yaml").write_text(CONFIG)
    assert list(by_path(Listing(folder))) == ["a/b/c/two", "one"]
    assert list(by_path(Listing(outside))) == [""]
    with pytest.raises(UsageError, match="no such folder"):
        Listing(tmp_path / "missing")


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def as_link(run: Path) -> None:
    (run / "config.yaml").rename(run.parent.parent / "secret.yaml")
    (run / "config.yaml").symlink_to(run.parent.parent / "secret.yaml")


def as_pipe(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (without("status.json"), "no status.json"),
        (without("config.yaml"), "no config.yaml"),
        (written("status.json", '{"state": "fin'), "status.json: Input data was truncated"),
        (written("status.json", "[]"), "status.json: Expected `object`, got `array`"),
        (written("config.yaml", CONFIG + "zzzzzz: 1\n"), "config.yaml:6: zzzzzz: unknown key"),
        (as_link, "config.yaml is not a regular file; links are not followed"),
        (as_pipe, "metrics.jsonl is not a regular file; links are not followed"),
    ],
)  # fmt: skip
def test_a_broken_run_is_a_row_with_the_reason(
    damage: Callable[[Path], None], note: str, tmp_path: Path
) -> None:
    damage(write_run(tmp_path / "runs/broken"))
    write_run(tmp_path / "runs/whole")
    rows = by_path(Listing(tmp_path / "runs"))
    assert rows["broken"].note == note
    assert rows["whole"].note == ""


def test_a_folder_without_permission_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "theirs")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    (row,) = Listing(tmp_path).rows()
    assert (row.path, row.note, row.version) == ("theirs", "cannot be read: Permission denied", "")


def test_states_tell_why_and_who_died(tmp_path: Path) -> None:
    write_run(tmp_path / "failed", status={"state": "failed", "reason": "rank 3 died\nand more"})
    write_run(tmp_path / "killed", status={"state": "running"})
    write_run(tmp_path / "live", status={"state": "running", "updated_at": utc_now()})
    rows = by_path(Listing(tmp_path))
    assert (rows["failed"].state, rows["failed"].note) == ("failed", "rank 3 died")
    assert rows["killed"].state == "silent"
    assert rows["killed"].note.startswith("most likely killed ")
    assert (rows["live"].state, rows["live"].note) == ("running", "")


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", status={"state": "running", "updated_at": utc_now()})
    found = Listing(tmp_path)
    (before,) = found.rows()
    monkeypatch.setattr(listing, "load_config", lambda path: pytest.fail("the config has not changed"))
    monkeypatch.setattr(listing, "_status", lambda path: pytest.fail("the status has not changed"))
    assert found.rows() == [before]
    write_lines(run / "metrics.jsonl", [train_record(31, loss=0.5), eval_record(40, 0.9)], "ab")
    (after,) = found.rows()
    assert (after.accuracy, after.best, after.loss) == (0.9, 0.9, 0.5)
    assert after.version != before.version
    write_lines(run / "new", [eval_record(10, 0.6)])
    (run / "new").replace(run / "metrics.jsonl")
    (replaced,) = found.rows()
    assert (replaced.accuracy, replaced.best, replaced.loss) == (0.6, 0.6, None)


def test_progress_alone_makes_no_new_version_and_lost_runs_leave(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status={"state": "running", "updated_at": utc_now()})
    found = Listing(tmp_path)
    before = found.find("run")
    assert before is not None
    (run / "status.json").write_text(json.dumps(status(run) | {"step": 31, "updated_at": utc_now()}))
    after = found.find("run")
    assert after is not None
    assert (after.step, after.version) == (31, before.version)
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "finished", "updated_at": stamp(40)}))
    ended = found.find("run")
    assert ended is not None
    assert ended.version != before.version
    run.rename(tmp_path.parent / f"{tmp_path.name}-gone")
    assert found.rows() == []
    assert found.find("run") is None
