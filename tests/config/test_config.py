"""The config file: YAML 1.2, overrides, and one clear line for every mistake."""

import itertools

import pytest

from disttrain.config import differences
from kit.configs import BASE, load, mistake

SETTINGS = {
    "name": "tiny",
    "data.name": "digits",
    "model.name": "cnn_mnist",
    "train.epochs": "2",
    "train.batch_size": "64",
    "optim.lr": "0.1",
}


# --- Checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"),
        ("optimizer", "optim"),
        ("dataset", "data"),
        ("learning_rate", "optim.lr"),
        ("train.grad_accum_steps", "train.accumulate"),
        ("data.drop_last", "data.remainder"),
        ("schedule.min_lr_ratio", "schedule.final_ratio"),
        ("train.epoch", "train.epochs"),
        ("train.lr", "optim.lr"),
        ("train.mixed_precision", "train.precision"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.momentun", "optim.momentum"),
        ("data.cahce", "data.cache"),
        ("monitor.batch_size", "train.batch_size"),
        ("eval.zzz", None),
        ("zzz", None),
    ],
)
def test_unknown_keys_name_the_nearest_one(file, key, nearest):
    override = f"{key}=1"
    hint = f"; did you mean {nearest}?" if nearest else ""
    assert mistake(file, override) == f"override {override!r}: {key}: unknown key{hint}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "sede: 1\n", "tiny.yaml:9: sede: unknown key; did you mean seed?"),
        (
            BASE.replace("  epochs: 2\n", "  epochs: 2\n  emma: 1\n"),
            "tiny.yaml:7: train.emma: unknown key; did you mean train.ema?",
        ),
        (
            BASE.replace("lr: 0.1}", "lr: 0.1,\n  nestrov: true}"),
            "tiny.yaml:9: optim.nestrov: unknown key; did you mean optim.nesterov?",
        ),
    ],
)
def test_unknown_keys_in_the_file_name_their_line(file, text, message):
    assert mistake(file, text=text) == message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.epochs", "2.5", "expected a whole number, got 2.5"),
        ("train.epochs", "2.0", "expected a whole number, got 2.0"),
        ("train.epochs", "true", "expected a whole number, got true"),
        ("train.epochs", "two", "expected a whole number, got 'two'"),
        ("train.epochs", "null", "expected a whole number, got null"),
        ("train.epochs", "0", "must be greater than 0, got 0"),
        ("train.epochs", "{a: 1}", "expected a whole number, got {'a': 1}"),
        ("seed", "-1", "must be greater than or equal to 0, got -1"),
        ("optim.lr", "fast", "expected a number, got 'fast'"),
        ("optim.lr", "true", "expected a number, got true"),
        ("optim.lr", "0", "must be greater than 0, got 0"),
        ("optim.lr", "9" * 399, f"expected a number, got {'9' * 77}..."),
        ("train.label_smoothing", "1.0", "must be less than 1, got 1.0"),
        ("train.ema", "1", "must be less than 1, got 1"),
        (
            "train.class_weights",
            "even",
            "expected balanced, null or a list with a number per class, got 'even'",
        ),
        ("augment.flip", "1", "expected true, false or alternating, got 1"),
        (
            "augment.flip",
            "yes",
            "expected true, false or alternating, got 'yes' "
            "(YAML 1.2 reads yes as text; write true or false)",
        ),
        ("train.compile", "maybe", "expected auto, true or false, got 'maybe'"),
        ("train.compile", "1", "expected auto, true or false, got 1"),
        ("name", "5", "expected text, got 5 (put it in quotes)"),
        ("name", "null", "expected text, got null"),
        (
            "name",
            "a/b",
            "expected letters, digits, '.', '_' and '-', with a letter or digit first, got 'a/b'",
        ),
        (
            "data.name",
            "..",
            "expected letters, digits, '.', '_' and '-', with a letter or digit first, got '..'",
        ),
        ("data.cache", "hots", "expected 'auto', 'device', 'host' or 'none', got 'hots'; did you mean host?"),
        ("data.cache", "no", "expected 'auto', 'device', 'host' or 'none', got 'no'; did you mean none?"),
        ("optim.name", "sdg", "expected 'sgd', 'adam', 'adamw' or 'muon', got 'sdg'; did you mean sgd?"),
        ("optim.name", "lion", "expected 'sgd', 'adam', 'adamw' or 'muon', got 'lion'"),
        ("schedule.milestones", "3", "expected a list, got 3"),
        ("optim.betas", "0.9", "expected two numbers, such as [0.9, 0.999], got 0.9"),
        ("optim.betas", "[0.9, 0.9, 0.9]", "expected two numbers, such as [0.9, 0.999], got [0.9, 0.9, 0.9]"),
        ("augment", "3", "expected a section (key: value), got 3"),
        ("augment", "null", "expected a section (key: value), got null"),
        ("model.args", "[1]", "expected a section (key: value), got [1]"),
    ],
)
def test_wrong_values_in_the_file_and_in_an_override(file, key, value, expected):
    override = f"{key}={value}"
    assert mistake(file, override) == f"override {override!r}: {key}: {expected}"
    text, lines = block_style(SETTINGS | {key: value})
    assert mistake(file, text=text) == f"tiny.yaml:{lines[key]}: {key}: {expected}"


