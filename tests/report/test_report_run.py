"""Tests of reading a run folder for the report."""

import math
import multiprocessing
import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import UsageError
from disttrain.report import devices
from disttrain.report import run as report_run
from disttrain.report.columns import downsample, parse_times
from disttrain.report.devices import read_gpus
from disttrain.report.run import read_ranks, read_run, time_to_accuracy
from disttrain.runs import jsonl
from disttrain.runs.jsonl import encoded
from disttrain.runs.records import StepTimes
from kit.run_files import BEGIN, gpu_record, stamp, train_record, write_lines, write_run


@given(
    st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), min_size=1, max_size=400),
    st.integers(4, 60),
)
def test_thinning_keeps_both_ends_and_every_extreme(values: list[float], points: int) -> None:
    array = np.array(values)
    kept = downsample(array, points)
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert len(kept) <= max(points, 4)
    known = array[np.isfinite(array)]
    if len(known):
        assert (np.nanmin(array[kept]), np.nanmax(array[kept])) == (known.min(), known.max())


def test_thinning_keeps_the_extremes_of_every_part_and_the_gaps() -> None:
    values = np.sin(np.linspace(0, 20, 100_000))
    values[40_000] = 7
    values[50_000:60_000] = np.nan
    kept = downsample(values, 1000)
    assert len(kept) <= 1000
    assert 40_000 in kept
    drawn = values[kept]
    for begin in range(0, 100_000, 10_000):
        part = drawn[(kept >= begin) & (kept < begin + 10_000)]
        whole = values[begin : begin + 10_000]
        if begin == 50_000:
            assert len(part)
            assert np.isnan(part[1:-1]).all()
        else:
            assert np.nanmax(part) == pytest.approx(np.nanmax(whole), abs=0.05)
            assert np.nanmin(part) == pytest.approx(np.nanmin(whole), abs=0.05)


def test_columns_events_and_the_best_evaluation_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.name == "demo"
    assert run.train["step"].tolist() == list(range(1, 31))
    assert run.training_s[-1] == pytest.approx(30)
    assert run.train["time_s"][:2].tolist() == pytest.approx([BEGIN + 1, BEGIN + 2])
    assert run.best is not None
    assert (run.best.epoch, run.best.accuracy) == (2, 0.8)
    assert [event.kind for event in run.events] == ["evaluation"] * 3
    assert [event.seconds for event in run.events] == pytest.approx([0.5] * 3)
    assert time_to_accuracy(run, 0.6) == (run.evals[1], pytest.approx(20))
    assert time_to_accuracy(run, 0.9) is None


def test_times_across_midnight_and_broken_ones() -> None:
    texts = [stamp(second) for second in (0, 29.999, 30, 86429.5)]
    expected = [BEGIN, BEGIN + 29.999, BEGIN + 30, BEGIN + 86429.5]
    assert parse_times(texts).tolist() == pytest.approx(expected, abs=1e-4)
    assert parse_times(texts[:2]).tolist() == pytest.approx(expected[:2], abs=1e-4)
    micro = ["2026-11-21T00:45:12.123456Z", "2026-11-21T00:45:13Z", "yesterday", ""]
    first, second, *rest = parse_times(micro).tolist()
    assert first == pytest.approx(datetime(2026, 11, 21, 0, 45, 12, 123000, UTC).timestamp(), abs=1e-4)
    assert math.isnan(second) or second == datetime(2026, 11, 21, 0, 45, 13, tzinfo=UTC).timestamp()
    assert all(map(math.isnan, rest))


def test_starts_and_checkpoints_are_read_from_the_log(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "logs").mkdir()
    lines = [
        f"{stamp(0)} INFO rank 0, process 17 on node0",
        f"{stamp(9)} INFO saved {run}/checkpoints/step_00000010, the best macro F1",
        f"{stamp(10)} WARNING saved nothing step_00000010",
        f"{stamp(12)} INFO rank 0, process 18 on node0",
        f"{stamp(20)} INFO saved {run}/checkpoints/step_00000020",
    ]
    (run / "logs/rank_00000.log").write_text("\n".join(lines))
    events = [event for event in read_run(run).events if event.kind != "evaluation"]
    assert [(event.kind, event.text) for event in events] == [
        ("start", "start"),
        ("checkpoint", "checkpoint of step 10, the best macro F1 so far"),
        ("start", "start number 2"),
        ("checkpoint", "checkpoint of step 20"),
    ]
    assert [event.time_s - BEGIN for event in events] == pytest.approx([0, 9, 12, 20], abs=1e-3)


def test_an_interval_of_slow_steps_is_a_stall(tmp_path: Path) -> None:
    steps = [train_record(10 * n, step_time_s=0.1) for n in range(1, 21)]
    steps[11].step_time_s = 4.0
    steps[15].step_time_s = 0.6  # six times as slow, but 5 s in all
    write_lines(tmp_path / "metrics.jsonl", steps)
    (stall,) = read_run(tmp_path).events
    assert (stall.kind, stall.seconds) == ("stall", pytest.approx(40))
    assert stall.text == "steps 111 to 120 took 40 s, 40 times as long as usual"


