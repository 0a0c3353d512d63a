"""Writes docs/config.md from the schema: `python docs/config_reference.py`. A test compares the two."""

import json
from pathlib import Path
from typing import Any

from disttrain.config import Role, json_schema, role

TARGET = Path(__file__).with_name("config.md")


def reference() -> str:
    """Returns the config reference in Markdown."""
    schema = json_schema()
    sections = schema["$defs"]
    top = [(name, field) for name, field in schema["properties"].items() if "$ref" not in str(field)]
    lines = [
        "# Config reference",
        "",
        "Written by `docs/config_reference.py` from the schema. `disttrain config schema` prints the same",
        "as JSON Schema, for editors. Any key can be set on the command line:",
        "`disttrain run CONFIG optim.lr=0.1`.",
        "",
        'A resumed run must have the same values as before. Keys marked "on resume" may change on resume.',
        'Keys marked "machine" are not part of the experiment: they may change on resume, and may differ',
        "between nodes.",
        "",
        *_table("", top, schema["required"], sections),
    ]
    for name, field in schema["properties"].items():
        reference = field.get("$ref") or next((option["$ref"] for option in field.get("allOf", [])), None)
        if reference:
            section = sections[reference.rpartition("/")[2]]
            lines += ["", f"## {name}", "", " ".join(section["description"].split()), ""]
            fields = list(section["properties"].items())
            lines += _table(f"{name}.", fields, section.get("required", []), sections)
    lines += ["", "## Each item of optim.groups", ""]
    group = sections["GroupConfig"]
    lines += [" ".join(group["description"].split()), ""]
    lines += _table("", list(group["properties"].items()), group["required"], sections)
    return "\n".join(lines) + "\n"


def _table(
    prefix: str, fields: list[tuple[str, dict[str, Any]]], required: list[str], sections: dict[str, Any]
) -> list[str]:
    rows = ["| key | value | default | may change | meaning |", "|---|---|---|---|---|"]
    return rows + _rows(prefix, fields, required, sections)


def _rows(
    prefix: str, fields: list[tuple[str, dict[str, Any]]], required: list[str], sections: dict[str, Any]
) -> list[str]:
    rows = []
    for name, field in fields:
        empty = {"array": [], "object": {}}.get(field.get("type", ""))
        default = "required" if name in required else json.dumps(field.get("default", empty))
        meaning = " ".join(field.get("description", "").split()).replace("|", r"\|")
        change = {Role.EXPERIMENT: "", Role.RESUME: "on resume", Role.MACHINE: "machine"}[role(prefix + name)]
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {default} | {change} | {meaning} |")
        for option in field.get("anyOf", []):
            kind = option.get("$ref", "").rpartition("/")[2]
            if kind and kind != "ScheduleConfig":  # which has a table of its own
                keys = sections[kind]
                rows += _rows(
                    f"{prefix}{name}.", list(keys["properties"].items()), keys.get("required", []), sections
                )
    return rows


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        schedule = field["$ref"].endswith("/ScheduleConfig")
        return "as the section `schedule`" if schedule else "the keys below"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array" and "$ref" in field.get("items", {}):
        return "list of the items below"
    kind = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true, false",
        "array": "list",
        "object": "key: value",
        "null": "null",
    }[field["type"]]
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in limits.items() if key in field and field[key] < 2**53]
    return f"{kind} {', '.join(bounds)}".strip()


if __name__ == "__main__":
    TARGET.write_text(reference())