def block_style(settings):
    """Returns YAML with one line for every dotted key, and the line of each."""
    lines, numbers = [], {}
    for name, keys in itertools.groupby(sorted(settings), key=lambda key: key.partition(".")[0]):
        for key in keys:
            if "." in key and f"{name}:" not in lines:
                lines.append(f"{name}:")
            lines.append(
                f"  {key.partition('.')[2]}: {settings[key]}" if "." in key else f"{key}: {settings[key]}"
            )
            numbers[key] = len(lines)
    return "\n".join(lines) + "\n", numbers


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=[0.9]", "optim.betas.1 is missing; add it"),
        ("optim.betas=[0.9, high]", "optim.betas.1: expected a number, got 'high'"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: must be less than 1, got 1"),
        ("schedule.milestones=[1, x]", "schedule.milestones.1: expected a number, got 'x'"),
        ("optim.groups=[{parameters: a, lr: x}]", "optim.groups.0.lr: expected a number, got 'x'"),
        ("optim.groups=[{lr: 1.0}]", "optim.groups.0.parameters is missing; add it"),
        (
            "optim.groups=[{parameters: a, momentun: 1}]",
            "optim.groups.0.momentun: unknown key; did you mean optim.groups.momentum?",
        ),
        (
            "optim.groups=[{parameters: a, schedule: {nam: step}}]",
            "optim.groups.0.schedule.nam: unknown key; did you mean optim.groups.schedule.name?",
        ),
        (
            "monitor.trackers=[wandbb]",
            "monitor.trackers.0: expected 'tensorboard', 'wandb', 'mlflow' or 'trackio', got 'wandbb'; "
            "did you mean wandb?",
        ),
    ],
)
def test_wrong_items_of_lists_are_named(file, override, message):
    assert mistake(file, override) == f"override {override!r}: {message}"


def test_items_of_a_list_name_their_line(file):
    lines = "schedule:\n  name: step\n  milestones:\n    - 1\n    - x\n"
    assert mistake(file, add=lines) == "tiny.yaml:13: schedule.milestones.1: expected a number, got 'x'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("  epochs: 2\n", ""), "tiny.yaml:5: train.epochs is missing; add it"),
        (BASE.replace("name: tiny\n", ""), "tiny.yaml: name is missing; add it"),
        (BASE.replace("optim: {name: sgd, lr: 0.1}\n", ""), "tiny.yaml: optim is missing; add it"),
    ],
)
def test_missing_keys(file, text, message):
    assert mistake(file, text=text) == message


