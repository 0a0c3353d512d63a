"""Run folders written by hand, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import structs

from disttrain.runs.evaluation import Evaluation
from disttrain.runs.jsonl import encoded
from disttrain.runs.records import EvalRecord, GpuReading, StepTimes, TrainRecord

Record = TrainRecord | EvalRecord | GpuReading

BEGIN = datetime(2026, 11, 20, 23, 59, 30, tzinfo=UTC).timestamp()  # midnight comes half a minute later


CONFIG = """\
name: demo
data: {name: none}
model: {name: cnn_mnist}
train: {epochs: 3, batch_size: 10}
optim: {name: adam, lr: 0.1}
"""


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(BEGIN + seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def write_lines(path: Path, records: Iterable[Record], mode: str = "wb") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.writelines(map(encoded, records))


def train_record(step: int, **changes: Any) -> TrainRecord:
    """A train record: 10 steps an epoch of 100 samples, a second each."""
    phases = {
        "data": 150.0,
        "to_device": 30.0,
        "augmentation": 20.0,
        "compute": 500.0,
        "communication": 100.0,
        "optimizer": 50.0,
        "logging": 1.0,
        "evaluation": 0.0,
        "checkpoint": 0.0,
    }
    record = TrainRecord(
        time=stamp(step), step=step, epoch=1 + (step - 1) // 10, loss=2 / max(1, step), samples=10 * step,
        accuracy=min(1, step / 50), lr=0.1, images_per_s=10.0, step_time_s=1.0, data_wait_pct=20.0, skipped=0,
        gpus=(), phases_ms=StepTimes(**phases),
        ranks_ms=StepTimes(**{name: (ms - step / 100, ms + step / 100) for name, ms in phases.items()}),
    )  # fmt: skip
    return structs.replace(record, **changes)


def eval_record(step: int, accuracy: float, **changes: Any) -> EvalRecord:
    record = EvalRecord(
        time=stamp(step + 0.5), step=step, epoch=step // 10, loss=1 - accuracy, accuracy=accuracy,
        correct=round(1000 * accuracy), total=1000, skipped=0,
    )  # fmt: skip
    return structs.replace(record, **changes)


def gpu_record(second: float, number: int, **changes: Any) -> GpuReading:
    reading = GpuReading(
        time=stamp(second), host=f"node{number // 2}", index=number % 2, uuid=f"GPU-{number}",
        name="NVIDIA H100", utilization_pct=90 + number, memory_used_mib=2048 * (1 + number),
        memory_total_mib=81559, power_w=300.5, temperature_c=60, throttle=("power",), lost=False,
    )  # fmt: skip
    return structs.replace(reading, **changes)


def write_run(
    path: Path,
    *,
    accuracies: tuple[float, ...] = (0.5, 0.8, 0.75),
    config: str = CONFIG,
    gpus: int = 0,
    status: dict[str, Any] | None = None,
) -> Path:
    """Writes a finished run of ten steps an epoch, a second each, with an evaluation after every epoch."""
    records: list[Record] = []
    for epoch, accuracy in enumerate(accuracies):
        records += [train_record(10 * epoch + step) for step in range(1, 11)]
        records.append(eval_record(10 * epoch + 10, accuracy))
    write_lines(path / "metrics.jsonl", records)
    (path / "config.yaml").write_text(config)
    env = {"command": "disttrain run demo.yaml", "directory": "/here", "packages": {"torch": "2.15.0"}}
    env["run"] = {"model": "cnn_mnist", "epochs": 3, "steps_per_epoch": 10, "samples_per_epoch": 100}
    (path / "env.json").write_text(json.dumps(env))
    last = 10 * len(accuracies)
    state = {"state": "finished", "exit_code": 0, "step": last, "epoch": len(accuracies), "restarts": 0}
    state |= {"started_at": stamp(0), "updated_at": stamp(last + 1), "samples_seen": 10 * last}
    (path / "status.json").write_text(json.dumps(state | (status or {})))
    seconds = range(last)
    write_lines(path / "gpu.jsonl", [gpu_record(s, number) for s in seconds for number in range(gpus)])
    return path


def evaluation_with(confusion: Any, classes: Sequence[str]) -> Evaluation:
    """Returns an evaluation with this confusion matrix and nothing else."""
    cells = [(i, j, int(count)) for i, row in enumerate(confusion) for j, count in enumerate(row) if count]
    return Evaluation(eval_record(1, 0.5), 0, tuple(classes), cells, [])
