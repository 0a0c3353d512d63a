"""The user's own classes and functions, named `package.module:member` in a config."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from disttrain.errors import UsageError, error_text


class UserCodeError(UsageError):
    """A class or function of the user's own cannot be imported."""

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


def is_target(name: str) -> bool:
    """Returns whether a name has the form `package.module:member`; imports nothing."""
    module, _, member = name.partition(":")
    return member.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_target(target: str) -> Callable[..., Any]:
    """Imports `package.module:member`, a class or function; also searches the working directory.

    Raises:
        UserCodeError: the module cannot be imported, or has no such class or function.
        UsageError: it has a value of this name that is neither.
    """
    if str(Path.cwd()) not in sys.path:  # `python -m` adds it, a console script does not
        sys.path.insert(0, str(Path.cwd()))
    name, _, member = target.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UserCodeError(f"cannot import {name}: {error_text(error)}", name) from error
    if not hasattr(module, member):
        raise UserCodeError(f"module {name} has no {member}{did_you_mean(member, vars(module))}", name)
    found = getattr(module, member)
    if not callable(found):
        raise UsageError(f"{member} is of type {type(found).__name__}, not a class or function")
    return found  # type: ignore[no-any-return]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the choice most similar to a word, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""
