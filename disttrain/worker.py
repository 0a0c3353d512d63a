"""What every rank runs: it joins the process group, builds the state, trains and records how it ended.

Started by `disttrain run`, `accelerate launch -m disttrain.worker`, `torchrun -m disttrain.worker` or
`srun python -m disttrain.worker`; all of them give the same run. torch is imported only after the config has
been read, so that a mistake in it is reported at once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from disttrain import slurm_env
from disttrain.config import Config, Role, differences, dump_config, load_config, parse_config, role
from disttrain.errors import DisttrainError, HangError, StoppedError, StorageError, TrainingError
from disttrain.files import storage_error, write_atomically
from disttrain.heartbeat import Phase, doing, pack
from disttrain.lifetime import end_with_parent
from disttrain.models import check_model_name
from disttrain.preflight import check_machine, check_space, check_trackers
from disttrain.runs.agreement import compare_peers, shared_facts
from disttrain.runs.fingerprint import fingerprint
from disttrain.runs.manifest import quarantine
from disttrain.runs.resume import Start, finished_text, resume_point
from disttrain.runs.runfolder import CLEAN, CONFIG, RunFolder, new_run_path, utc_now
from disttrain.terminal import hide_pillow_warnings
from disttrain.training.group import (
    best_device,
    collective_timeout_s,
    join,
    out_of_memory,
    signal_failure,
    timed_out,
)
from disttrain.training.rank import Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from accelerate import PartialState

    from disttrain.monitor.observe import RunObserver
    from disttrain.runs.mirror import Mirror
    from disttrain.shards.index import Index

log = logging.getLogger("disttrain")

_COPYING_S = 60.0  # at most, for the last checkpoint to reach the mirror


class Flags(NamedTuple):
    """The options of the command line that are not about the experiment; see `main`."""

    resume: str
    force: bool
    verbosity: int
    profile: str | None


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Run folder (default runs/<name>/<UTC time>)."
)
@click.option("--resume", default="auto", help="auto, never, or the run folder or checkpoint to resume from.")
@click.option(
    "--force", is_flag=True, help="Resume although the config or data set differs from the checkpoint's."
)
@click.option(
    "--profile",
    is_flag=False,
    flag_value="rank0",
    type=click.Choice(["rank0", "all"]),
    help="Write a trace of a few steps of rank 0, or of all ranks.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show only the outcome.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def main(
    config_path: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: str,
    force: bool,
    profile: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Trains CONFIG as one rank of the process group that the environment describes."""
    hide_pillow_warnings()
    gc.disable()  # until everything is imported and built: importing torch takes 20 % less time
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # even if torchrun is killed
    os.environ.update(slurm_env.task_environment(os.environ))
    rank = Rank(int(os.environ.get("RANK", "0")), run_dir)
    rank.listen()
    config = None
    try:
        text = os.environ.get(CONFIG)  # the launcher has read the file, which may have changed since then
        config = parse_config(text, CONFIG) if text else load_config(config_path, overrides)
        check_model_name(config.model.name)
        run(config, rank, Flags(resume, force, int(verbose) - int(quiet), profile))
    except StoppedError as stop:
        code = stop.exit_code
        try:
            rank.write_status(state="stopped", exit_code=code, reason=str(stop))
        except StorageError as error:
            rank.fail(error)
            code = error.exit_code
    except (Exception, SystemExit) as error:  # if a user's model calls sys.exit, the run has not finished
        rank.fail(error)
        if rank.heartbeat.place[0] is Phase.START:
            signal_failure()
        code = error.exit_code if isinstance(error, DisttrainError) else TrainingError.exit_code
    else:
        code = 0
    if config is not None:
        announce(config, rank)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its terminal or pipe was closed
            stream.flush()
    rank.heartbeat.leave(code)
    os._exit(code)  # does not wait for the threads of a broken process group


def announce(config: Config, rank: Rank) -> None:
    """Runs `monitor.on_end` on rank 0 if there is no launcher of ours, which would do it."""
    command, folder = config.monitor.on_end, rank.folder
    if command is None or folder is None or rank.number or folder.locked_by_launcher():
        return
    from disttrain.monitor.on_end import announce_end

    say = partial(print, file=sys.stderr, flush=True)
    announce_end(command, config.name, folder, requeue=False, environ=os.environ, say=say)


