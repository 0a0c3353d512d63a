"""The config file: YAML 1.2, overrides, and one clear line for every mistake."""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.config import Config, differences, dump_config, json_schema, load_config
from disttrain.errors import UsageError

BASE = """\
name: tiny
data:
  name: digits
model: {name: cnn_mnist}
train:
  epochs: 2
  batch_size: 64
optim: {name: sgd, lr: 0.1}
"""


SETTINGS = {
    "name": "tiny",
    "data.name": "digits",
    "model.name": "cnn_mnist",
    "train.epochs": "2",
    "train.batch_size": "64",
    "optim.lr": "0.1",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE)
    return path


def load(file, *overrides, text=None, add=""):
    """Loads BASE, or another text, or BASE with more lines, under overrides."""
    file.write_text((BASE if text is None else text) + add)
    return load_config(file, overrides)


def mistake(file, *overrides, **content):
    """Returns the message for a config with mistakes; the path is shortened to its name."""
    with pytest.raises(UsageError) as caught:
        load(file, *overrides, **content)
    return str(caught.value).replace(f"{file.parent}/", "")


def argument(file, yaml):
    """Returns what a YAML value is read as, through a setting that takes anything."""
    return load(file, f"model.args.x={yaml}").model.args["x"]


# --- YAML 1.2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("1e-3", 0.001),
        ("5.0e-4", 0.0005),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1.5E+3", 1500.0),
        ("0.0", 0.0),
        ("12", 12),
        ("-7", -7),
        ("+7", 7),
        ("010", 10),
        ("-010", -10),
        ("0o10", 8),
        ("0x10", 16),
        ("0xfF", 255),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("NULL", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_follow_yaml_1_2(file, yaml, value):
    read = argument(file, yaml)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "yaml", ["no", "No", "on", "off", "yes", "y", "1e", "1_000", "12:30:00", "2001-01-01", "0b11", "tRue",
             "<<", "-0x10", "+", ".", "=", "nil", "e5", "0o9", "0xg", "inf", "nan"]
)  # fmt: skip
def test_everything_else_stays_text(file, yaml):
    assert argument(file, yaml) == yaml


@pytest.mark.parametrize("yaml", ["'1e-3'", '"null"', "'true'", "'010'", '"~"', "''"])
def test_quoted_scalars_are_text(file, yaml):
    assert argument(file, yaml) == yaml[1:-1]


@pytest.mark.parametrize("yaml", [".inf", "-.INF", ".nan", "1e400"])
def test_numbers_that_are_not_finite_are_refused_everywhere(file, yaml):
    override = f"model.args.x={yaml}"
    assert mistake(file, override) == f"override {override!r}: {yaml} is not a finite number"
    text = BASE.replace("lr: 0.1", f"lr: {yaml}")
    assert mistake(file, text=text) == f"tiny.yaml:8: optim.lr: {yaml} is not a finite number"


def test_a_byte_order_mark_is_no_mistake(file):
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_config(file).name == "tiny"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("train: {}\n", "tiny.yaml:9: train is given twice (also on line 5)"),
        ("eval: {tta: none,\n tta: flip}\n", "tiny.yaml:10: eval.tta is given twice (also on line 9)"),
        ("eval: &e {tta: none}\n", "tiny.yaml:9: anchors, aliases and tags"),
        ("eval: *e\n", "tiny.yaml:9: anchors, aliases and tags"),
        ("seed: !!int 3\n", "tiny.yaml:9: anchors, aliases and tags"),
        ("eval:\n  <<: {tta: none}\n", "tiny.yaml:10: a key must be a plain name"),
        ("? [seed]\n: 3\n", "tiny.yaml:9: a key must be a plain name"),
        ("---\nname: other\n", "tiny.yaml:9: a second document; keep one"),
        ("eval: [1,\n", "tiny.yaml:10: not valid YAML: "),
        ("eval: a: b\n", "tiny.yaml:9: not valid YAML: "),
        ("\tseed: 1\n", "tiny.yaml:9: not valid YAML: "),
        ("seed: 'x\n", "tiny.yaml:10: not valid YAML: "),
        ("seed: '\0'\n", "tiny.yaml:9: not valid YAML: a control character"),
        ("seed: " + "9" * 401, "tiny.yaml:9: seed: a number of 401 digits is too long"),
        ("eval: " + "[" * 3000, "tiny.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_yaml_that_is_refused_names_its_line(file, lines, message):
    assert mistake(file, add=lines).startswith(message)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "- a\n", "tiny\n", "3\n"])
