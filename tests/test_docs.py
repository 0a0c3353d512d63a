"""What the documents promise is there."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from disttrain.config import load_config

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "slurm/README.md",
    "benchmarks/README.md",
    "docs/python.md",
    "docs/scaling.md",
]


def load(script: str) -> Any:
    """Returns a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(script, REPOSITORY / "docs" / f"{script}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_reference_is_that_of_the_schema() -> None:
    assert (REPOSITORY / "docs/config.md").read_text() == load("config_reference").reference(), (
        "run python docs/config_reference.py"
    )


def test_the_table_of_scaling_is_that_of_the_model() -> None:
    assert load("scaling_tables").table() in (REPOSITORY / "docs/scaling.md").read_text(), (
        "run python docs/scaling_tables.py and put what it prints into docs/scaling.md"
    )


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme, ci = (REPOSITORY / "README.md").read_text(), (REPOSITORY / ".ci/run").read_text()
    install, _, test = (
        next(line for line in readme.splitlines() if "pytest" in line).strip().partition(" && ")
    )
    assert install.replace("install", "install --quiet") in ci
    assert test in ci.splitlines()


def test_config_of_the_readme_loads(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    example, groups = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    assert load_config(tmp_path / "example.yaml").train.batch_size == 512
    lines = [line for line in example.splitlines() if not line.startswith("optim:")]
    (tmp_path / "example.yaml").write_text("\n".join([*lines, groups]))
    assert len(load_config(tmp_path / "example.yaml").optim.groups) == 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    named = set(re.findall(r"(?<![\w/])(?:configs|launch|slurm|docs|benchmarks)/[\w./]+\.\w+", text))
    named |= set(re.findall(r"\]\(([\w./]+)\)", text))
    missing = [name for name in named if not any((root / name).exists() for root in _roots(document))]
    assert not missing


def _roots(document: str) -> list[Path]:
    return [REPOSITORY, (REPOSITORY / document).parent]


def test_names_of_tests_are_short() -> None:
    paths = (REPOSITORY / "tests").rglob("*.py")
    names = {name for path in paths for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert not [name for name in names if len(name) > 70]
