"""YAML for configs: the core schema of version 1.2, without aliases, and with the line of every key.

PyYAML reads version 1.1, where `no` is false and `1e-3` is text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from disttrain.errors import UsageError

_CORE_SCALARS = [  # YAML 1.2.2, section 10.3.2
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),  # YAML 1.1's merge key: refused in a file, and quoted in text
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's name; filled below


class _CoreDumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _pattern, _first in _CORE_SCALARS:
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(rf"^(?:{_pattern})$"),
            ["" if letter == "\0" else letter for letter in _first],
        )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Escapes NEL, LS and PS, which a reader would turn into newlines."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CoreDumper.add_representer(str, _represent_text)

Key = tuple[str | int, ...]
"""The path of a value: names of sections and numbers of items."""


def dotted_name(key: Key) -> str:
    """Returns a key as a user writes it, such as optim.groups.0.lr."""
    return ".".join(str(part) for part in key)


def write_yaml(data: object) -> str:
    """Returns data as YAML that reads back as the same data."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def read_yaml(text: str, name: str, *, numbered: bool) -> tuple[Any, dict[Key, int]]:
    """Reads one document.

    Args:
        text: YAML without aliases, anchors, tags and merge keys.
        name: name of the document, at the start of every message.
        numbered: whether messages also have the line.

    Returns:
        The data, and the line (from 1) of every key and item in it.

    Raises:
        UsageError: the text is not such a document, or has a key twice.
    """
    document = _Document(name, numbered)
    node = document.compose(text)
    return (None if node is None else document.build(node, ())), document.lines


class _Document:
    """A document that is being read; for the arguments see `read_yaml`."""

    def __init__(self, name: str, numbered: bool) -> None:
        self._name = name
        self._numbered = numbered
        self.lines: dict[Key, int] = {}

    def _error(self, line: int | None, text: str) -> UsageError:
        """Returns the error to raise; lines count from 0 here."""
        place = f"{self._name}:{line + 1}" if self._numbered and line is not None else self._name
        return UsageError(f"{place}: {text}")

    def compose(self, text: str) -> yaml.Node | None:
        """Returns the node tree of the text."""
        try:
            for token in yaml.scan(text, Loader=_CoreLoader):
                if isinstance(token, (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)):
                    remark = (
                        "anchors, aliases and tags (& * !) are not allowed; write the value out or quote it"
                    )
                    raise self._error(token.start_mark.line, remark)
            return yaml.compose(text, Loader=_CoreLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line if error.problem_mark else None
            if isinstance(error, yaml.composer.ComposerError):
                remark = "a second document; keep one and remove the line ---"
                raise self._error(line, remark) from None
            raise self._error(line, f"not valid YAML: {error.problem or error.context}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            raise self._error(line, "not valid YAML: a control character; remove it") from None
        except RecursionError:
            raise self._error(None, "not valid YAML: nested too deeply") from None

    def build(self, node: yaml.Node, key: Key) -> Any:
        """Returns the data below a node with the path `key`."""
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        try:
            return _scalar(node)
        except ValueError as error:
            dotted = f"{dotted_name(key)}: " if key else ""
            raise self._error(node.start_mark.line, f"{dotted}{error}") from None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                raise self._error(line, "a key must be a plain name")
            child = (*key, key_node.value)
            if key_node.value in mapping:
                also = f" (also on line {self.lines[child]})" if self._numbered else ""
                raise self._error(line, f"{dotted_name(child)} is given twice{also}")
            self.lines[child] = line + 1
            mapping[key_node.value] = self.build(value_node, child)
        return mapping


def _scalar(node: yaml.Node) -> Any:
    text: str = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
            if len(text) > 400:
                raise ValueError(f"a number of {len(text)} digits is too long")
            return int(text, base)
        case "float":
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                raise ValueError(f"{text} is not a finite number")
            return number
        case _:
            return text