def test_a_file_without_sections(file, text):
    assert mistake(file, text=text) == (
        "tiny.yaml: expected the sections of an experiment (data:, model:, train:, ...)"
    )


def test_a_file_that_is_not_utf_8(file):
    file.write_bytes(b"name: \xff\n")
    with pytest.raises(UsageError, match=r"tiny\.yaml: is not UTF-8 text; save it as UTF-8$"):
        load_config(file)


def test_a_folder_instead_of_a_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read: Is a directory$"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("tyni.yaml", "tiny.yaml"),
        ("tiny.yml", "tiny.yaml"),
        ("tiny", "tiny.yaml"),
        ("quite_other.yaml", None),
    ],
)
def test_a_missing_file_suggests_its_neighbour(file, wanted, hint):
    path = file.parent / wanted
    with pytest.raises(UsageError) as caught:
        load_config(path)
    suggestion = f"; did you mean {file.parent / hint}?" if hint else ""
    assert str(caught.value) == f"{path}: no such config file{suggestion}"


def test_a_missing_folder():
    with pytest.raises(UsageError, match=r"nowhere/a\.yaml: no such config file$"):
        load_config(Path("nowhere/a.yaml"))


# --- Checks -----------------------------------------------------------------------------------------


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
        (["optim.name=adam", "optim.momentum=0.9"], "optim.momentum: adam has none; remove it"),
        (["optim.name=adamw", "optim.nesterov=false"], "optim.nesterov: adamw has none; remove it"),
        (["optim.betas=[0.9, 0.99]"], "optim.betas: sgd has none; remove it"),
        (["optim.momentum=0", "optim.nesterov=true"], "optim.nesterov: needs optim.momentum above 0"),
        (
            ["schedule.warmup_epochs=3"],
            "schedule.warmup_epochs: 3 is longer than train.epochs = 2; shorten it",
        ),
        (
            ["schedule.name=step"],
            "schedule.milestones: needed by schedule.name = step, for example [30, 40]",
        ),
        (
            ["schedule.name=cosine", "schedule.milestones=[1]"],
            "schedule.milestones: schedule.name = cosine has none; remove it or choose step",
        ),
        (
            ["schedule.name=linear", "schedule.end_epoch=1", "schedule.warmup_epochs=1.5"],
            "schedule.end_epoch: 1 is before the end of the warm-up, 1.5; move it",
        ),
        (
            ["schedule.end_epoch=1"],
            "schedule.end_epoch: schedule.name = constant has none; remove it",
        ),
        (["optim.adjust_lr=original"], "optim.adjust_lr: sgd has none; remove it"),
        (["optim.normalize_weights=true"], "optim.normalize_weights: sgd has none; remove it"),
        (
            ["optim.groups=[{parameters: a}, {parameters: b, name: adam, momentum: 0.5}]"],
            "optim.groups.1.momentum: adam has none; remove it",
        ),
        (
            ["optim.groups=[{parameters: a, schedule: {name: step}}]"],
            "optim.groups.0.schedule.milestones: needed by optim.groups.0.schedule.name = step, "
            "for example [30, 40]",
        ),
        (
            ["optim.groups=[{parameters: '('}]"],
            "optim.groups.0.parameters: not a regular expression: missing ), unterminated subpattern at "
            "position 0",
        ),
        (["train.accumulate=65"], "train.accumulate: 65 parts of a batch of 64; make it smaller"),
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


# --- Overrides --------------------------------------------------------------------------------------


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


# --- Writing ----------------------------------------------------------------------------------------

