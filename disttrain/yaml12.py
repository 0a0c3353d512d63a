"""YAML as a config needs it: the core schema of version 1.2, no aliases, and the line of every key.

PyYAML reads version 1.1, in which `no` is false and `1e-3` is text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from disttrain.errors import UsageError

_CORE_SCALARS = [  # YAML 1.2.2, section 10.3.2; PyYAML's own table is YAML 1.1 (no = False, 1e-3 = text)
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),  # a key that YAML 1.1 knows; refused, and quoted where it is text
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
    """Escapes the line breaks of old, which a reader takes for newlines."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CoreDumper.add_representer(str, _represent_text)

Key = tuple[str | int, ...]
"""The place of a value: names of sections and numbers of items."""


def dotted_name(key: Key) -> str:
    """Returns a place as a user writes it, such as optim.groups.0.lr."""
    return ".".join(str(part) for part in key)


def write_yaml(data: object) -> str:
    """Returns data as YAML that reads back as the same data."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def read_yaml(text: str, name: str, *, numbered: bool) -> tuple[Any, dict[Key, int]]:
    """Reads one document.

    Args:
        text: YAML without aliases, anchors, tags and merge keys.
        name: begins every message.
        numbered: whether messages also have the line.

    Returns:
        The data, and the line (from 1) of every key and item in it.

    Raises:
        UsageError: the text is not such a document; keys given twice too.
    """
    lines: dict[Key, int] = {}

    def place(mark: yaml.Mark | None) -> str:
        return f"{name}:{mark.line + 1}" if numbered and mark else name

    def build(node: yaml.Node, key: Key) -> Any:
        lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*key, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return _scalar(node)
            except ValueError as error:
                dotted = f"{dotted_name(key)}: " if key else ""
                raise UsageError(f"{place(node.start_mark)}: {dotted}{error}") from None
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                raise UsageError(f"{place(key_node.start_mark)}: a key must be a plain name")
            child = (*key, key_node.value)
            if key_node.value in mapping:
                also = f" (also on line {lines[child]})" if numbered else ""
                raise UsageError(f"{place(key_node.start_mark)}: {dotted_name(child)} is given twice{also}")
            lines[child] = key_node.start_mark.line + 1
            mapping[key_node.value] = build(value_node, child)
        return mapping

    try:
        for token in yaml.scan(text, Loader=_CoreLoader):
            if isinstance(token, (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)):
                raise UsageError(
                    f"{place(token.start_mark)}: anchors, aliases and tags (& * !) are not allowed; "
                    "write the value out or quote it"
                )
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.composer.ComposerError as error:
        raise UsageError(
            f"{place(error.problem_mark)}: a second document; keep one and remove the line ---"
        ) from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context
        raise UsageError(f"{place(error.problem_mark)}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{name}:{line}" if numbered else name
        raise UsageError(f"{where}: not valid YAML: a control character; remove it") from None
    except RecursionError:
        raise UsageError(f"{name}: not valid YAML: nested too deeply") from None
    return (None if node is None else build(node, ())), lines


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
