"""What the documents promise is there."""

import importlib.util
import inspect
import re
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import disttrain as package
from disttrain.cli import main as disttrain
from disttrain.config import load_config
from disttrain.worker import main as worker
from kit import REPOSITORY

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "slurm/README.md", "benchmarks/README.md"),
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md") if path.name != "config.md"),
]
MOST_LINES = 180  # of the README
MEAN_WORDS = 18  # of the sentences of a document
MOST_WORDS = 35  # of one sentence
RETIRED = {
    "as_written": "eager",
    "contact sheet": "prediction grid",
    "drawing_apart": "preserve_rng_state",
    "embedded digits": "built-in digits",
    "foreign tar": "existing tar",
    "in passing": "transient",
    "look_due": "should_poll_stop",
    "newest sound": "latest valid",
    "piece": "micro-batch",
    "pulse": "heartbeat",
    "seeder": "make_seed_fn",
    "sees to it": "ensures",
    "survey": "scan for bad samples",
    "tally": "metrics",
    "unreduced": "no_sync",
    "whereof": "of which",
}
"""Word of the project's own that the texts no longer use -> the field's word for it."""


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


def test_the_python_reference_has_every_public_name() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    listed = set(re.findall(r"^\.\. auto\w+:: (\w+)(?:\(\))?$", page, re.MULTILINE))
    assert set(package.__all__) - {"__version__"} <= listed


def test_the_site_lists_every_command_with_its_options() -> None:
    @click.group()
    def tool() -> None:
        """Not listed: a group alone does nothing."""

    @tool.command()
    @click.argument("place", metavar="PLACE")
    @click.option("--when", metavar="now|later", default="now", help="Ends <name> with --force: `a|b*`.")
    def stop(place: str, when: str) -> None:
        """Stop *.log files."""

    context = click.Context(tool, info_name="tool", show_default=True)
    assert (
        "".join(load("conf").reference(tool, context))
        == r"""
## tool stop

```text
tool stop [OPTIONS] PLACE
```

Stop \*.log files.

| option | meaning |
|---|---|
| `--when now\|later` | Ends \<name> with `--force`: `a\|b*`.  [default: now] |
"""
    )


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme, ci = (REPOSITORY / "README.md").read_text(), (REPOSITORY / ".ci/run").read_text()
    install, _, test = (
        next(line for line in readme.splitlines() if "pytest" in line).strip().partition(" && ")
    )
    assert install.replace("install", "install --quiet") in ci
    assert test in ci.splitlines()


def test_configs_of_the_documents_load(tmp_path: Path) -> None:
    (example,), (groups,) = (
        re.findall(r"```yaml\n(.*?)```", (REPOSITORY / name).read_text(), re.DOTALL)
        for name in ("README.md", "docs/experiments.md")
    )
    (tmp_path / "example.yaml").write_text(example)
    assert load_config(tmp_path / "example.yaml").train.batch_size == 512
    lines = [line for line in example.splitlines() if not line.startswith("optim:")]
    (tmp_path / "example.yaml").write_text("\n".join([*lines, groups]))
    assert len(load_config(tmp_path / "example.yaml").optim.groups) == 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_sections_exist(document: str) -> None:
    path = REPOSITORY / document
    text = path.read_text()
    named = set(re.findall(r"(?<![\w/])(?:configs|launch|slurm|docs|benchmarks)/[\w./]+\.\w+", text))
    missing = [
        name for name in named if not any((root / name).exists() for root in (REPOSITORY, path.parent))
    ]
    for name, _, section in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", text):
        target = path.parent / name if name else path
        if not target.exists() or (section and section not in anchors(target.read_text())):
            missing.append(f"{name}#{section}")
    assert not missing


