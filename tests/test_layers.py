"""The layers of the package: no import goes up, and no file or function is long."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import disttrain

PACKAGE = Path(disttrain.__file__).parent

# From the top to the ground. What stands in one line may import one another, but not in a circle.
LAYERS = [
    ["__main__", "cli"],
    ["launch", "sweep", "bench", "report", "doctor", "inference"],
    ["worker"],
    ["monitor"],
    ["training"],
    ["preflight"],
    ["runs", "data", "models"],
    ["shards"],
    [
        *("config", "counter_rng", "errors", "files", "heartbeat", "host_memory", "lifetime"),
        *("parallel", "slurm_env", "terminal", "units", "urls", "user_code", "userdirs"),
    ],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@functools.cache
def arrows() -> set[tuple[str, str, str]]:
    """Returns (part, imported part, where) of every import between two parts."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        part = place.parts[0].removesuffix(".py")
        if part == "__init__":  # the names that other programs use, imported when they are asked for
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
                if node.module == "disttrain":
                    names = [f"disttrain.{alias.name}" for alias in node.names if alias.name in LEVEL]
            for name in names:
                package, _, rest = name.partition(".")
                other = rest.partition(".")[0]
                if package == "disttrain" and other and other != part:
                    found.add((part, other, f"{place}:{node.lineno}"))
    return found


def test_every_part_has_its_layer() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert parts - {"__init__", "__pycache__", "assets", "py.typed"} == LEVEL.keys()


def test_no_import_goes_up() -> None:
    assert [arrow for arrow in sorted(arrows()) if LEVEL[arrow[0]] > LEVEL[arrow[1]]] == []


def test_no_two_parts_import_each_other_by_any_way() -> None:
    below: dict[str, set[str]] = {name: set() for name in LEVEL}
    for part, other, _ in arrows():
        below[part].add(other)
    while below:  # what imports nothing that is left can stand below the rest
        ground = [name for name, others in below.items() if not others & below.keys()]
        assert ground, f"in a circle: {sorted(below)}"
        for name in ground:
            del below[name]


def test_files_functions_and_signatures_stay_short() -> None:
    long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > 400:
            long.append(f"{path}: over 400 lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path}:{node.lineno}: {node.name}: over 60 lines")
            names = {name.arg for name in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
            if len(names) > 8 and not node.decorator_list:  # as Click has for commands
                long.append(f"{path}:{node.lineno}: {node.name}: over 8 parameters")
    assert long == []
