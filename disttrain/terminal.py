"""Whether there is a terminal on which something can move."""

from __future__ import annotations

import os
from typing import Protocol


class Stream(Protocol):
    """What is written to."""

    def isatty(self) -> bool:
        """Tells whether it leads to a terminal."""


def is_animated(stream: Stream) -> bool:
    """Tells whether what is written can be replaced in place, as a dashboard or a progress bar does.

    Not on a terminal that knows no movements of the cursor, nor in a cell of a Jupyter notebook: it gives the
    commands in it a terminal, and then shows each frame after the one before.
    """
    terminal = os.environ.get("TERM", "dumb")
    return stream.isatty() and terminal not in ("dumb", "unknown") and "JPY_PARENT_PID" not in os.environ