_LIKE_SCALARS = ["no", "on", "1e-3", "null", "~", "010", "0o10", "0x10", ".5", "true", "", "<<", "=", "- a",
                 "a: b", "#", "&a", "*a", "!a", "%", "@", "`", "{", "[", "'", '"', "1_000", ".inf", "\n",
                 " x ", "2001-01-01", "12:30", "\x85", "\u2028", "é", "---", "...", "a\n\nb\n", "?",
                 ]  # fmt: skip
_texts = st.sampled_from(_LIKE_SCALARS) | st.text(max_size=20)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_positive = st.floats(min_value=1e-300, max_value=1e300)
_fractions = st.floats(0, 1, exclude_max=True)
_counts = st.integers(1, 10**6)
_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | _finite | _texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(_texts, children, max_size=3),
    max_leaves=6,
)


def section(required=(), **optional):
    """Generates a mapping of some of the keys."""
    required = dict(required)
    return st.fixed_dictionaries(required, optional=optional)


def _optims():
    common = {"weight_decay": st.floats(0, 10)}
    momentum = {"momentum": st.none() | st.floats(0.1, 0.99), "nesterov": st.none() | st.booleans()}
    betas = {"betas": st.none() | st.lists(_fractions, min_size=2, max_size=2)}
    settings_of = {
        "sgd": momentum,
        "adam": betas,
        "adamw": betas,
        "muon": momentum | betas,
    }
    return st.one_of(
        section({"name": st.just(name), "lr": _positive}, **common, **own)
        for name, own in settings_of.items()
    )


def _schedules():
    ratio = {"final_ratio": st.floats(0, 1), "warmup_epochs": st.none() | st.floats(0, 1)}
    plain = section({"name": st.sampled_from(["constant", "cosine", "linear", "one_cycle"])}, **ratio)
    milestones = st.lists(_positive, min_size=1, max_size=4)
    return plain | section({"name": st.just("step"), "milestones": milestones}, gamma=st.floats(0.01, 1))


_documents = section(
    {
        "name": _names,
        "data": section(
            {"name": _names},
            root=st.none() | _texts,
            cache=st.sampled_from(["auto", "device", "host"]),
            remainder=st.sampled_from(["keep", "drop"]),
        ),
        "model": section(
            {"name": _texts},
            num_classes=st.none() | _counts,
            args=st.dictionaries(_texts, _values, max_size=4),
        ),
        "train": section(
            {"epochs": _counts, "batch_size": st.integers(8, 10**6)},
            accumulate=st.integers(1, 8),
            compile=st.booleans() | st.just("auto"),
            grad_clip=st.none() | _positive,
            label_smoothing=_fractions,
        ),
        "optim": _optims(),
    },
    seed=st.integers(0, 2**63 - 1),
    schedule=_schedules(),
    augment=section(flip=st.booleans(), cutout=st.integers(0, 99), mixup=st.floats(0, 9)),
    monitor=section(
        gpu_interval_s=st.floats(0.1, 100),
        trackers=st.lists(st.sampled_from(["wandb", "mlflow"])),
        prometheus_dir=st.none() | _texts,
    ),
)


@settings(deadline=None, max_examples=100, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=_documents)
def test_a_written_config_reads_as_the_same_experiment(document, tmp_path_factory):
    config = Config.model_validate(document)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    read = load_config(path)
    assert read == config
    assert differences(config, read) == []


def test_a_written_config_holds_every_setting(file):
    written = dump_config(load(file))
    for name, keys in fields().items():
        assert re.search(rf"\b{name.rpartition('.')[2]}:", written), (name, keys)


def test_differences_name_key_and_both_values(file):
    old = load(file)
    new = load(file, "optim.lr=0.2", "schedule={name: step, milestones: [1]}", "model.args.x=1")
    assert differences(old, new) == [
        "model.args.x: None -> 1",
        "optim.lr: 0.1 -> 0.2",
        "schedule.milestones: [] -> [1.0]",
        "schedule.name: constant -> step",
    ]
    assert differences(old, old) == []


