"""Sphinx settings of the documentation site: `sphinx-build -W -c docs . build/site`.

Its pages are the Markdown files of the repository in place, so the same links work in both.
The site loads nothing from the network.
"""

import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from sphinx.application import Sphinx

from disttrain import __version__
from disttrain.cli import main

project = "disttrain"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "README"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("docs/*.md", "slurm/*.md", "benchmarks/*.md"),
]
exclude_patterns = ["build", "dist", "runs", ".*"]

NAVIGATION = {
    "": ["Start <self>"],
    "Tutorials": ["/docs/own_images", "/docs/fine_tuning", "/docs/multi_label"],
    "Guides": [
        *("/docs/experiments", "/docs/data", "/docs/monitoring", "/docs/reliability"),
        "/docs/reproducibility",
        *("/slurm/README", "/docs/scaling", "/docs/python"),
    ],
    "Reference": ["/docs/config", "/docs/cli", "/docs/api"],
    "Benchmarks": ["Results </docs/benchmarks>", "Scripts </benchmarks/README>"],
    "Project": ["/docs/comparison", "/CONTRIBUTING", "/CHANGELOG"],
}

myst_heading_anchors = 3
default_role = "code"
smartquotes_action = "D"  # keep straight quotes: many are part of a value

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ImageSource": "ImageSource", "Pipeline": "Pipeline"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 125
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "disttrain"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def complete(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds the content that only the site has: the navigation, and the help texts of the commands."""
    if docname == root_doc:
        source[0] += "".join(map(toctree, NAVIGATION, NAVIGATION.values()))
    elif docname == "docs/cli":
        source[0] += "".join(reference(main, click.Context(main, info_name="disttrain", show_default=True)))


def toctree(caption: str, pages: list[str]) -> str:
    """Returns a part of the navigation in Markdown."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def reference(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yields the help text of a command, and those of its subcommands, in Markdown."""
    if isinstance(command, click.Group):
        for name, child in sorted(command.commands.items()):
            yield from reference(child, click.Context(child, parent=context, info_name=name))
        return
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"\n## {context.command_path}\n\n```text\n{usage}\n```\n\n"
    yield plain(inspect.cleandoc(command.help or "")) + "\n"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        yield "\n| option | meaning |\n|---|---|\n"
    for option, meaning in filter(None, (option.get_help_record(context) for option in options)):
        option, meaning = (text.replace("|", r"\|") for text in (option, plain(meaning)))
        yield f"| `{option}` | {meaning} |\n"


def plain(text: str) -> str:
    """Returns a help text with its options as code, and with the signs escaped that Markdown would take."""

    def escaped(found: re.Match[str]) -> str:
        code, option, sign = found.groups()
        return code or (f"`{option}`" if option else f"\\{sign}")

    return re.sub(r"(`[^`]*`)|(--[a-z][\w-]*)|([<*])", escaped, text)


def tidy_signature(*event: Any) -> tuple[str, str | None] | None:
    """Returns a signature with readable lambdas and type aliases."""
    *_, signature, returns = event
    if not signature:
        return None
    signature = re.sub(r"<function .*?<lambda>>", "...", signature)
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returns


def name_start_page(app: Sphinx, error: Exception | None) -> None:
    """Copies the start page to index.html, which web servers look for."""
    if not error:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Registers the event handlers above."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("build-finished", name_start_page)