def test_names_of_tests_are_short() -> None:
    paths = (REPOSITORY / "tests").rglob("*.py")
    names = {name for path in paths for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert not [name for name in names if len(name) > 70]


def anchors(markdown: str) -> set[str]:
    """Returns what links to the headings of a document end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_the_options_that_are_named(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    code = re.findall(r"^```sh\n((?s:.*?))^```|^ {4}(.*)|(?<!`)`([^`]+)`(?!`)", text, re.MULTILINE)
    lines = " ; ".join(line for found in code for part in found for line in part.splitlines())
    for line in re.findall(r"(?<!\S)disttrain ([a-z][^;#]*)", lines):
        command: click.Command = disttrain
        arguments = re.sub('"[^"]*"', "TEXT", line).split()
        while isinstance(command, click.Group) and arguments:
            name = arguments.pop(0)
            assert name in command.commands, f"disttrain {line}: there is no {name}"
            command = command.commands[name]
        options = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
        unknown = [name for name in arguments if re.match("--?[a-z]", name) and name not in options]
        assert not unknown, f"disttrain {line}: it has no {unknown}"


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sentences_are_short(document: str) -> None:
    check_lengths(document, sentences((REPOSITORY / document).read_text()))


def test_sentences_of_the_help_texts_are_short() -> None:
    check_lengths("help texts", [sentence for text in HELP_TEXTS.values() for sentence in sentences(text)])


def test_every_command_and_option_has_a_help_text() -> None:
    assert len(HELP_TEXTS) > 60
    assert not [name for name, text in HELP_TEXTS.items() if not text.strip()]


@pytest.mark.parametrize("name", [*DOCUMENTS, "docs/config.md", "help texts", "comments"])
def test_retired_words_are_not_used(name: str) -> None:
    text = {"help texts": "\n".join(HELP_TEXTS.values()), "comments": "\n".join(comments())}.get(name)
    found = retired_words((REPOSITORY / name).read_text() if text is None else text)
    assert not found, f"{name}: say {[f'{RETIRED[word]} instead of {word}' for word in found]}"


def test_retired_words_are_found_in_any_form() -> None:
    assert retired_words("Pieces of a\nContact sheet, as-written") == ["as_written", "contact sheet", "piece"]
    assert retired_words("A masterpiece, an impulse") == []


def test_comments_of_the_configs_are_found() -> None:
    found = comments()
    assert any("for the convolution filters" in comment for comment in found)
    assert any("any free port" in comment for comment in found)
    assert any("if a node has several networks" in comment for comment in found)


def check_lengths(name: str, found: Collection[str]) -> None:
    """Asserts that sentences are short, each and in the mean."""
    lengths = [(words(sentence), sentence) for sentence in found]
    too_long = [f"{count} words: {text}" for count, text in lengths if count > MOST_WORDS]
    assert not too_long, f"{name}: split what has more than {MOST_WORDS} words"
    mean = statistics.fmean(count for count, _ in lengths)
    longest = "\n".join(text for _, text in sorted(lengths, reverse=True)[:5])
    assert mean <= MEAN_WORDS, f"{name}: {mean:.1f} words a sentence; the longest:\n{longest}"


def help_texts(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """Yields (name, help text) of a command, of its options and of all its subcommands."""
    yield path, inspect.cleandoc(command.help or "")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{path} {parameter.opts[-1]}", parameter.help or ""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from help_texts(child, f"{path} {name}")


HELP_TEXTS = dict([*help_texts(disttrain, "disttrain"), *help_texts(worker, "disttrain.worker")])


def comments() -> list[str]:
    """Returns the comments of the experiments, of the launch settings and of the Slurm script."""
    paths = [path for folder in ("configs", "launch", "slurm") for path in (REPOSITORY / folder).iterdir()]
    texts = [path.read_text() for path in paths if path.suffix in {".yaml", ".sh"}]
    return [found for text in texts for found in re.findall(r"(?:^|\s)#\s(.*)$", text, re.MULTILINE)]


def retired_words(text: str) -> list[str]:
    """Returns which of the retired words a text has, in the singular or the plural."""
    patterns = {word: re.sub("[ _]", r"[\\s_-]+", word) for word in RETIRED}
    return [word for word, form in patterns.items() if re.search(rf"\b{form}s?\b", text, re.IGNORECASE)]


def test_sentences_are_told_from_what_is_not_prose() -> None:
    document = """# Two words. Not these

One is [a link](with.a. target): it counts as `one sentence. Here`, e.g. this
(He et al. 2015). "Two?" Three

- four
- five, in 1.5 s
  and on

    code. Not this

| cell. | not this |

```sh
code. not this
```
![Not. This](picture.png)
"""
    assert sentences(document) == [
        "One is a link: it counts as CODE, e.g. this (He et al. 2015).",
        '"Two?"',
        "Three",
        "four",
        "five, in 1.5 s and on",
    ]
    assert words("It has 5 % of $HOME, or CODE x 2 - 1") == 10


def sentences(markdown: str) -> list[str]:
    """Returns the sentences of the paragraphs and list items of a document; inline code is one word."""
    text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}|\||#).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|^(?:-|\d+\.) ", text, flags=re.MULTILINE)
    end = r"""((?<!\bal)(?<!e\.g)(?<!i\.e)[.!?][)"]*) +"""
    pieces = (re.sub(end, r"\1\n", " ".join(paragraph.split())) for paragraph in paragraphs)
    return [sentence for piece in pieces for sentence in piece.splitlines() if words(sentence)]


def words(sentence: str) -> int:
    """Returns how many words a sentence has; signs that stand alone are none."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())
