"""Where the label of a sample is, and how it is written: a number or a name, also in a field of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from disttrain.errors import UsageError

_MAX_NUMBER = 10**6
_MAX_NUMBER_BYTES = 16
_MAX_NAME_BYTES = 255
_MAX_JSON_BYTES = 2**20
_NUMBER = re.compile(r"(\d+)(\.0*)?", re.ASCII).fullmatch


@dataclass(frozen=True)
class LabelPlace:
    """Where the label of a sample is.

    Attributes:
        member: extension of the member with the label.
        field: the field of JSON that has it, with dots between the names of fields inside others.
        named: it is the name of the class, not its number.
    """

    member: Literal["cls", "txt", "json"] = "cls"
    field: str | None = None
    named: bool = False

    def __str__(self) -> str:
        return f"field {self.field} of KEY.json" if self.field else f"KEY.{self.member}"


def parse_place(text: str) -> LabelPlace:
    """Returns the place that --label names.

    Raises:
        UsageError: it names none.
    """
    member, _, field = text.partition(":")
    if member == "json" and field:
        return LabelPlace("json", field)
    if text == "cls":
        return LabelPlace("cls")
    if text == "txt":
        return LabelPlace("txt")
    raise UsageError(f"--label {text}: expected cls, txt or json:FIELD, such as json:label")


def number_of(text: str) -> int | None:
    """Returns the label that a text such as `7` or `7.0` is, or None."""
    found = _NUMBER(text) if len(text) <= _MAX_NUMBER_BYTES else None
    return int(found[1]) if found and int(found[1]) <= _MAX_NUMBER else None


class LabelReader:
    """Reads the labels of a tar.

    Args:
        place: where they are.
        classes: number of classes, which numbers must be below; None accepts any number.
        names: name -> label of every class, if the labels are names.
    """

    def __init__(
        self,
        place: LabelPlace | None = None,
        *,
        classes: int | None = None,
        names: Mapping[str, int] | None = None,
    ) -> None:
        self.place = place or LabelPlace()
        self.most_bytes = _MAX_JSON_BYTES if self.place.field else _MAX_NAME_BYTES
        self._classes, self._names = classes, names

    def read(self, content: bytes) -> tuple[int, str]:
        """Returns the label in a member and an empty string, or -1 and the problem."""
        text, problem = self.text(content)
        if problem:
            return -1, problem
        if self._names is not None:
            label = self._names.get(text, -1)
            return label, "" if label >= 0 else f"label {text!r} is not the name of a class"
        number = number_of(text)
        if number is None:
            return -1, f"{text.encode()[:20]!r} is not a label"
        if self._classes is not None and number >= self._classes:
            return -1, f"label {number} is not in 0 to {self._classes - 1}"
        return number, ""

    def text(self, content: bytes) -> tuple[str, str]:
        """Returns the text of a label and an empty string, or an empty text and the problem."""
        if self.place.field:
            return _in_json(content, self.place.field)
        content = content.strip()
        try:
            text = content.decode() if len(content) <= _MAX_NAME_BYTES else ""
        except UnicodeDecodeError:
            text = ""
        return (text, "") if _is_name(text) else ("", f"{content[:20]!r} is not a label")


class LabelTexts(LabelReader):
    """Takes every text for a label: the position in `texts`, of all different ones so far."""

    def __init__(self, place: LabelPlace) -> None:
        super().__init__(place)
        self.texts: dict[str, int] = {}

    def read(self, content: bytes) -> tuple[int, str]:
        """Returns the position of the text in a member and an empty string, or -1 and the problem."""
        text, problem = self.text(content)
        return (-1, problem) if problem else (self.texts.setdefault(text, len(self.texts)), "")


def _in_json(content: bytes, field: str) -> tuple[str, str]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return "", "its JSON is damaged"
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) and value else "no fields"
            return "", f"KEY.json has no field {name}, but {there:.200}"
        value = value[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _is_name(value := value.strip()):
        return "", f"{str(value)[:20]!r} in the field {field} is not a label"
    return value, ""


def _is_name(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text.encode()) <= _MAX_NAME_BYTES
