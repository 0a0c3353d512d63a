"""Which figures lead to which verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from disttrain.config import Config
from disttrain.monitor.verdict import Evidence, evidence, judge
from disttrain.runs.records import GpuMeans, StepTimes, TrainRecord
from kit.run_files import train_record

FINE = Evidence(step_s=0.1, data_s=0.002, on_gpu=True, precision="bf16", utilization_pct=97, memory_pct=60)
CASES: list[tuple[str, dict[str, Any], str, list[str], str | None]] = [
    ("all is well", {}, "compute-bound", ["98 % of a step (100 ms)", "more GPUs"], None),
    ("of a known GPU", {"peak_pct": 41.7}, "compute-bound", ["computing, at 42 % of the device's"], None),
    ("fp32", {"precision": "fp32"}, "compute-bound", ["train.precision=bf16"], "train.precision"),
    (
        "a processor",
        {"on_gpu": False, "utilization_pct": None},
        "compute-bound",
        ["more cores or a GPU"],
        None,
    ),
    (
        "slow loader",
        {"data_s": 0.043, "cache": "none"},
        "input-bound",
        ["43 %", "(43 ms)", "data.cache=host"],
        "data.cache",
    ),
    ("slow gathering", {"data_s": 0.02}, "input-bound", ["20 %", "data.cache=device"], "data.cache"),
    ("on the GPU", {"data_s": 0.02, "cache": "device"}, "input-bound", ["no setting helps"], None),
    (
        "slow copies",
        {"data_s": 0.002, "to_device_s": 0.013, "augmentation_s": 0.003},
        "input-bound",
        ["18 %", "(18 ms)", "copying images to the GPU", "data.cache=device"],
        "data.cache",
    ),
    (
        "slow augmentation",
        {"data_s": 0.005, "augmentation_s": 0.02},
        "input-bound",
        ["25 %", "augmenting"],
        "augment",
    ),
    ("tiny network", {"data_s": 0.02, "on_gpu": False}, "input-bound", ["collecting samples"], None),
    ("just fast enough", {"data_s": 0.0099}, "compute-bound", [], None),
    ("slow link", {"communication_s": 0.035}, "communication-bound", ["35 %", "35 ms"], "train.batch_size"),
    ("both", {"communication_s": 0.035, "data_s": 0.4 * 0.1}, "input-bound", ["40 %"], "data.cache"),
    (
        "tiny batch",
        {"utilization_pct": 31.0},
        "launch-bound",
        ["31 %", "train.compile=true"],
        "train.compile",
    ),
    (
        "tiny batch, compiled",
        {"utilization_pct": 31.0, "compiled": True},
        "launch-bound",
        ["raise train.batch_size"],
        "train.batch_size",
    ),
    (
        "tiny batch of a network that is not ours",
        {"utilization_pct": 31.0, "graph": False},
        "launch-bound",
        ["raise train.batch_size or set train.cuda_graph=true"],
        "train.cuda_graph",
    ),
    (
        "tiny batch, replayed as a graph",
        {"utilization_pct": 31.0, "graph": True},
        "launch-bound",
        ["raise train.batch_size"],
        "train.batch_size",
    ),
    (
        "own stages",
        {"data_s": 0.03, "cache": "none", "staged": True},
        "input-bound",
        ["30 %", "raise data.workers, or make the stages cheaper"],
        "data.workers",
    ),
    ("unknown use", {"utilization_pct": None}, "compute-bound", [], None),
    ("full", {"memory_pct": 97.0}, "memory-tight", ["97 %"], "train.accumulate"),
    (
        "slow rank",
        {
            "own_s": (0.05, 0.051, 0.08, 0.05),
            "where": ("a", "b", "rank 2 on gpu07", "d"),
            "communication_s": 0.03,
        },
        "straggler",
        ["rank 2 on gpu07 needs 80 ms", "the median of the others is 50 ms"],
        None,
    ),
    (
        "one of two",
        {"own_s": (0.08, 0.06), "where": ("rank 0 on a", "b")},
        "straggler",
        ["rank 0 on a"],
        None,
    ),
    (
        "uneven ranks on a slow link",
        {"own_s": (0.004, 0.008), "where": ("a", "b"), "communication_s": 0.09},
        "communication-bound",
        ["90 %"],
        "train.batch_size",
    ),
    ("even ranks", {"own_s": (0.05, 0.06), "where": ("a", "b")}, "compute-bound", [], None),
    (
        "hot",
        {"throttled_pct": (0.0, None, 41.0), "gpu_names": ("x", "y", "GPU 2 on n1"), "data_s": 0.05},
        "throttled",
        ["GPU 2 on n1", "41 %"],
        None,
    ),
    ("warm", {"throttled_pct": (5.0, None), "gpu_names": ("x", "y")}, "compute-bound", [], None),
    ("nothing measured", {"step_s": 0.0, "data_s": 0.0}, "compute-bound", [], None),
]


@pytest.mark.parametrize(
    ("changes", "name", "words", "key"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_the_figures_give_the_verdict(
    changes: dict[str, Any], name: str, words: list[str], key: str | None
) -> None:
    verdict = judge(replace(FINE, **changes))
    assert (verdict.name, verdict.key) == (name, key)
    assert verdict.text.startswith(f"{name}: ")
    for word in words:
        assert word in verdict.text
    if key is not None:
        section, _, field = key.partition(".")
        model = Config.model_fields[section].annotation
        assert not field or field in model.model_fields  # type: ignore[union-attr]


def record(data_ms: float, compute_ms: list[float], **gpu: float | None) -> TrainRecord:
    phases = {"data": data_ms, "to_device": 0.25, "augmentation": 0.5, "communication": 1.0}
    ranks = {key: (ms,) * len(compute_ms) for key, ms in {**phases, "optimizer": 2.0}.items()}
    ranks["compute"] = tuple(compute_ms)
    return train_record(
        1,
        step_time_s=0.01,
        phases_ms=StepTimes(**phases),
        ranks_ms=StepTimes(**ranks),
        gpus=(GpuMeans("n1", 3, "GPU-3", memory_total_mib=1000, **gpu),) if gpu else (),
    )


def test_the_evidence_is_the_means_of_the_records() -> None:
    records = [
        record(1.0, [8.0, 4.0], utilization_pct=90.0, throttled_thermal_pct=10.0, memory_used_mib=500.0),
        record(3.0, [9.0]),  # before the run went on on other ranks
        record(2.0, [6.0, 6.0], utilization_pct=None, throttled_thermal_pct=30.0, memory_used_mib=990.0),
    ]
    where = ["rank 0 on n1", "rank 1 on n2"]
    setting = Evidence(where=where, cache="none", precision="bf16", compiled=True, graph=False, staged=True)
    assert evidence(records, setting) == Evidence(
        step_s=0.01,
        data_s=pytest.approx(0.0015),
        to_device_s=pytest.approx(0.00025),
        augmentation_s=pytest.approx(0.0005),
        communication_s=0.001,
        own_s=[pytest.approx(0.01125), pytest.approx(0.00925)],
        where=where,
        on_gpu=True,
        cache="none",
        precision="bf16",
        compiled=True,
        graph=False,
        staged=True,
        utilization_pct=90.0,
        memory_pct=99.0,
        throttled_pct=[20.0],
        gpu_names=["GPU 3 on n1"],
    )


def test_there_is_no_evidence_without_records() -> None:
    assert evidence([], Evidence(where=["rank 0 on n1"])) is None
