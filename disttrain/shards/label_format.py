"""Where the labels of a sample are, and how they are written: numbers or names, also in a field of JSON.

A sample has one label, or in multi-label data any number of them, also none.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from disttrain.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Label: TypeAlias = int | tuple[int, ...]
"""Of a sample: a class, -1 if unknown; or in multi-label data its classes, sorted."""
Labels: TypeAlias = "npt.NDArray[np.integer[Any]]"
"""Of samples: int64 [n], -1 if unknown; or in multi-label data uint8 [n, classes], 1 for each label."""


def classes_of(label: Label) -> tuple[int, ...]:
    """Returns the classes of a sample."""
    return label if isinstance(label, tuple) else (label,)


_MAX_NUMBER = 10**6
_MAX_NUMBER_BYTES = 16
_MAX_NAME_BYTES = 255
_MAX_TEXT_BYTES = 2**14  # of several labels
_MAX_JSON_BYTES = 2**20
_SEVERAL = "has several labels; index the tars with --multi-label"
_NUMBERS = re.compile(r"\[?\d+([,\s]\s*\d+)+\]?", re.ASCII).fullmatch
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
        multi_label: a sample has any number of labels.
    """

    def __init__(
        self,
        place: LabelPlace | None = None,
        *,
        classes: int | None = None,
        names: Mapping[str, int] | None = None,
        multi_label: bool = False,
    ) -> None:
        self.place = place or LabelPlace()
        self.multi_label = multi_label
        self.most_bytes = _MAX_TEXT_BYTES if multi_label else _MAX_NAME_BYTES
        if self.place.field:
            self.most_bytes = _MAX_JSON_BYTES
        self._classes, self._names = classes, names

    def read(self, content: bytes) -> Label:
        """Returns the label in a member.

        Raises:
            ValueError: it has no valid label; the message says why.
        """
        found = [self._number(text) for text in self._texts(content)]
        return tuple(sorted(set(found))) if self.multi_label else found[0]

    def array(self, labels: Sequence[Label]) -> Labels:
        """Returns the labels of some samples as an array; a sample without valid labels has none."""
        import numpy as np  # here, because a launcher does not need it

        if not self.multi_label:
            return np.array(labels, np.int64)
        assert self._classes is not None
        rows = np.zeros((len(labels), self._classes), np.uint8)
        for row, label in zip(rows, labels, strict=True):
            if isinstance(label, tuple):
                row[list(label)] = 1
        return rows

    def _number(self, text: str) -> int:
        """Returns the label that a text stands for; raises like `read`."""
        if self._names is not None:
            if text not in self._names:
                raise ValueError(f"label {text!r} is not the name of a class")
            return self._names[text]
        number = number_of(text)
        if number is None:
            raise ValueError(_SEVERAL if _NUMBERS(text) else f"{text.encode()[:20]!r} is not a label")
        if self._classes is not None and number >= self._classes:
            raise ValueError(f"label {number} is not in 0 to {self._classes - 1}")
        return number

    def _texts(self, content: bytes) -> list[str]:
        """Returns the texts of the labels in a member; raises like `read`."""
        if self.place.field:
            return self._listed(_in_json(content, self.place.field), f" in the field {self.place.field}")
        content = content.strip()
        try:
            text = content.decode() if len(content) <= self.most_bytes else "\0"
        except UnicodeDecodeError:
            text = "\0"
        if self.multi_label:
            return self._listed(_split(text), "")
        if not is_name(text):
            raise ValueError(f"{content[:20]!r} is not a label")
        return [text]

    def _listed(self, value: object, where: str) -> list[str]:
        """Returns the texts of a value of JSON; raises like `read`."""
        if isinstance(value, list) and not self.multi_label:
            raise ValueError(_SEVERAL)
        values = value if isinstance(value, list) else [] if value is None and self.multi_label else [value]
        texts: list[str] = []
        for one in values:
            is_text = isinstance(one, (str, int, float)) and not isinstance(one, bool)
            text = str(one).strip()
            if not is_text or not is_name(text):
                raise ValueError(f"{str(one)[:20]!r}{where} is not a label")
            texts.append(text)
        return texts


class LabelTexts(LabelReader):
    """Takes every text for a label: the position in `texts`, of all different ones so far."""

    def __init__(self, place: LabelPlace, *, multi_label: bool) -> None:
        super().__init__(place, multi_label=multi_label)
        self.texts: dict[str, int] = {}

    def array(self, labels: Sequence[Label]) -> Labels:
        """Returns all labels of the samples, one after the other: int64 [labels]."""
        import numpy as np

        sets = ((label,) if isinstance(label, int) else label for label in labels)
        return np.fromiter((label for one in sets for label in one), np.int64)

    def _number(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def _split(text: str) -> object:
    """Returns the labels in a text: a list of JSON, or separated by commas or lines, or numbers by spaces."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    parts = [part for part in map(str.strip, re.split(r"[,\n]", text)) if part]
    numbers = text.split()
    return numbers if len(parts) == 1 and all(number_of(one) is not None for one in numbers) else parts


def _in_json(content: bytes, field: str) -> object:
    """Returns the value of a field; raises ValueError like `LabelReader.read`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("its JSON is damaged") from None
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) and value else "no fields"
            raise ValueError(f"KEY.json has no field {name}, but {there:.200}")
        value = value[name]
    return value


def is_name(text: str) -> bool:
    """Returns whether a text may be the name of a class: printable, and up to 255 bytes."""
    return bool(text) and text.isprintable() and len(text.encode()) <= _MAX_NAME_BYTES
