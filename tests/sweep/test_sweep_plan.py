"""The plan of a sweep: values of the keys, names of the runs, random settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.config import load_config
from disttrain.errors import UsageError
from disttrain.sweep.folder import SweepFolder
from disttrain.sweep.plan import Plan, check_same, make_plan, plan_runs
from kit.configs import BASE


def names(*overrides: str, **how: int) -> list[str]:
    return [run.name for run in plan_runs(overrides, **how)]


def plan(*overrides: str, text: str = BASE) -> tuple[Plan, list]:
    return make_plan(text, "a.yaml", overrides, draws=None, draw_seed=0, check=lambda config: None)


def test_every_combination_in_the_order_of_the_keys() -> None:
    runs = plan_runs(["optim.lr=0.05,0.1", "train.epochs=3", "seed=0..2"])
    assert [run.name for run in runs] == [
        f"optim.lr={lr},seed={seed}" for lr in ("0.05", "0.1") for seed in (0, 1, 2)
    ]
    assert runs[1].values == {"optim.lr": "0.05", "seed": "1"}
    assert runs[1].overrides == ("optim.lr=0.05", "train.epochs=3", "seed=1")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        (" a , b", ["a", "b"]),
        ("-1..1", ["-1", "0", "1"]),
        ("0..2,7", ["0", "1", "2", "7"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("[1,[2,3]],null", ["[1,[2,3]]", "null"]),
        ("'a,b','it''s, c',\"d\\\",e\"", ["'a,b'", "'it''s, c'", '"d\\",e"']),
        ("{a: 1, b: 2},{a: [1, 2]}", ["{a: 1, b: 2}", "{a: [1, 2]}"]),
        ("'0..4',x", ["'0..4'", "x"]),
        ("uniform(1,2),x", ["uniform(1,2)", "x"]),
    ],
)
def test_the_values_of_a_key(text: str, values: list[str]) -> None:
    assert [run.overrides for run in plan_runs([f"key={text}"])] == [(f"key={value}",) for value in values]


@pytest.mark.parametrize("text", ["[1,2]", "{a: 1, b: 2}", "'a,b'", "0.5", "", "1...2", "a..b"])
def test_one_value_is_not_swept(text: str) -> None:
    assert [run.overrides for run in plan_runs([f"key={text}", "seed=1,2"])] == [
        (f"key={text}", "seed=1"),
        (f"key={text}", "seed=2"),
    ]


@pytest.mark.parametrize(
    ("overrides", "how", "words"),
    [
        (["optim.lr=0.1"], {}, "nothing to sweep"),
        (["seed=1,2", "seed=3"], {}, "seed is given twice"),
        (["seed=1,2,1"], {}, "seed=1,2,1: 1 is given twice"),
        (["seed=4..0"], {}, "seed=4..0: 4..0 has no numbers"),
        (["seed=1,,2"], {}, "no value between two commas"),
        (["seed"], {}, "'seed' is not an override"),
        (["seed=0..99", "optim.lr=1..30"], {}, "3,000 runs are more than 2,000"),
        (["seed=0..10000000000"], {}, "more than 2,000 numbers"),
        (["optim.lr=uniform(0,1)"], {}, "a range needs --draws"),
        (["optim.lr=uniform(0,1,2)"], {"draws": 2}, "a range has two numbers"),
        (["optim.lr=uniform(2,1)"], {"draws": 2}, "the first number must be below the second"),
        (["optim.lr=loguniform(0,1)"], {"draws": 2}, "must be above 0 and below"),
        (["optim.lr=uniform(0,inf)"], {"draws": 2}, "must be below"),
        (["seed=0..4"], {"draws": 2}, "--draws needs a list or a range"),
        (["optim.lr=1,2"], {"draws": 3}, "there are only 2 combinations"),
        (["optim.lr=uniform(0.1,0.1001)"], {"draws": 9}, "too narrow"),
    ],
)
def test_contradictions_give_one_line(overrides: list[str], how: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_runs(overrides, **how)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_random_settings_each_with_every_seed() -> None:
    overrides = ("optim.lr=loguniform(1e-4,1)", "seed=0,1", "optim.name=sgd,adam")
    runs = plan_runs(overrides, 500)
    assert len(runs) == 1000
    for zero, one in zip(runs[::2], runs[1::2], strict=True):
        assert zero.values | {"seed": "1"} == one.values
    rates = [float(run.values["optim.lr"]) for run in runs[::2]]
    assert len(set(rates)) > 490
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert 220 < sum(rate < 1e-2 for rate in rates) < 280, "uniform in the logarithm"
    assert {run.values["optim.name"] for run in runs} == {"sgd", "adam"}


def test_more_draws_add_to_those_before() -> None:
    overrides = ("optim.lr=uniform(0.01,1)", "seed=0..1")
    assert names(*overrides, draws=5) == names(*overrides, draws=8)[:10]
    assert names(*overrides, draws=5) != names(*overrides, draws=5, draw_seed=1)


def test_draws_from_lists_alone_do_not_repeat() -> None:
    found = names("optim.lr=1,2,3", "optim.name=sgd,adam", draws=6)
    assert sorted(found) == sorted(names("optim.lr=1,2,3", "optim.name=sgd,adam"))


def test_a_file_system_can_hold_the_names() -> None:
    assert names("model.name=torchvision:resnet18,my/net") == [
        "model.name=torchvision_resnet18", "model.name=my_net",
    ]  # fmt: skip
    alike = names("model.name=a:b,a/b")
    assert len(set(alike)) == 2
    assert alike[1].startswith("model.name=a_b-")
    long = names(*(f"key_{i}={'x' * 30},{'y' * 30}" for i in range(8)))
    assert len(set(long)) == 256
    assert max(map(len, long)) < 200


def test_a_login_is_not_shown() -> None:
    (run, _) = plan_runs(["data.root=https://me:pw@host/a,https://host/b"])
    assert "pw" not in run.name + str(run.values)


def test_all_mistakes_in_the_configs_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        plan("optim.lr=0.1,-1,x", "seed=0..4", "train.epoch=3")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "did you mean train.epochs?" in lines[0]
    assert "override 'optim.lr=-1'" in lines[1]
    assert "override 'optim.lr=x'" in lines[2]


def test_the_same_settings_in_other_words_are_refused() -> None:
    with pytest.raises(UsageError, match="are the same settings"):
        plan("optim.lr=0.1,1e-1")


def test_a_sweep_goes_on_with_more_runs_but_not_with_other_ones() -> None:
    old, _ = plan("optim.lr=0.1,0.2", "train.epochs=3")
    check_same("sweep", old, *plan("optim.lr=0.05,0.2,0.1", "train.epochs=3"))
    check_same("sweep", old, *plan("optim.lr=0.1,0.2", "train.epochs=4", "monitor.log_every_steps=7"))
    with pytest.raises(UsageError) as caught:
        check_same("sweep", old, *plan("optim.lr=0.1,0.3", "train.epochs=3", "train.batch_size=32"))
    assert str(caught.value).splitlines() == [
        "sweep: holds another sweep:",
        "  train.batch_size: 64 -> 32",
        "  optim.lr=0.2: is not in the new plan",
        "undo the change, or choose another --sweep-dir",
    ]


def test_the_command_at_the_end_is_that_of_the_config_file(tmp_path: Path) -> None:
    text = BASE + 'monitor: {on_end: \'curl "https://x.org/hook?token=abc" -H "Authorization: d"\'}\n'
    plan, configs = make_plan(text, "c.yaml", ["seed=0,1"], draws=None, draw_seed=0, check=lambda _: None)
    folder = SweepFolder(tmp_path)
    folder.write(plan, text)
    assert load_config(folder.config).monitor.on_end == configs[0].monitor.on_end
    assert "abc" not in folder.plan.read_text()
    check_same("sweep", folder.read(), plan, configs)
    with pytest.raises(UsageError, match=r"monitor\.on_end: .* config file only"):
        plan_runs(["seed=0,1", "monitor.on_end=curl x"])
