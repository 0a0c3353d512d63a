"""Writes a page as one self-contained HTML file: it needs no network, server or other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from disttrain import __version__
from disttrain.files import write_atomically
from disttrain.report.charts import Charts
from disttrain.units import duration, number, percent, utc


def render(template: str, output: Path, drawn: Charts, **content: Any) -> Path:
    """Renders a template of assets/report with charts and content, and writes the page.

    Raises:
        StorageError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("disttrain", "assets/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "utc": utc}
    text = environment.get_template(template).render(
        charts=vars(drawn),
        version=__version__,
        written=utc(),
        **content,
    )
    write_atomically(output, text)
    return output
