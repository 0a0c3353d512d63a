"""Reading a config from YAML and overrides, and writing it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from disttrain.config.mistakes import conflicts, explained
from disttrain.config.schema import Config
from disttrain.config.yaml12 import Key, dotted_name, read_yaml, write_yaml
from disttrain.errors import UsageError
from disttrain.urls import HIDDEN


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and checks the result.

    Args:
        path: the YAML file; `-` is the standard input.
        overrides: Hydra-style assignments; values are read as YAML.

    Raises:
        UsageError: the file or an override is wrong; the message names file and line, or the override.
    """
    return parse_config(*config_text(path), overrides)


def config_text(path: str | Path) -> tuple[str, str]:
    """Returns the text of a config file, and its name for messages; `-` is the standard input.

    Raises:
        UsageError: it cannot be read.
    """
    path = Path(path)
    if str(path) == "-":
        return sys.stdin.read(), "standard input"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file{_similar_file(path)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def parse_config(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config that a YAML text describes, under overrides; `name` is for messages.

    Raises:
        UsageError: the text or an override is wrong.
    """
    tree, lines = read_yaml(text, name, numbered=True)
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: expected the sections of an experiment (data:, model:, train:, ...)")
    where: dict[Key, str] = {(): name} | {key: f"{name}:{line}" for key, line in lines.items() if key}
    for override in overrides:
        _apply_override(tree, where, override)
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = explained(error)
    else:
        problems = conflicts(config)
        if not problems:
            return config
    found = [f"{_place(key, where)}: {message}" for key, message in problems]
    raise UsageError("\n".join(dict.fromkeys(found)))


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML; reading it again gives an equal `Config`."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of the config, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "disttrain config"}


def settings(config: Config) -> dict[str, Any]:
    """Returns the value of every dotted key, such as optim.lr, as `shown`."""
    return flatten(shown(config).model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested sections as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """Returns one line `key: old -> new` for each difference between two configs or documents."""
    before, after = (settings(item) if isinstance(item, Config) else flatten(item) for item in (old, new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def _apply_override(tree: dict[str, Any], where: dict[Key, str], override: str) -> None:
    name, equals, text = override.partition("=")
    keys: Key = tuple(int(key) if key.isdecimal() else key for key in name.strip().split("."))
    if not equals or "" in keys:
        raise UsageError(f"{override!r} is not an override; write key=value, for example optim.lr=0.1")
    source = f"override {override!r}"
    value, _ = read_yaml(text, source, numbered=False)
    section: Any = tree
    for depth, key in enumerate(keys[:-1], 1):
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
            where.setdefault(keys[:depth], source)
        section = _item(section, keys[:depth], source)
    old = _item(section, keys, source)
    switched_off = value is None and text.strip()  # key=null
    if isinstance(old, dict) and not isinstance(value, dict) and not switched_off:
        example = f"{name}.{next(iter(old), 'name')}=..."
        raise UsageError(f"{source}: {name} is a section; set one of its keys, such as {example}")
    section[keys[-1]] = value
    for place in [place for place in where if place[: len(keys)] == keys]:
        del where[place]  # the override replaces everything below this key
    where[keys] = source


def _item(section: Any, keys: Key, source: str) -> Any:
    """Returns the item of a section or a list that the last of `keys` names; None if a section has none."""
    key, name = keys[-1], dotted_name(keys[:-1])
    if isinstance(section, dict):
        return section.get(key)
    if not isinstance(section, list):
        raise UsageError(f"{source}: {name} is a value, not a section")
    if not isinstance(key, int) or key >= len(section):
        raise UsageError(
            f"{source}: {name} is a list of {len(section)}; give a position below, such as {name}.0"
        )
    return section[key]


def _place(key: Key, where: Mapping[Key, str]) -> str:
    """Returns where a value was set, or the nearest section above it that was set."""
    return next(where[key[:end]] for end in range(len(key), -1, -1) if key[:end] in where)


def _similar_file(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.iterdir() if file.suffix in {".yaml", ".yml"}]
    except OSError:
        return ""
    names_like = (path.name, f"{path.stem}.yaml")
    close = [match for name in names_like for match in difflib.get_close_matches(name, names, 1)]
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def shown(config: Config) -> Config:
    """Returns a config to show: without the command of `monitor.on_end`, which may have a token in it."""
    if config.monitor.on_end is None:
        return config
    monitor = config.monitor.model_copy(update={"on_end": HIDDEN})
    return config.model_copy(update={"monitor": monitor})