def test_all_mistakes_are_reported_at_once(file):
    text = BASE.replace("epochs: 2", "epochs: 0").replace("lr: 0.1", "lr: x")
    assert mistake(file, "data.cache=hots", "sede=1", text=text).splitlines() == [
        "override 'data.cache=hots': data.cache: expected 'auto', 'device', 'host' or 'none', got 'hots'; "
        "did you mean host?",
        "tiny.yaml:6: train.epochs: must be greater than 0, got 0",
        "tiny.yaml:8: optim.lr: expected a number, got 'x'",
        "override 'sede=1': sede: unknown key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=adam", "optim.momentum=0.9"], "optim.momentum: adam does not use it; remove it"),
        (["optim.name=adamw", "optim.nesterov=false"], "optim.nesterov: adamw does not use it; remove it"),
        (["optim.betas=[0.9, 0.99]"], "optim.betas: sgd does not use it; remove it"),
        (
            ["train.focal_gamma=2.0"],
            "train.focal_gamma: train.loss = cross_entropy does not use it; remove it, or choose focal",
        ),
        (["optim.momentum=0", "optim.nesterov=true"], "optim.nesterov: needs optim.momentum above 0"),
        (
            ["schedule.warmup_epochs=3"],
            "schedule.warmup_epochs: 3 is longer than train.epochs = 2; shorten it",
        ),
        (
            ["schedule.name=step"],
            "schedule.milestones: schedule.name = step needs it, for example [30, 40]",
        ),
        (
            ["schedule.name=cosine", "schedule.milestones=[1]"],
            "schedule.milestones: schedule.name = cosine does not use it; remove it, or choose step",
        ),
        (
            ["schedule.name=linear", "schedule.end_epoch=1", "schedule.warmup_epochs=1.5"],
            "schedule.end_epoch: 1 is before the end of the warm-up, 1.5; raise it",
        ),
        (
            ["schedule.end_epoch=1"],
            "schedule.end_epoch: schedule.name = constant does not use it; remove it",
        ),
        (["optim.adjust_lr=original"], "optim.adjust_lr: sgd does not use it; remove it"),
        (["optim.normalize_weights=true"], "optim.normalize_weights: sgd does not use it; remove it"),
        (
            ["optim.groups=[{parameters: a}, {parameters: b, name: adam, momentum: 0.5}]"],
            "optim.groups.1.momentum: adam does not use it; remove it",
        ),
        (
            ["optim.groups=[{parameters: a, schedule: {name: step}}]"],
            "optim.groups.0.schedule.milestones: optim.groups.0.schedule.name = step needs it, "
            "for example [30, 40]",
        ),
        (
            ["optim.groups=[{parameters: '('}]"],
            "optim.groups.0.parameters: not a regular expression: missing ), unterminated subpattern at "
            "position 0",
        ),
        (["train.accumulate=65"], "train.accumulate: 65 is more than train.batch_size = 64; lower it"),
    ],
)
def test_conflicts_between_settings(file, overrides, message):
    assert mistake(file, *overrides).endswith(f": {message}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=muon", "optim.momentum=0.9", "optim.nesterov=true", "optim.betas=[0.9, 0.99]"],
        ["schedule.warmup_epochs=2"],
        ["schedule.name=step", "schedule.milestones=[1, 1.5]"],
        ["train.accumulate=64"],
        ["optim.lr=1", "train.ema=0.5"],
        ["train.compile=true"],
        ["augment.flip=alternating", "train.channels_last=false", "eval.tta=multi_view"],
        ["optim.groups=[{parameters: a, name: muon, momentum: 0.5, adjust_lr: original}]"],
    ],
)
def test_what_is_just_allowed(file, overrides):
    changed = differences(load(file), load(file, *overrides))
    assert {change.partition(":")[0] for change in changed} == {text.partition("=")[0] for text in overrides}


def test_a_config_cannot_be_changed(file):
    with pytest.raises(ValueError, match="frozen"):
        load(file).seed = 3


# --- Overrides ------------------------------------------------------------------------------------


