"""What our messages say to do about a failure can be done: the run goes on with it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import disttrain as package
from kit import REPOSITORY
from kit.commands import Run
from kit.run_results import metrics

GOES_ON = {
    "checkpoint.every_steps": "10",
    "data.cache": "none",
    "data.on_error": "skip",
    "data.workers": "3",
    "train.accumulate": "4",
    "train.cuda_graph": "false",
    "train.stop_early": "null",
}
"""Key -> a value to go on with."""
BY_FORCE = {
    "optim.lr": "1e-3",
    "train.batch_size": "16",
    "train.grad_clip": "1.0",
    "train.precision": "fp32",
}
"""The same of another experiment: the message says --force."""
AT_THE_START = {
    "data.image_size",
    "data.remainder",
    "data.root",
    "data.sampling",
    "model.args",
    "model.num_classes",
    "model.weights",
    "train.compile",
    "train.virtual_ranks",
}
"""Of runs that have saved nothing yet, and of the next one."""

REMEDY = re.compile(r"\b(?:raise|lower|set|use|use an?|with|tries|often \(|;) ?([a-z]+\.[a-z_]+)\b(?! = )")


def messages() -> list[str]:
    """Returns the text in the code of the package, without its docstrings."""
    texts = []
    for path in Path(package.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        ]
    return texts


def test_every_key_that_a_message_says_to_change_is_tried_here() -> None:
    sections = {key.partition(".")[0] for key in [*GOES_ON, *BY_FORCE, *AT_THE_START]}
    named = {key for text in messages() for key in REMEDY.findall(text) if key.partition(".")[0] in sections}
    assert named - {"data.name", "model.state_dict"} <= GOES_ON.keys() | BY_FORCE.keys() | AT_THE_START
    assert {"checkpoint.every_steps", "data.on_error", "train.accumulate", "optim.lr"} <= named


@pytest.mark.nightly
def test_a_run_goes_on_with_what_a_message_says(disttrain: Run, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "quickstart.yaml"
    run = ("run", config, "--procs", "1", "-q", "--run-dir", "run")
    assert disttrain(*run, "train.epochs=1").returncode == 0
    changes = [f"{key}={value}" for key, value in GOES_ON.items()]
    on = disttrain(*run, *changes, "train.epochs=2")
    assert on.returncode == 0, on.stderr
    forced = [f"{key}={value}" for key, value in BY_FORCE.items()]
    for change in forced:
        refused = disttrain(*run, *changes, change, "train.epochs=3")
        assert refused.returncode == 2, change
        assert "--force" in refused.stderr
    on = disttrain(*run, *changes, *forced, "train.epochs=3", "--force")
    assert on.returncode == 0, on.stderr
    records = metrics(tmp_path / "run")
    assert [record["epoch"] for record in records if record["kind"] == "eval"] == [1, 2, 3]
