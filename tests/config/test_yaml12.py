"""Configs are read as YAML 1.2."""

from pathlib import Path

import pytest

from disttrain.config import load_config
from disttrain.errors import UsageError
from kit.configs import BASE, load, mistake


def argument(file, yaml):
    """Returns what a YAML value is read as, through a setting that takes anything."""
    return load(file, f"model.args.x={yaml}").model.args["x"]


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
        ("eval: " + "[" * 1000, "tiny.yaml: not valid YAML: nested too deeply"),
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
