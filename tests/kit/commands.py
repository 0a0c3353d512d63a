"""Commands run as a user runs them."""

import subprocess
from collections.abc import Callable

Run = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture `disttrain`: runs the command with these arguments and returns the ended process."""
