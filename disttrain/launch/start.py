"""`disttrain.train`: the command `disttrain run` as a Python function."""

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
    """Trains an experiment in new processes, like `disttrain run`, and waits until it has finished.

    The processes print to the standard output of this one. An interrupt (Ctrl-C) is forwarded once, so that
    the run saves a checkpoint and stops.

    Args:
        config: the experiment, or the path of its YAML file.
        overrides: settings to change, such as "optim.lr=0.1".
        gpus: how many to use; None means all visible ones.
        procs: processes on the CPU, instead of GPUs.
        run_dir: the run folder; None creates one under runs/.
        resume: auto, never, or the run folder or checkpoint to resume from.
        quiet: show only the outcome.

    Returns:
        The run folder.

    Raises:
        UsageError: the config is wrong.
        StoppedError: the run was asked to stop. Call this again with its run_dir to resume it.
        DisttrainError: the run failed; the subclass corresponds to its exit code.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        path = Path(folder) / "config.yaml"
        if isinstance(config, Config):
            path.write_text(dump_config(config), encoding="utf-8")
            config = path
        resolved = load_config(Path(config), overrides)  # once: the file may be edited after the start
        path.write_text(dump_config(resolved), encoding="utf-8")
        path_of_run = Path(run_dir) if run_dir is not None else new_run_path(resolved.name)
        arguments = ["run", str(path), "--run-dir", str(path_of_run), "--resume", str(resume)]
        arguments += [] if gpus is None else ["--gpus", str(gpus)]
        arguments += [] if procs is None else ["--procs", str(procs)]
        arguments += ["--quiet"] if quiet else []
        code, errors = _wait_for([sys.executable, "-m", "disttrain", *arguments])
    if code:
        status = RunFolder(path_of_run).status()
        reason = status.get("reason") if status.get("exit_code") == code else None
        raise error_of(code, reason or errors or f"{path_of_run}: disttrain run ended with exit code {code}")
    return path_of_run


def _wait_for(command: list[str]) -> tuple[int, str]:
    """Runs a command and returns its exit code and its last error lines; forwards one interrupt."""
    # In its own session, so that Ctrl-C in the terminal reaches only this process.
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