def run(config: Config, rank: Rank, flags: Flags) -> None:
    """Trains as one rank, from joining the process group to leaving it. Every rank calls this."""
    rank.heartbeat.beat(Phase.START, 0, 1)
    import torch.distributed as dist

    rank.heartbeat.beat(Phase.START, 0, 2)
    device = best_device()
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    index = check_machine(config, device, local, world, log.info)
    if rank.number == 0:
        check_trackers(config)
    rank.heartbeat.beat(Phase.START, 0, 3)
    group = join(config, device)
    rank.heartbeat.beat(Phase.START, 0, 4)
    stopped = None
    try:
        if rank.heartbeat.connection is None and group.num_processes > 1:  # otherwise the launchers compare
            from disttrain.training.collectives import Group, gather

            gathered = gather(Group.of(group), (socket.gethostname(), shared_facts(config, index)))
            compare_peers({f"rank {i} on {host}": found for i, (host, found) in enumerate(gathered)})
        folder, checkpoint, mirror = enter_folder(config, rank, group, index, flags)
        rank.heartbeat.beat(Phase.START, 0, 5)
        if folder is not None:
            train_in_folder(config, rank, folder, group, index, checkpoint, flags, mirror)
    except StoppedError as stop:
        stopped = stop
    except RuntimeError as error:
        who, when = f"rank {rank.number} on {socket.gethostname()}", doing(pack(*rank.heartbeat.place))
        if lacking := out_of_memory(error):
            remedy = "raise train.accumulate, so that fewer images go through the network at once, or lower "
            remedy += "train.batch_size and continue this run with --force"
            if rank.heartbeat.place[0] is Phase.START:
                remedy = (
                    "keep fewer images in memory with data.cache=none, or check what else uses memory here"
                )
            raise TrainingError(f"{who} ran out of memory {when}: {lacking}; {remedy}") from error
        if (isinstance(error, dist.DistError) or "gloo" in str(error)) and timed_out(error):
            waited = f"waited {collective_timeout_s(config):g} s for the other ranks {when}"
            raise HangError(f"{who} {waited}: one of them hangs or is gone") from error
        raise
    if dist.is_initialized():
        # All ranks leave together: torchrun ends the others as soon as one exits, and rank 0 may still be
        # saving. A rank that fails does not come here. The other ranks would fail too, before its error is
        # recorded.
        with contextlib.nullcontext() if stopped is None else contextlib.suppress(RuntimeError):
            dist.barrier(device_ids=[group.device.index] if device == "cuda" else None)
            dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def enter_folder(
    config: Config, rank: Rank, group: PartialState, index: Index, flags: Flags
) -> tuple[RunFolder | None, Path | None, Mirror | None]:
    """Agrees on the run folder, which rank 0 creates, and on the checkpoint. Every rank calls this.

    Returns:
        The folder, or None if its run has already finished; the checkpoint to resume from, if any; and on
        rank 0 the mirror, if the config has one.
    """
    from disttrain.training.collectives import Group, gather

    agreed: list[Any] = [None, None]
    mirror, notes = None, []
    if rank.number == 0:
        folder = RunFolder(rank.run_dir or new_run_path(config.name))
        address = config.checkpoint.mirror
        if folder.is_run() or address is not None:
            folder.create()  # takes its lock, so that no other run changes the checkpoints while we read them
        if address is not None:
            from disttrain.runs.mirror import Mirror

            mirror = Mirror(address, config.name, folder, config.checkpoint.keep)
            notes = mirror.begin(resume=flags.resume == "auto")
        now = fingerprint(config, index, None if config.data.on_error == "skip" else ())
        start = resume_point(folder, flags.resume, now, force=flags.force)
        if start.finished:
            print(finished_text(folder), flush=True)
        else:
            folder.create()
            checkpoint = prepare_folder(folder, config, replace(start, notes=(*notes, *start.notes)))
            agreed = [str(folder.path), checkpoint and str(checkpoint.resolve())]
    path, checkpoint_path = gather(Group.of(group), agreed)[0]
    if path is None:
        return None, None, None
    if rank.number:
        folder = RunFolder(Path(path))
        folder.check_writable("logs", "errors")
    if rank.folder is None:
        rank.enter(folder)
    return folder, Path(checkpoint_path) if checkpoint_path else None, mirror


def prepare_folder(folder: RunFolder, config: Config, start: Start) -> Path | None:
    """Prepares the run folder, prints notes on it, and returns the checkpoint. Only rank 0 calls this."""
    checkpoint, notes = start.checkpoint, list(start.notes)
    if checkpoint is not None:
        if checkpoint.resolve().parent == folder.checkpoints.resolve():
            try:
                checkpoint, lines = quarantine(checkpoint, start.step)
            except OSError as error:
                raise storage_error(folder.checkpoints, error) from None
            notes += lines
        else:
            folder.update_status(began_from=str(checkpoint.resolve()))
    if start.changes:
        folder.record_forced(start.step, start.changes)
        notes += [f"--force: resuming with {change}" for change in start.changes]
    if folder.config.exists():
        old = load_config(folder.config)
        lines = differences(old, config)
        if changed := [line for line in lines if role(line.partition(":")[0]) is not Role.MACHINE]:
            notes += [f"resuming with {line}" for line in changed if line not in start.changes]
            kept = folder.path / f"config.{start.step}.yaml"
            if not kept.exists():
                write_atomically(kept, dump_config(old))
            write_atomically(folder.config, dump_config(config))
    for note in notes:
        log.info("%s", note)
        print(note, flush=True)
    return checkpoint


