"""Configs are written so that they read the same, and editors get their JSON Schema."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.config import Config, differences, dump_config, json_schema, load_config
from kit.configs import load

# --- Writing --------------------------------------------------------------------------------------

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
            class_weights=st.none() | st.just("balanced") | st.lists(st.floats(0, 9), max_size=4),
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


@pytest.mark.integration
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


# --- The JSON Schema ------------------------------------------------------------------------------


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


@pytest.mark.integration
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
