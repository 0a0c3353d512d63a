"""The profile of a few steps, and what it leaves in the run folder."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disttrain.errors import StoppedError
from disttrain.heartbeat import Phase
from disttrain.training.profiler import Profiler, costliest

PHASES = (Phase.DATA, Phase.TO_DEVICE, Phase.COMPUTE, Phase.DATA, Phase.COMPUTE, Phase.OPTIMIZE, Phase.REPORT)


def take(profiler: Profiler, steps: range) -> None:
    """Takes steps of two micro-batches, each with one matrix product."""
    matrix = torch.ones(2, 2)
    for step in steps:
        for part, phase in enumerate(PHASES):
            profiler.beat(phase, step, part)
            if phase is Phase.COMPUTE:
                torch.mm(matrix, matrix)


class Run(SimpleNamespace):
    """What a profiler is given, and what it said."""

    def profiler(self, rank: int = 0) -> Profiler:
        self.beats, self.said = [], []
        beat = lambda *place: self.beats.append(place)  # noqa: E731
        return Profiler(beat, self.folder, rank, torch.device("cpu"), self.said.append)

    def spans(self, rank: int = 0) -> Iterator[tuple[str, float, float]]:
        with gzip.open(self.folder / f"rank_{rank:05d}.trace.json.gz") as file:
            for event in json.load(file)["traceEvents"]:
                if event.get("cat") == "user_annotation":
                    yield event["name"], event["ts"], event["ts"] + event["dur"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "profile")


def operators(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "operators.json").read_text())
    return found


def test_five_steps_after_the_warm_up_are_recorded_with_their_phases(run: Run) -> None:
    with run.profiler() as profiler:
        take(profiler, range(101, 131))  # as after a resume
    assert run.said == [f"profile of steps 113 to 117: {run.folder}/rank_00000.trace.json.gz"]
    assert run.beats == [(phase, step, part) for step in range(101, 131) for part, phase in enumerate(PHASES)]
    spans = sorted(run.spans(), key=lambda span: span[1])
    names = ["data", "to_device", "compute", "data", "compute", "optimizer", "logging"]
    assert [name for name, _, _ in spans] == [
        name for step in range(113, 118) for name in (f"step {step}", *names)
    ]
    for place, (_, begin, end) in enumerate(spans):
        _, step_begin, step_end = spans[place - place % 8]
        assert step_begin <= begin <= end <= step_end
    found = operators(run)
    assert found["steps"] == [113, 117]
    assert {row["name"]: row["calls"] for row in found["cpu"]}["aten::mm"] == 10
    assert found["device"] == []


def test_a_short_run_leaves_what_was_seen_or_says_that_nothing_was(run: Run) -> None:
    with run.profiler() as profiler:
        take(profiler, range(1, 13))
    assert run.said == ["profile: empty, because it leaves out the first 12 steps and none came after"]
    assert not run.folder.exists()
    profiler = run.profiler(rank=1)
    take(profiler, range(1, 15))
    profiler.__exit__(StoppedError, StoppedError("stopped"), None)
    assert "profile of steps 13 to 14" in run.said[0]
    assert {name for name, _, _ in run.spans(rank=1)} >= {"step 13", "step 14"}
    assert not (run.folder / "operators.json").exists(), "only rank 0 writes them"


def test_a_profile_that_cannot_be_written_is_a_message(run: Run) -> None:
    run.folder.write_text("not a folder")
    with run.profiler() as profiler:
        take(profiler, range(1, 19))
    assert run.said == [f"profile: {run.folder}/rank_00000.trace.json.gz cannot be written: File exists"]


def test_the_costliest_operators_have_their_share_of_the_self_time() -> None:
    def event(key: str, us: float, on: str = "CPU") -> Any:
        times = {"self_cpu_time_total": us, "self_device_time_total": us}
        device = SimpleNamespace(name=on)
        return SimpleNamespace(key=key, count=2, device_type=device, is_user_annotation=False, **times)

    found = costliest([event("aten::mm", 3000), event("sgemm", 500, "CUDA"), event("aten::add", 1000)])
    assert found == {
        "cpu": [
            {"name": "aten::mm", "calls": 2, "self_ms": 3.0, "share_pct": 75.0},
            {"name": "aten::add", "calls": 2, "self_ms": 1.0, "share_pct": 25.0},
        ],
        "device": [{"name": "sgemm", "calls": 2, "self_ms": 0.5, "share_pct": 100.0}],
    }
