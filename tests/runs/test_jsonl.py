"""Lines of JSON that are appended and read, and that every key of a record is one of its declaration."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from disttrain.errors import StorageError
from disttrain.runs.jsonl import JsonLines, encoded, parts
from disttrain.runs.records import GPUS, METRICS, EvalRecord, TrainRecord
from kit.run_files import eval_record, gpu_record, train_record


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = JsonLines(path)
    for record in records:
        file.write(record)
    file.close()


def read_lines(path):
    """Returns the records of a strictly valid JSONL file."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1, "loss": 0.5, "name": "é"}])
    write_lines(path, [{"step": 2, "loss": None}])
    assert read_lines(path) == [{"step": 1, "loss": 0.5, "name": "é"}, {"step": 2, "loss": None}]


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    write_lines(
        path, [{"loss": value, "lr": 0.1, "gpus": [{"power_w": value, "host": "a"}, {}], "xs": (1, value)}]
    )
    assert read_lines(path) == [
        {"loss": None, "lr": 0.1, "gpus": [{"power_w": None, "host": "a"}, {}], "xs": [1, None]}
    ]


@pytest.mark.parametrize("torn", ['{"step": 2', "x" * 200_000])
@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
def test_nothing_is_glued_to_a_torn_line(tmp_path, torn, whole):
    path = tmp_path / "gpu.jsonl"
    path.write_text(whole + torn)
    write_lines(path, [{"step": 3}])
    assert path.read_text() == whole + '{"step": 3}\n'


@pytest.mark.integration
def test_a_process_that_is_killed_while_it_writes_tears_one_line_at_most(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; from disttrain.runs.jsonl import JsonLines\n"
        "file = JsonLines(Path(sys.argv[1]))\n"
        "print(flush=True)\n"
        "for step in range(10**9): file.write({'step': step, 'ids': list(range(2000))})\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05)
            process.kill()
    write_lines(path, [{"step": -1}])
    steps = [record["step"] for record in read_lines(path)]
    assert steps[-1] == -1
    for before, after in itertools.pairwise(steps[:-1]):
        assert after in {before + 1, 0}


def test_lines_on_a_full_disk():
    file = JsonLines(Path("/dev/full"))
    with pytest.raises(StorageError, match=r"^/dev/full: cannot be written: No space left") as caught:
        file.write({"step": 1})
    assert caught.value.exit_code == 74
    file.close()


def test_lines_are_synced_to_the_disk(tmp_path, monkeypatch):
    file = JsonLines(tmp_path / "metrics.jsonl")
    synced = []

    def fsync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        if len(synced) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    file.sync()
    with pytest.raises(StorageError, match="Input/output error"):
        file.sync()
    file.close()
    assert synced == [tmp_path / "metrics.jsonl"] * 2


# --- Records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "decoder"),
    [(train_record(3), METRICS), (eval_record(10, 0.5), METRICS), (gpu_record(1, 2), GPUS)],
)
def test_what_is_written_is_read(record, decoder, tmp_path):
    path = tmp_path / "lines.jsonl"
    write_lines(path, [record, record])
    (part,) = parts(path, decoder)
    assert part == ([record, record], 0, path.stat().st_size)


def test_a_file_of_another_version_is_read(tmp_path):
    """The keys of the first version in their order, and one that does not exist yet."""
    old = {
        "time": "2026-11-20T12:00:00.123456Z", "kind": "train", "step": 5, "epoch": 1, "samples": 50,
        "loss": 1.5, "accuracy": 0.5, "lr": 0.1, "images_per_s": 10.0, "step_time_s": 0.1,
        "data_wait_pct": 1.0, "phases_ms": {"data": 1.5}, "gpus": [], "of_a_later_version": [1],
    }  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(old) + "\n")
    (part,) = parts(path, METRICS)
    (record,) = part.rows
    assert isinstance(record, TrainRecord)
    assert (record.time, record.phases_ms.data, record.phases_ms.compute) == (old["time"], 1.5, None)
    assert (record.grad_norm, record.skipped, record.processes) == (None, None, msgspec.UNSET)


def test_what_is_unknown_is_null_and_what_is_not_there_is_left_out():
    train = json.loads(encoded(train_record(1, mfu_pct=None)))
    assert train["mfu_pct"] is None
    assert "processes" not in train
    assert not {"tta", "plain_accuracy"} & json.loads(encoded(eval_record(1, 0.5))).keys()
    assert json.loads(encoded(gpu_record(1, 0)))["xids"] is None


def test_a_key_that_nothing_declares_cannot_be_written():
    with pytest.raises(TypeError, match="throttle_reasons"):
        gpu_record(1, 0, throttle_reasons=["power"])
    with pytest.raises(TypeError, match="kind"):
        EvalRecord(step=1, epoch=1, loss=0.5, accuracy=0.5, correct=1, total=2, kind="eval")