# --- The JSON Schema --------------------------------------------------------------------------------


def fields():
    """Returns the schema of every setting that is no section, by dotted key."""
    schema = json_schema()
    found = {}
    for name, content in schema["properties"].items():
        if "$ref" in content:
            definition = schema["$defs"][content["$ref"].removeprefix("#/$defs/")]
            found |= {f"{name}.{key}": value for key, value in definition["properties"].items()}
        else:
            found[name] = content
    return found


def fits(value, schema, whole):
    """Tells whether a value fits a JSON Schema; knows the keywords that the config's schema uses."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    types = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": is_number,
        "integer": is_number and value == int(value),
    }
    rules = {
        "$ref": lambda ref: fits(value, whole["$defs"][ref.removeprefix("#/$defs/")], whole),
        "anyOf": lambda options: any(fits(value, option, whole) for option in options),
        "type": lambda name: types[name],
        "enum": lambda choices: value in choices,
        "const": lambda only: value == only,
        "pattern": lambda pattern: not types["string"] or bool(re.search(pattern, value)),
        "minimum": lambda bound: not is_number or value >= bound,
        "maximum": lambda bound: not is_number or value <= bound,
        "exclusiveMinimum": lambda bound: not is_number or value > bound,
        "exclusiveMaximum": lambda bound: not is_number or value < bound,
        "minItems": lambda bound: not types["array"] or len(value) >= bound,
        "maxItems": lambda bound: not types["array"] or len(value) <= bound,
        "items": lambda item: not types["array"] or all(fits(child, item, whole) for child in value),
        "prefixItems": lambda items: (
            not types["array"]
            or all(fits(child, item, whole) for child, item in zip(value, items, strict=False))
        ),
        "required": lambda keys: not types["object"] or set(keys) <= set(value),
        "properties": lambda known: (
            not types["object"]
            or all(fits(child, known[key], whole) for key, child in value.items() if key in known)
        ),
        "additionalProperties": lambda allowed: (
            allowed or not types["object"] or set(value) <= set(schema["properties"])
        ),
    }
    notes = {"title", "description", "default", "$defs", "$schema"}
    return all(rules[keyword](content) for keyword, content in schema.items() if keyword not in notes)


def test_the_schema_describes_every_setting_and_forbids_others():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema
    for name, definition in {"Config": schema, **schema["$defs"]}.items():
        assert definition["additionalProperties"] is False, name
        assert definition["description"], name
    undescribed = [key for key, content in fields().items() if not content.get("description")]
    assert undescribed == []


@settings(deadline=None, max_examples=50, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=_documents)
def test_the_schema_accepts_what_the_config_accepts(document):
    schema = json_schema()
    assert fits(document, schema, schema)


@pytest.mark.parametrize(
    "change",
    [
        {"sede": 1},
        {"name": 5},
        {"name": "a/b"},
        {"seed": -1},
        {"train": {"epochs": 0, "batch_size": 1}},
        {"train": {"epochs": 1}},
        {"train": {"epochs": 1, "batch_size": 1, "compile": "maybe"}},
        {"train": None},
        {"data": {"name": "digits", "cache": "hots"}},
        {"optim": {"lr": "0.1"}},
        {"optim": {"lr": 0.1, "betas": [0.9]}},
        {"optim": {"lr": 0.1, "betas": [0.9, 2]}},
        {"schedule": {"milestones": [0]}},
    ],
)
def test_the_schema_rejects_what_the_config_rejects(change):
    document = {
        "name": "tiny",
        "data": {"name": "digits"},
        "model": {"name": "cnn_mnist"},
        "train": {"epochs": 2, "batch_size": 64},
        "optim": {"lr": 0.1},
    }
    schema = json_schema()
    assert fits(document, schema, schema)
    assert not fits(document | change, schema, schema)
    with pytest.raises(ValueError, match="validation error"):
        Config.model_validate(document | change)


def test_the_schema_needs_what_the_config_needs():
    assert json_schema()["required"] == ["name", "data", "model", "train", "optim"]
