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
        *_table("", top, schema["required"]),
    ]
    for name, field in schema["properties"].items():
        reference = field.get("$ref") or next((option["$ref"] for option in field.get("allOf", [])), None)
        if reference:
            section = sections[reference.rpartition("/")[2]]
            lines += ["", f"## {name}", "", " ".join(section["description"].split()), ""]
            lines += _table(f"{name}.", list(section["properties"].items()), section.get("required", []))
    lines += ["", "## Each item of optim.groups", ""]
    group = sections["GroupConfig"]
    lines += [" ".join(group["description"].split()), ""]
    lines += _table("", list(group["properties"].items()), group["required"])
    return "\n".join(lines) + "\n"


def _table(prefix: str, fields: list[tuple[str, dict[str, Any]]], required: list[str]) -> list[str]:
    rows = ["| key | value | default | may change | meaning |", "|---|---|---|---|---|"]
    for name, field in fields:
        empty = {"array": [], "object": {}}.get(field.get("type", ""))
        default = "required" if name in required else json.dumps(field.get("default", empty))
        meaning = " ".join(field.get("description", "").split()).replace("|", r"\|")
        change = {Role.EXPERIMENT: "", Role.RESUME: "on resume", Role.MACHINE: "machine"}[role(prefix + name)]
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {default} | {change} | {meaning} |")
    return rows


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return "as the section `schedule`"
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
