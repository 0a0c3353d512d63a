"""Whole runs on damaged data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kit.commands import Run
from kit.faults import BAD, CLASSES, Way, good, make, tar_of, told, with_bad
from kit.marks import nightly
from kit.run_results import ids_per_step


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path_factory.mktemp("own-cache")))


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


@pytest.mark.parametrize(
    ("kind", "way"),
    [("cut JPEG", "host"), ("no label", "none"), *nightly(("cut JPEG", "none"), ("no label", "host"))],
)
def test_a_bad_sample_ends_the_run_with_65_before_training(
    tmp_path: Path, train: Run, kind: str, way: Way
) -> None:
    folder, _ = with_bad(tmp_path, kind)
    result = train("run", "--procs", "1", f"data.cache={way}", "train.batch_size=64")
    assert result.returncode == 65, result.stderr
    assert re.search(told(kind, folder), result.stderr)
    assert "Traceback" not in result.stderr
    assert records(tmp_path / "run") == []
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("way", ["none", *nightly("host")])
def test_a_run_on_a_damaged_shard_ends_with_65(tmp_path: Path, train: Run, way: Way) -> None:
    folder = make(tmp_path)
    content = bytearray((folder / "train-1.tar").read_bytes())
    content[600] ^= 2
    (folder / "train-1.tar").write_bytes(content)
    result = train("run", "--procs", "1", f"data.cache={way}", "train.batch_size=64")
    assert result.returncode == 65, result.stderr
    assert re.search(r"set/train-1\.tar: damaged: its SHA-256 .*first bad sample y0", result.stderr)
    assert records(tmp_path / "run") == []


@pytest.mark.nightly
def test_skip_trains_on_all_other_samples_and_counts_the_rest(tmp_path: Path, train: Run) -> None:
    bad = [member for kind in ("no label", "cut PNG") for member in BAD[kind][0]]
    bad[0] = ("first.png", bad[0][1])
    folder = make(
        tmp_path,
        train_1=tar_of(*good("y", 3), *bad, *good("z", 3)),  # ids 3 to 10, of which 6 and 7 are bad
        train_2=tar_of(*good("w", 3)),  # ids 11 to 13
        train_3=tar_of(*good("u", 4)),  # ids 14 to 17
        val_0=tar_of(*good("v", 4), *BAD["empty image"][0], *good("t", 2)),
    )
    (folder / "train-2.tar").unlink()
    usable = {*range(18)} - {6, 7, 11, 12, 13}
    skip = "data.on_error=skip"
    one = train("one", "--procs", "1", skip, "data.cache=host")
    two = train("two", "--procs", "2", skip, "data.cache=none")
    for name, result in (("one", one), ("two", two)):
        assert result.returncode == 0, result.stderr
        steps = ids_per_step(tmp_path / name)
        for epoch in (1, 2):
            ids = [sample for place, batch in steps.items() if place[0] == epoch for sample in batch]
            assert sorted(ids) == sorted(usable)
        counts = {(r["kind"], r["skipped"]) for r in records(tmp_path / name)}
        assert counts == {("train", 5), ("eval", 1)}
        assert [r["total"] for r in records(tmp_path / name) if r["kind"] == "eval"] == [6, 6]
    assert ids_per_step(tmp_path / "one") == ids_per_step(tmp_path / "two")
    for line in ("train-1.tar: sample first: no label", "train-2.tar: all its samples: No such file"):
        assert f"skipped: {folder}/{line}" in one.stdout
    after_one_epoch = tmp_path / "one" / "checkpoints" / "step_00000004"
    assert after_one_epoch.exists(), list(after_one_epoch.parent.iterdir())
    resumed = train("more", "--procs", "2", skip, "data.cache=none", "--resume", str(after_one_epoch))
    assert resumed.returncode == 0, resumed.stderr
    second = {place: ids for place, ids in ids_per_step(tmp_path / "one").items() if place[0] == 2}
    assert ids_per_step(tmp_path / "more") == second


@pytest.mark.nightly
def test_a_run_that_ends_at_a_bad_sample_goes_on_without_it(tmp_path: Path, train: Run) -> None:
    with_bad(tmp_path, "cut PNG")
    ended = train("run", "--procs", "1", "data.cache=none")
    assert ended.returncode == 65, ended.stderr
    assert "data.on_error=skip" in ended.stderr  # the remedy, and it works
    went_on = train("run", "--procs", "1", "data.cache=none", "data.on_error=skip")
    assert went_on.returncode == 0, went_on.stderr
    assert "resuming with data.on_error: stop -> skip" in went_on.stdout
    assert records(tmp_path / "run")[-2]["skipped"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_usable_sample_is_a_data_error(tmp_path: Path, train: Run, split: str) -> None:
    folder = make(tmp_path)
    for path in folder.glob(f"{split}-*.tar"):
        path.unlink()
    result = train("run", "--procs", "1", "data.on_error=skip", "data.cache=none", "train.epochs=1")
    assert result.returncode == 65, result.stderr[-300:]


def test_verify_lists_what_is_bad_and_ends_with_65(disttrain: Run, tmp_path: Path) -> None:
    folder, _ = with_bad(tmp_path, "interleaved")
    (folder / "train-0.tar").unlink()
    result = disttrain("data", "verify", "set", "--root", tmp_path)
    assert result.returncode == 65
    assert result.stdout.splitlines() == [
        f"{folder}/train-0.tar: No such file or directory",
        f"{folder}/train-1.tar: sample bad: no label (member cls)",
        f"{folder}/train-1.tar: sample other: no label (member cls)",
        f"{folder}/train-1.tar: sample bad: key bad occurs twice: interleaved or duplicated members",
        f"{folder}/train-1.tar: sample other: key other occurs twice: interleaved or duplicated members",
    ]
    assert result.stderr.startswith("disttrain: set: 5 problems; ")


def test_data_index_ends_with_65_and_with_skip_writes_the_index(disttrain: Run, tmp_path: Path) -> None:
    folder, _ = with_bad(tmp_path, "two images")
    index = (folder / "index.json").read_bytes()
    (folder / "index.json").unlink()
    (tmp_path / "names").write_text("\n".join(CLASSES))
    command = ("data", "index", folder, "--classes", "names")
    result = disttrain(*command)
    assert result.returncode == 65
    assert re.search(told("two images", folder), result.stderr)
    assert not (folder / "index.json").exists()
    result = disttrain(*command, "--skip")
    assert result.returncode == 0, result.stderr
    assert "1 samples cannot be used, such as" in result.stdout
    assert (folder / "index.json").read_bytes() == index
