"""The templates of all pages. A report is one self-contained HTML file: it needs no network and no server."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from disttrain import __version__
from disttrain.files import write_atomically
from disttrain.report.charts import Charts
from disttrain.units import duration, number, percent, utc


@cache
def templates() -> jinja2.Environment:
    """Returns the templates of assets/report and assets/serve."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("disttrain", f"assets/{folder}") for folder in ("report", "serve")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "utc": utc}
    environment.globals["version"] = __version__
    return environment


def render(template: str, output: Path, drawn: Charts, **content: Any) -> Path:
    """Renders a template with charts and content, and writes the page.

    Raises:
        StorageError: the file cannot be written.
    """
    text = templates().get_template(template).render(charts=vars(drawn), written=utc(), **content)
    write_atomically(output, text)
    return output