def test_lines_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gpus=2)
    for name in ("metrics.jsonl", "gpu.jsonl"):
        text = (run / name).read_text()
        lines = text.splitlines()
        broken = [*lines[:3], '{"kind": "train", "st', "\xff\x00", '{"step": "many", "kind": 3}', *lines[3:]]
        (run / name).write_bytes("\n".join([*broken, lines[0][:40]]).encode("latin-1"))
    found = read_run(run)
    assert len(found.train["step"]) == 30
    assert found.unread == 3  # the last line is being written
    gpus, unread = read_gpus(run / "gpu.jsonl")
    assert [len(gpu.time_s) for gpu in gpus] == [30, 30]
    assert unread == 3


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("missing", ["config.yaml", "env.json", "status.json", "metrics.jsonl", "gpu.jsonl"])
def test_a_run_is_read_without_any_of_its_files(missing: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gpus=1)
    (run / missing).unlink()
    found = read_run(run)
    gpus, _ = read_gpus(run / "gpu.jsonl")
    assert (found.config is None) == (missing == "config.yaml")
    assert (found.env == {}) == (missing == "env.json")
    assert (found.status == {}) == (missing == "status.json")
    assert (found.evals == []) == (missing == "metrics.jsonl")
    assert (gpus == []) == (missing == "gpu.jsonl")


def test_gpus_are_told_apart_and_their_unknown_readings_stay_unknown(tmp_path: Path) -> None:
    rows = [gpu_record(second, number) for second in range(40) for number in (2, 0, 1)]
    rows[0].power_w = None
    write_lines(tmp_path / "gpu.jsonl", rows)
    found, _ = read_gpus(tmp_path / "gpu.jsonl")
    assert [device.label for device in found] == ["node0 GPU 0", "node0 GPU 1", "node1 GPU 0"]
    assert [device.values["utilization_pct"][0] for device in found] == [90, 91, 92]
    assert [device.values["memory_gib"][0] for device in found] == [2, 4, 6]
    assert np.isnan(found[2].values["power_w"]).tolist() == [True, *[False] * 39]
    assert found[0].time_s.tolist() == pytest.approx([BEGIN + s for s in range(40)], abs=1e-3)


def test_a_large_file_is_read_by_several_processes_line_for_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.jsonl"
    rows = [encoded(gpu_record(second / 10, number)).decode() for second in range(500) for number in range(3)]
    rows.insert(700, "no JSON\n")
    path.write_text("".join(rows) + rows[0][:20])
    whole = read_gpus(path)
    monkeypatch.setattr(devices, "_PART_BYTES", 1)
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    parts = read_gpus(path)
    assert parts[1] == whole[1] == 1
    for one, other in zip(whole[0], parts[0], strict=True):
        assert one.label == other.label
        assert len(one.time_s) == 500
        np.testing.assert_array_equal(one.time_s, other.time_s)
        for key, values in one.values.items():
            np.testing.assert_array_equal(values, other.values[key])


def killed_unless_alone(path: Path, place: tuple[int, int]) -> devices._Readings:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return READ_READINGS(path, place)


READ_READINGS = devices._read_readings


@pytest.mark.integration
def test_a_file_whose_readers_are_killed_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", gpus=2)
    monkeypatch.setattr(devices, "_PART_BYTES", 1)
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    monkeypatch.setattr(devices, "_read_readings", killed_unless_alone)
    found, unread = read_gpus(run / "gpu.jsonl")
    assert [len(device.time_s) for device in found] == [30, 30]
    assert unread == 0


@pytest.mark.parametrize("chunk", [64, 1000, 4096, 2**20])  # 64: less than a line
def test_chunks_end_at_lines(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", chunk)
    assert read_run(run).train["step"].tolist() == list(range(1, 31))


def test_the_ranks_of_the_last_log_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    found, points = read_ranks(run / "metrics.jsonl")
    assert points == 29  # the first one has steps of which nothing is known
    assert found["compute"] == pytest.approx([500 - 0.16, 500 + 0.16])
    monkeypatch.setattr(report_run, "_TAIL_BYTES", 2000)
    found, points = read_ranks(run / "metrics.jsonl")
    assert 0 < points < 10
    assert found["data"][0] < 180 - 0.25
    alone = train_record(31, ranks_ms=StepTimes(data=(7.0,), compute=(9.0,)))
    write_lines(run / "metrics.jsonl", [alone], "ab")  # it goes on on one rank
    assert read_ranks(run / "metrics.jsonl") == ({"data": [7.0], "compute": [9.0]}, 1)
    times = ((10, 5.0), (30, 1.0), (31, 22.0))
    uneven = [train_record(step, ranks_ms=StepTimes(data=(ms,))) for step, ms in times]
    write_lines(tmp_path / "uneven.jsonl", uneven)
    assert read_ranks(tmp_path / "uneven.jsonl") == ({"data": [2.0]}, 2)
    assert read_ranks(tmp_path / "missing.jsonl") == ({}, 0)
