"""Tells the samples that cannot be packed, all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from disttrain.errors import DataError
from disttrain.files import write_atomically


def list_of(target: Path) -> Path:
    """Returns the file, beside a data set, that lists several samples that could not be packed."""
    return target.with_name(f"{target.name}.bad.txt")


def report(
    problems: Sequence[tuple[str, str]], target: Path, *, skip: bool, say: Callable[[str], None]
) -> None:
    """Tells all bad samples; several of them in a file of lines `ORIGIN <tab> REASON`.

    Args:
        problems: origin of each, and why it is bad.
        target: folder of the data set.
        skip: they are left out.
        say: called with a line for the user.

    Raises:
        DataError: they are not to be left out.
    """
    path = list_of(target)
    first = ": ".join(problems[0])
    if len(problems) == 1:
        path.unlink(missing_ok=True)
        if not skip:
            raise DataError(f"{first}; repair or remove it, or leave it out with --skip")
        say(f"left out: 1 bad image: {first}")
        return
    write_atomically(path, "".join(f"{origin}\t{problem}\n" for origin, problem in problems))
    text = f"{len(problems):,} bad images, such as {first}; {path} lists all"
    if not skip:
        raise DataError(f"{text}; repair or remove them, or leave them out with --skip")
    say(f"left out: {text}")