def test_overrides_change_and_add_settings(file):
    config = load(
        file,
        "optim.lr=1e-2",
        "schedule.name=step",
        "schedule.milestones=[1, 1.5]",
        "train.grad_clip=1",
        "train.grad_clip=null",
        "model.args.depth.width=3",
        "model.args.activation=tanh",
        "model.name=torchvision:resnet18",
        "data.root=a=b",
        "name = other",
    )
    assert (config.optim.lr, config.schedule.milestones) == (0.01, [1, 1.5])
    assert config.train.grad_clip is None
    assert config.model.args == {"depth": {"width": 3}, "activation": "tanh"}
    assert (config.model.name, config.data.root, config.name) == ("torchvision:resnet18", "a=b", "other")
    assert (config.optim.name, config.data.name) == ("sgd", "digits")


def test_an_override_fills_a_section_that_is_empty_in_the_file(file):
    assert load(file, "augment.flip=true", add="augment:\n").augment.flip


def test_the_last_override_wins(file):
    assert load(file, "seed=1", "seed=2").seed == 2


def test_a_section_can_be_replaced_as_a_whole(file):
    config = load(file, "optim={name: adam, lr: 0.5}", add="seed: 3\n")
    assert (config.optim.name, config.optim.lr, config.seed) == ("adam", 0.5, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data={name: 7}", "data.name: expected text, got 7 (put it in quotes)"),
        ("data={}", "data.name is missing; add it"),
        ("schedule.milestones=[1, x]", "schedule.milestones.1: expected a number, got 'x'"),
    ],
)
def test_a_mistake_in_a_replaced_section_names_the_override_not_the_file(file, override, message):
    lines = "schedule: {name: step, milestones: [1, 2]}\n"
    assert mistake(file, override, add=lines) == f"override {override!r}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim=null", "override 'optim=null': optim: expected a section (key: value), got null"),
        ("optim.lr", "'optim.lr' is not an override; write key=value, for example optim.lr=0.1"),
        ("=3", "'=3' is not an override; write key=value, for example optim.lr=0.1"),
        ("optim.=3", "'optim.=3' is not an override; write key=value, for example optim.lr=0.1"),
        (".lr=3", "'.lr=3' is not an override; write key=value, for example optim.lr=0.1"),
        ("optim=3", "override 'optim=3': optim is a section; set one of its keys, such as optim.name=..."),
        ("optim=", "override 'optim=': optim is a section; set one of its keys, such as optim.name=..."),
        ("optim.lr.x=3", "override 'optim.lr.x=3': optim.lr is a value, not a section"),
        ("optim.lr=[1", "override 'optim.lr=[1': not valid YAML: expected ',' or ']', "
                       "but got '<stream end>'"),
        ("data={a: 1, a: 2}", "override 'data={a: 1, a: 2}': a is given twice"),
        ("name=*x", "override 'name=*x': anchors, aliases and tags (& * !) are not allowed; "
                    "write the value out or quote it"),
        ("name=\udcff", "override 'name=\\udcff': not valid YAML: a control character; remove it"),
    ],
)  # fmt: skip
def test_malformed_overrides(file, override, message):
    assert mistake(file, override) == message


GROUPS = "optim: {name: sgd, lr: 0.1, groups: [{parameters: .*bias, lr: 0.2}, {parameters: .*bn.*, lr: 0.3}]}"
TWO_GROUPS = BASE.replace("optim: {name: sgd, lr: 0.1}", GROUPS)


def test_overrides_reach_into_lists(file):
    config = load(file, "optim.groups.1.lr=0.5", text=TWO_GROUPS)
    assert [group.lr for group in config.optim.groups] == [0.2, 0.5]


@pytest.mark.parametrize("key", ["optim.groups.2.lr", "optim.groups.first.lr"])
def test_an_override_of_an_item_that_a_list_does_not_have(file, key):
    said = "optim.groups is a list of 2; give a position below, such as optim.groups.0"
    assert said in mistake(file, f"{key}=1", text=TWO_GROUPS)
