"""`monitor.on_end`: the user's command that hears how a run has ended.

It can neither delay nor fail a run: it has a time limit, and its failure is one line. It may contain a token,
so no message shows it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from disttrain.errors import reason
from disttrain.lifetime import received_stops
from disttrain.runs.eval_metrics import result_text
from disttrain.runs.jsonl import Follower
from disttrain.runs.records import EvalRecord, TrainRecord
from disttrain.runs.runfolder import RunFolder, utc_now

_LIMIT_S = 30.0
_FACTS = (
    *("state", "exit_code", "reason", "rank", "host", "step", "epoch", "samples_seen", "restarts"),
    *("started_at", "updated_at"),
)
"""Keys of status.json that the command gets."""
_MOST = 2000  # characters of a variable; the kernel refuses very long ones


def announce_end(
    command: str,
    name: str,
    folder: RunFolder,
    *,
    requeue: bool,
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Runs the command in a shell, and waits for it, at most 30 s. Only one process of a run calls this.

    Args:
        command: for /bin/sh. Its output goes to logs/on_end.log.
        name: of the experiment.
        folder: of the run, whose status.json is final.
        requeue: whether the job goes back into the queue and continues the run.
        environ: for the command, which gets the outcome in further variables and as JSON on standard input.
        say: called with one line if the command fails.
    """
    document = outcome(name, folder, requeue=requeue)
    log = folder.log(0).with_name("on_end.log")
    try:
        problem = _run(command, document, dict(environ) | variables(document), log)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the command
        problem = f"failed: {reason(error)}"
    if problem is not None:
        say(f"monitor.on_end {problem}; see {log}")


def _run(command: str, document: Mapping[str, Any], environ: Mapping[str, str], log: Path) -> str | None:
    """Runs the command and returns what went wrong, or None."""
    with log.open("a") as output, tempfile.TemporaryFile() as told, received_stops() as asked:
        output.write(f"{utc_now()} {document['state']}, exit code {document['exit_code']}\n")
        output.flush()
        told.write(msgspec.json.encode(document))
        told.seek(0)
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=told,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # so that what it starts can be killed with it
        )
        deadline = time.monotonic() + _LIMIT_S
        while (code := child.poll()) is None and not asked and time.monotonic() < deadline:
            time.sleep(0.02)
        problem = f"ended with exit code {code}" if code else None
        if code is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            problem = "was killed by a request to stop" if asked else f"did not end in {_LIMIT_S:g} s"
        if problem is not None:
            output.write(f"{utc_now()} {problem}\n")
        return problem


def outcome(name: str, folder: RunFolder, *, requeue: bool) -> dict[str, Any]:
    """Returns how a run has ended, with its last records; arguments as of `announce_end`."""
    status = folder.status()
    train, evaluation = _last_records(folder.metrics)
    summary = f"{name}: {status.get('state')}"
    for line in str(status.get("reason") or "").splitlines()[:1]:
        summary += f", {line}"
    if evaluation is not None:
        summary += f"; {result_text(evaluation)}"
    return {
        "summary": summary,
        "name": name,
        "run_dir": str(folder.path.resolve()),
        "requeue": requeue,
        **{key: status.get(key) for key in _FACTS},
        "verdict": (status.get("verdict") or {}).get("text"),
        "accuracy": None if evaluation is None else evaluation.accuracy,
        "train": train,
        "eval": evaluation,
    }


def _last_records(metrics: Path) -> tuple[TrainRecord | None, EvalRecord | None]:
    """Returns the last record of each kind; a file that ends in very many others may not show one."""
    found: list[TrainRecord | EvalRecord] = []

    def take(rows: Sequence[TrainRecord | EvalRecord]) -> bool:
        found[:] = rows
        return any(isinstance(row, EvalRecord) for row in rows)

    Follower(metrics, msgspec.json.Decoder(TrainRecord | EvalRecord), take).read()
    train = [row for row in found if isinstance(row, TrainRecord)]
    evals = [row for row in found if isinstance(row, EvalRecord)]
    return train[-1] if train else None, evals[-1] if evals else None


def variables(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the outcome as DISTTRAIN_* variables: what is no record; unknown is empty, true is 1."""
    found = {key: value for key, value in document.items() if key not in {"train", "eval"}}
    texts = {key: int(value) if isinstance(value, bool) else value for key, value in found.items()}
    return {
        f"DISTTRAIN_{key.upper()}": "" if value is None else str(value)[:_MOST].replace("\0", "")
        for key, value in texts.items()
    }
