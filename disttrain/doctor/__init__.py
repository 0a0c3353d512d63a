"""`disttrain doctor`: checks this machine, and gives a remedy for each problem.

Every check runs in its own process (`disttrain.doctor.checks`) with a time limit. If one crashes or hangs,
that is one line of the report, and the other checks still run. The pure functions of `disttrain.doctor.rules`
judge the facts. Nothing here imports torch.
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

_GRACE_S = 5.0  # for a check to print its stack and exit after its time limit


def examine(names: Sequence[str] = ()) -> Iterator[tuple[str, Finding]]:
    """Runs checks and yields each finding with the name of its check; without names, runs all checks.

    Raises:
        UsageError: a name is not that of a check.
    """
    from disttrain.doctor.checks import CHECKS

    for name in names:
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown check {name!r}; the checks are {', '.join(CHECKS)}{hint}")
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
    """Returns the lines of a finding, for a terminal."""
    import click

    colour = {"ok": "green", "warning": "yellow", "failure": "red"}[finding.status]
    line = f"{click.style(f'{finding.status:<8}', fg=colour)} {finding.subject:<18} {finding.found}"
    return f"{line}\n{'':>27} -> {finding.remedy}" if finding.remedy else line


def isolated(command: Sequence[str], limit_s: float, subject: str) -> Iterator[Finding]:
    """Runs a check in its own process and yields its findings; also a failure if the check itself failed.

    Args:
        command: prints a finding as JSON on each line of its standard output.
        limit_s: seconds until the check is killed with all its children, plus a grace period.
        subject: the subject of a failure of the check itself.
    """
    # Files, not pipes: a process that cannot be killed would keep a pipe open.
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
                process.wait(1)  # gives up on a process that is stuck in the kernel
        out.seek(0)
        err.seek(0)
        for line in out:
            with contextlib.suppress(ValueError, TypeError):
                yield Finding(**json.loads(line))
        if code != 0:
            remedy = f"see the output of: {' '.join(['python', *command[1:]]).strip()}"
            yield failure(subject, _ending(code, err.read(), limit_s), remedy)


def _ending(code: int | None, errors: str, limit_s: float) -> str:
    """Returns how a check failed, from its exit code and its standard error."""
    places = re.findall(r'  File "([^"]+)", line (\d+) in (\S+)', errors.rpartition("hread 0x")[2])
    where = f", in {places[0][2]} ({Path(places[0][0]).name}:{places[0][1]})" if places else ""
    if code is None or "Timeout (" in errors:
        return f"no answer within {limit_s:g} s{where}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{where}"
    lines = errors.strip().splitlines()
    return f"failed: {lines[-1]}" if lines else f"ended with exit code {code}"
