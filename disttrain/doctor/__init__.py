"""`disttrain doctor`: what works on this machine and what does not, each with its remedy.

Every check runs in a process of its own (`disttrain.doctor.checks`) with a time limit, so that one that
crashes or hangs is a line of the report and never its end. What a finding is worth is decided by the pure
functions of `disttrain.doctor.rules`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from disttrain.doctor.rules import Finding, failure
from disttrain.errors import UsageError

_GRACE_S = 5.0  # for a check to end by itself after its time limit, with a word on where it was


def examine(names: Sequence[str] = ()) -> Iterator[tuple[str, Finding]]:
    """Yields the name of a check and what it found, one finding after the other; no names mean all checks.

    Raises:
        UsageError: there is no such check.
    """
    from disttrain.doctor.checks import CHECKS

    for name in names:
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"there is no check {name!r}; the checks are {', '.join(CHECKS)}{hint}")
    gpus: list[str] = []
    for name, check in CHECKS.items():
        if not names or name in names or (name == "gpus" and {"allreduce", "step"} & {*names}):
            for argument in check.arguments(gpus):
                command = [sys.executable, "-m", "disttrain.doctor.checks", name, argument]
                for finding in isolated(command, check.limit_s, f"{name} {argument}".strip()):
                    if name == "gpus" and finding.subject.startswith("cuda:"):
                        gpus.append(finding.subject)
                    yield name, finding


def report(finding: Finding) -> str:
    """Returns the lines of a finding for a terminal."""
    import click

    colour = {"ok": "green", "warning": "yellow", "failure": "red"}[finding.status]
    line = f"{click.style(f'{finding.status:<8}', fg=colour)} {finding.subject:<18} {finding.found}"
    return f"{line}\n{'':>27} -> {finding.remedy}" if finding.remedy else line


def isolated(command: Sequence[str], limit_s: float, subject: str) -> Iterator[Finding]:
    """Runs a check in a process of its own and yields what it found, and its own failure if it has one.

    Args:
        command: prints a finding as JSON on each line of its standard output.
        limit_s: seconds until it is killed with all that it started, plus a moment of grace.
        subject: of a failure of the check itself.
    """
    # Files, not pipes: a process that cannot be killed would hold a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = process.wait(limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # one that the kernel holds is left behind
        out.seek(0)
        err.seek(0)
        for line in out:
            with contextlib.suppress(ValueError, TypeError):
                yield Finding(**json.loads(line))
        if code != 0:
            again = f"see what it says: {' '.join(['python', *command[1:]]).strip()}"
            yield failure(subject, _ending(code, err.read(), limit_s), again)


def _ending(code: int | None, errors: str, limit_s: float) -> str:
    """Says how a check ended that did not end well, from its exit code and what it printed."""
    places = re.findall(r'  File "([^"]+)", line (\d+) in (\S+)', errors.rpartition("hread 0x")[2])
    where = f", in {places[0][2]} ({Path(places[0][0]).name}:{places[0][1]})" if places else ""
    if code is None or "Timeout (" in errors:
        return f"no answer within {limit_s:g} s{where}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{where}"
    lines = errors.strip().splitlines()
    return f"failed: {lines[-1]}" if lines else f"ended with exit code {code}"
