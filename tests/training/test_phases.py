"""The clock of the phases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import astuple
from torch import nn

from disttrain.heartbeat import Phase
from disttrain.training import phases as module
from disttrain.training.phases import Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def pass_through(phases: Phases, clock: SimpleNamespace, *stays: tuple[Phase, float]) -> None:
    for phase, seconds in stays:
        phases.enter(phase, 1)
        clock.now += seconds


def test_the_milliseconds_of_each_phase_are_the_means_of_the_steps(clock: SimpleNamespace) -> None:
    phases = Phases()
    step = [
        (Phase.DATA, 1.0),
        (Phase.TO_DEVICE, 0.125),
        (Phase.AUGMENT, 0.25),
        (Phase.COMPUTE, 4.0),
        (Phase.DATA, 2.0),
        (Phase.AUGMENT, 0.5),
        (Phase.COMPUTE, 5.0),
        (Phase.OPTIMIZE, 0.5),
    ]
    clock.now = 1000  # the start is no part of a step
    pass_through(phases, clock, *step, *step, (Phase.REPORT, 0.25))
    times = phases.take(2, nn.Identity())
    assert astuple(times) == (3000, 125, 750, 9000, 0, 500, 125, 0, 0)
    clock.now += 0.75  # the rest of the log point belongs to the next interval
    pass_through(phases, clock, *step, (Phase.SAVE, 2.0), (Phase.EVALUATE, 4.0), (Phase.REPORT, 1.0))
    times = phases.take(1, nn.Identity())
    assert astuple(times) == (3000, 125, 750, 9000, 0, 500, 1750, 4000, 2000)


class Event:
    """What a GPU does at a time of its own; `now` is that time."""

    now = 0.0
    made = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def test_on_a_gpu_a_step_between_two_log_points_is_timed_by_the_device(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(device=torch.device("cuda", 0))

    def step(number: int, *seconds: float) -> None:
        """Goes through a step with two passes, as slow on the device as said; the host takes 1 ms a phase."""
        passing = [Phase.DATA, Phase.TO_DEVICE, Phase.AUGMENT, Phase.COMPUTE, Phase.COMPUTE]
        for phase, on_device in zip([*passing, *passing, Phase.OPTIMIZE], seconds, strict=True):
            phases.enter(phase, number)
            clock.now += 0.001
            Event.now += on_device

    slow, fast = (1, 2, 3, 4, 8, 1, 2, 3, 4, 8, 16), [0.001] * 11
    number = 0
    # In the first interval the first step; then the one in the middle of as many steps as before, none where
    # there are fewer.
    for timed, steps, logging_s, factor in (
        (0, 5, 0.5, 1),
        (2, 6, 0.25, 2),
        (None, 2, 0.1, 2),
        (1, 2, 0.1, 3),
    ):
        made = Event.made
        for place in range(steps):
            number += 1
            step(number, *([factor * each for each in slow] if place == timed else fast))
        phases.enter(Phase.REPORT, number)
        clock.now += logging_s
        Event.now += 100  # the device waits for the host
        times = phases.take(steps, nn.Identity())
        assert astuple(times)[:6] == pytest.approx([1000 * factor * each for each in (2, 4, 6, 24, 0, 16)])
        assert times.logging == pytest.approx(1000 * logging_s / steps)
        assert Event.made == made + (
            0 if timed is None else 12
        )  # one for each phase of the step, and its end


def test_on_a_gpu_what_the_host_waits_for_the_device_is_no_logging(clock: SimpleNamespace) -> None:
    for device, logging_s in (("cuda", 0.25), ("cpu", 8.25)):
        phases = Phases(device=torch.device(device))
        phases.enter(Phase.REPORT, 1)
        clock.now += 8
        phases.synchronized()
        clock.now += 0.25
        assert phases.take(1, nn.Identity()).logging == 1000 * logging_s


def test_waiting_for_others_is_no_computing(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "exposed_communication_ms", lambda model: 1500)
    phases = Phases()
    pass_through(phases, clock, (Phase.COMPUTE, 4.0), (Phase.REPORT, 0.0))
    times = phases.take(1, nn.Identity())
    assert (times.compute, times.communication) == (2500, 1500)


def test_every_phase_is_a_beat() -> None:
    beats: list[Any] = []
    phases = Phases(lambda *beat: beats.append(beat))
    phases.enter(Phase.DATA, 3, 1)
    phases.enter(Phase.COMPUTE, 3)
    assert beats == [(Phase.DATA, 3, 1), (Phase.COMPUTE, 3, 0)]
