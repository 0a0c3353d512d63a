"""The `disttrain` command. Function bodies import what they need, to keep --help fast."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from disttrain import __version__
from disttrain.cli import data, inference, running, sweeping, tuning
from disttrain.errors import DisttrainError
from disttrain.terminal import hide_pillow_warnings
from disttrain.urls import without_secrets


class _Group(click.Group):
    """Prints a DisttrainError as one line and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if "." not in error.option_name:
                raise
            key = error.option_name.lstrip("-").replace("-", "_")
            text = f"No such option '{error.option_name}'. Set a config key without dashes: {key}=VALUE"
            raise click.UsageError(text, error.ctx) from None
        except DisttrainError as error:
            for line in str(error).splitlines():
                click.echo(f"disttrain: {without_secrets(line)}", err=True)
            sys.exit(error.exit_code)


_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 110,
    "show_default": True,
}


@click.group(cls=_Group, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="disttrain")
def main() -> None:
    """Train image classifiers on one GPU, many GPUs or many nodes from one YAML file."""
    hide_pillow_warnings()


for command in (*running.COMMANDS, data.data, tuning.tune, sweeping.sweep, *inference.COMMANDS):
    main.add_command(command)


@main.group()
def config() -> None:
    """Describe the config file."""


@config.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from disttrain.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
def models() -> None:
    """List the built-in models.

    Shows the number of parameters, the input size and the source of each model.
    """
    from disttrain.models import CATALOG, build_model, parameter_count

    for name, entry in CATALOG.items():
        channels, height, width = entry.input_shape
        model = build_model(name, num_classes=10, in_channels=channels, image_size=(height, width), args={})
        size = f"{channels}x{height}x{width}"
        click.echo(f"{name:<18} {parameter_count(model):>12,}  {size:<9}  {entry.source}")
    click.echo("torchvision:NAME, timm:NAME and package.module:Class also work")
