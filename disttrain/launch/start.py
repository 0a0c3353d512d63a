"""`disttrain.train`: what the command `disttrain run` does, from Python."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from disttrain.config import Config, dump_config, load_config
from disttrain.errors import error_of
from disttrain.runs.runfolder import RunFolder, new_run_path


def train(
    config: Config | str | Path,
    *overrides: str,
    gpus: int | None = None,
    procs: int | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path = "auto",
    quiet: bool = False,
) -> Path:
    """Trains an experiment to its end, in processes of its own, as `disttrain run` does.

    The processes print to this one's standard output. An interrupt (Ctrl-C) is passed on once, so that the
    run saves and stops.

    Args:
        config: the experiment, or the path of its YAML file.
        overrides: settings to change, such as "optim.lr=0.1".
        gpus: how many to use; None means all that are visible.
        procs: processes without GPUs.
        run_dir: the run folder; None makes one under runs/.
        resume: auto, never, or a run folder or checkpoint to go on from.
        quiet: show the outcome only.

    Returns:
        The run folder.

    Raises:
        UsageError: the config is wrong.
        StoppedError: the run was asked to stop; calling this again with its run_dir goes on.
        DisttrainError: as the run has ended; the exit code tells which kind.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        if isinstance(config, Config):
            path = Path(folder) / "config.yaml"
            path.write_text(dump_config(config), encoding="utf-8")
        else:
            path = Path(config)
        name = load_config(path, overrides).name
        place = Path(run_dir) if run_dir is not None else new_run_path(name)
        words = ["run", str(path), *overrides, "--run-dir", str(place), "--resume", str(resume)]
        words += [] if gpus is None else ["--gpus", str(gpus)]
        words += [] if procs is None else ["--procs", str(procs)]
        words += ["--quiet"] if quiet else []
        code, said = _wait_for([sys.executable, "-m", "disttrain", *words])
    if code:
        status = RunFolder(place).status()
        reason = status.get("reason") if status.get("exit_code") == code else None
        raise error_of(code, reason or said or f"{place}: disttrain run ended with exit code {code}")
    return place


def _wait_for(command: list[str]) -> tuple[int, str]:
    """Returns the exit code of a command and what it says of its failure; passes one interrupt on."""
    # A session of its own: a Ctrl-C in the terminal reaches this process alone.
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stderr=errors, start_new_session=True) as child:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                code = child.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
    return code, "\n".join(line.removeprefix("disttrain: ") for line in lines[-30:])
