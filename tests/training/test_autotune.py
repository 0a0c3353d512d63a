"""What is chosen for the user: the rules, when it is measured, and that nothing of the run changes by it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.config import TrainConfig
from disttrain.training import autotune
from disttrain.training.autotune import Chosen, Settings, Workload, bucket_mib, choose
from disttrain.units import time_text

CPU = torch.device("cpu")


def config(**options: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=8, **options)


def work(passes: int = 10**9, model: nn.Module | None = None) -> Workload:
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2)
    )
    return Workload(model, batch=8, image=(1, 6, 6), classes=2, passes=passes, world_size=1)


def choice(passes: int = 10**9, **options: Any) -> Chosen:
    return choose(config(**options), work(passes), threads=4)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Gives every setting the seconds of `cost`, and lists what was measured."""
    measured: list[Settings] = []

    def seconds(probe: Any, settings: Settings) -> float:
        measured.append(settings)
        probe.spent_s += 1.0
        return cost(settings)

    monkeypatch.setattr(autotune.Probe, "seconds", seconds)
    return measured


def cost(settings: Settings) -> float:
    """NCHW on two threads is best."""
    return {True: 1.0, False: 0.4}[settings.channels_last] * {4: 1.0, 2: 0.7, 1: 1.5}[settings.threads]


def test_the_fastest_settings_are_chosen_and_the_reason_names_the_times(timed: list[Settings]) -> None:
    found = choice()
    assert found.settings == Settings("fp32", channels_last=False, compiled=False, threads=2)
    assert str(found.reasons["channels_last"]).startswith(
        "false: fp32, channels_last, 4 threads: 1 s a pass; fp32,"
    )
    assert str(found.reasons["threads"]).startswith("2: ")
    assert str(found.reasons["precision"]) == "fp32: a CPU"
    assert str(found.reasons["compile"]) == "false: a CPU, where it makes CNNs slower"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "bf16"}, Settings("bf16", False, False, 2)),
        ({"channels_last": True}, Settings("fp32", True, False, 4)),
        ({"compile": True}, Settings("fp32", False, True, 2)),
    ],
)
def test_what_the_user_sets_is_kept(
    timed: list[Settings], options: dict[str, Any], expected: Settings
) -> None:
    found = choice(**options)
    assert found.settings == expected
    (key,) = options
    assert str(found.reasons[key]).partition(": ")[2].startswith(f"train.{key}")
    assert {settings.precision for settings in timed} <= {found.settings.precision}


def test_nothing_is_measured_where_everything_is_set(timed: list[Settings]) -> None:
    found = choice(precision="bf16", channels_last=True, compile=False)
    assert timed == []
    assert found.settings == Settings("bf16", True, False, 4)


SAVED = {"precision": "bf16", "channels_last": False, "compiled": False, "threads": 2, "device": "cpu"}


def test_a_run_that_goes_on_keeps_its_settings_and_measures_nothing(timed: list[Settings]) -> None:
    resumed = choose(config(), work(), threads=4, saved=SAVED | {"world_size": 1})
    assert resumed.settings == Settings("bf16", channels_last=False, compiled=False, threads=2)
    assert timed == []
    assert str(resumed.reasons["precision"]) == "bf16: as in the checkpoint"
    assert str(resumed.reasons["channels_last"]) == "false: as in the checkpoint"
    assert str(resumed.reasons["threads"]) == "2: as in the checkpoint"


def test_a_run_that_goes_on_with_fewer_cores_takes_those_there_are() -> None:
    assert choose(config(), work(), threads=1, saved=SAVED | {"world_size": 1}).settings.threads == 1


def test_a_run_that_goes_on_on_other_ranks_keeps_its_arithmetic_alone(timed: list[Settings]) -> None:
    resumed = choose(config(), work(), threads=4, saved=SAVED | {"world_size": 3})
    assert resumed.settings.precision == "bf16"
    assert {settings.precision for settings in timed} == {"bf16"}
    assert {settings.channels_last for settings in timed} == {False, True}