def train_in_folder(
    config: Config,
    rank: Rank,
    folder: RunFolder,
    group: PartialState,
    index: Index,
    checkpoint_path: Path | None,
    flags: Flags,
    mirror: Mirror | None,
) -> None:
    """Builds the training state, trains, and writes the run folder. Every rank calls this."""
    from disttrain.monitor.observe import RunObserver
    from disttrain.training.build import build
    from disttrain.training.callbacks import Callbacks
    from disttrain.training.phases import Phases
    from disttrain.training.saver import RunSaver, checkpoint_bytes
    from disttrain.training.selection import ending
    from disttrain.training.train import train

    state, progress, choices = build(config, rank, group, index, checkpoint_path, force=flags.force)
    gc.freeze()  # imported modules are never freed; collections skip them from now on
    gc.enable()
    if rank.number == 0:
        if not folder.config.exists():
            write_atomically(folder.config, dump_config(config))
        folder.forget_after(progress.step, progress.epoch - progress.evaluation_due)
    observer = RunObserver(
        config, folder, state, progress, index, choices, verbosity=flags.verbosity,
        phase=lambda: rank.heartbeat.place[0],
    )  # fmt: skip
    writing = partial(_writing, rank, observer)
    saved = partial(_saved, observer, mirror)
    saver = RunSaver(state, progress, index, folder, done=saved, writing=writing)
    if rank.number == 0:
        warning = check_space(folder.checkpoints, checkpoint_bytes(state), config.checkpoint.keep)
        if warning is not None:
            observer.note(warning)

    def write_status(**status: Any) -> None:
        place = {"step": progress.step, "epoch": progress.epoch, "samples_seen": progress.samples_seen}
        rank.write_status(**status, **place)

    write_status(**_running(folder), world_size=state.world_size)
    callbacks = partial(Callbacks, observer, observer.gauges, saver, lambda: rank.stop)
    with observer, _copying(mirror, config, observer.note):
        if checkpoint_path is not None:
            observer.note(f"resuming from {checkpoint_path}, step {progress.step:,}")
        try:
            with _beating(rank, flags.profile, folder, group.device, observer.note) as beat:
                train(state, progress, callbacks(Phases(beat, group.device)))
        finally:
            with contextlib.suppress(DisttrainError):  # a checkpoint in progress is finished in any case
                saver.wait()
            write_status()
        why = ending(progress, config)
        write_status(state="finished", exit_code=0, reason=why)
        observer.finished(why)


def _saved(observer: RunObserver, mirror: Mirror | None, path: Path, best: bool) -> None:
    observer.saved(path, best)
    if mirror is not None:
        mirror.wake()


def _copying(
    mirror: Mirror | None, config: Config, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which checkpoints are copied to the mirror, if there is one."""
    if mirror is None:
        return contextlib.nullcontext()
    return mirror.copying(say, min(_COPYING_S, config.monitor.stall_timeout_s / 2))


def _running(folder: RunFolder) -> dict[str, Any]:
    """Returns the status of a run that begins or goes on."""
    earlier = folder.status()
    begun = {"started_at": earlier.get("started_at") or utc_now(), "restarts": earlier.get("restarts", 0)}
    return {**CLEAN, "state": "running", **begun}


@contextlib.contextmanager
def _beating(
    rank: Rank, profile: str | None, folder: RunFolder, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[Phase, int, int], None]]:
    """Yields what beats the heartbeat of a rank; a profiler listens to it if this rank has one."""
    if profile is None or (profile == "rank0" and rank.number):
        yield rank.heartbeat.beat
        return
    from disttrain.training.profiler import Profiler

    with Profiler(rank.heartbeat.beat, folder.profile, rank.number, device, say) as profiler:
        yield profiler.beat


@contextlib.contextmanager
def _writing(rank: Rank, observer: RunObserver) -> Iterator[None]:
    """Marks the writing of a checkpoint for the launcher, and first puts the metrics of its step on disk."""
    rank.heartbeat.saving(True)
    try:
        observer.sync()
        yield
    finally:
        rank.heartbeat.saving(False)


if __name__ == "__main__":
    main()