def test_a_reproducible_run_measures_nothing(timed: list[Settings]) -> None:
    found = choice(reproducible=True)
    assert timed == []
    assert found.settings == Settings("fp32", True, False, 1)
    assert str(found.reasons["channels_last"]).startswith("true: train.reproducible: ")
    assert str(found.reasons["threads"]).startswith("1: train.reproducible: ")
    saved = SAVED | {"world_size": 3, "threads": 4}
    assert choose(config(reproducible=True), work(), threads=4, saved=saved).settings.threads == 1


def test_a_model_that_cannot_be_copied_is_not_measured() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError

    workload = work(model=nn.Sequential(nn.Flatten(), Stubborn(36, 2)))
    found = choose(config(), workload, threads=1)
    assert str(found.reasons["channels_last"]) == "true: cannot be measured: RuntimeError"


def test_settings_that_the_model_does_not_run_with_are_not_chosen() -> None:
    class Ordered(nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.is_contiguous(memory_format=torch.channels_last)
            return super().forward(images)

    model = nn.Sequential(Ordered(2, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    workload = replace(work(model=model), image=(2, 6, 6))
    found = choose(config(), workload, threads=1)
    assert found.settings.channels_last
    assert "fp32, channels_first, 1 thread: fails" in str(found.reasons["channels_last"])


def test_a_short_run_is_not_measured_further(timed: list[Settings]) -> None:
    found = choice(passes=59)
    assert len(timed) == 1
    assert found.settings == Settings("fp32", True, False, 4)
    assert str(found.reasons["channels_last"]) == "true: a run of about 59 s is too short to measure"


def test_measuring_ends_when_a_fiftieth_of_the_run_is_spent(timed: list[Settings]) -> None:
    choice(passes=150)  # of 1 s each: 3 s may be spent, of which each measurement here takes one
    assert len(timed) == 3


def test_a_gain_within_the_noise_changes_nothing(
    timed: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_autotune.cost", lambda settings: 1.0 if settings.channels_last else 0.98)
    assert choice().settings == Settings("fp32", True, False, 4)


@pytest.mark.parametrize(("first_s", "chosen"), [(0.93, False), (1.03, True)])
@pytest.mark.parametrize("disturbed", [True, False])
def test_settings_near_one_another_are_told_apart_in_turns(
    timed: list[Settings], monkeypatch: pytest.MonkeyPatch, first_s: float, chosen: bool, disturbed: bool
) -> None:
    """Something else takes a tenth of the machine while one of the two is measured for the first time."""

    def seconds(settings: Settings) -> float:
        first = timed.count(settings) == 1 and settings.channels_last is disturbed
        return (1.0 if settings.channels_last else first_s) * (1.1 if first else 1.0)

    monkeypatch.setattr("test_autotune.cost", seconds)
    found = choose(config(), work(), threads=1)
    assert found.settings.channels_last is chosen
    times = f"channels_last, 1 thread: 1 s a pass; fp32, channels_first, 1 thread: {time_text(first_s)}"
    assert times in str(found.reasons["channels_last"])
    assert len(timed) == 20
    assert timed[2:6] == [timed[1], timed[0], timed[0], timed[1]]


def test_settings_far_from_one_another_are_measured_once(timed: list[Settings]) -> None:
    choice()
    assert len(timed) == len(set(timed))


def test_autotuning_leaves_model_rng_and_threads_unchanged() -> None:
    workload = work()
    before = copy.deepcopy(workload.model.state_dict())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = choose(config(), workload, threads=threads)
    assert found.settings.precision == "fp32"
    assert " ms a pass" in str(found.reasons["channels_last"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    for name, value in workload.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_small_gradients_and_those_of_cpus_are_reduced_in_one_bucket() -> None:
    mib = 2**20 // 4
    for parameters, device in ((100 * mib, CPU), (3 * mib, torch.device("cuda"))):
        assert bucket_mib(parameters, device)[0] > parameters / mib
    assert bucket_mib(40 * mib, torch.device("cuda"))[0] == 10
    assert bucket_mib(4000 * mib, torch.device("cuda"))[0] == 25
