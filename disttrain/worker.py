"""What every rank runs: join the group, build the parts, train, and leave a truthful end behind.

Started by `disttrain run`, `accelerate launch -m disttrain.worker`, `torchrun -m disttrain.worker` or
`srun python -m disttrain.worker`; all of them lead to the same run. torch is imported only after the config
has been read, so that a mistake in it is told at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from disttrain import slurm
from disttrain.config import Config, dump_config, load_config
from disttrain.errors import (
    BusyError,
    CheckpointError,
    DataError,
    DisttrainError,
    HangError,
    StoppedError,
    StorageError,
    TrainingError,
    UsageError,
)
from disttrain.files import storage_error, write_atomically
from disttrain.manifest import set_aside
from disttrain.models import check_model_name
from disttrain.network import interface_to, own_name_leads_here
from disttrain.parallel import usable_cores
from disttrain.peers import compare_peers, facts
from disttrain.preflight import (
    Start,
    changes_since,
    check_device,
    check_shared_memory,
    check_space,
    check_trackers,
    identity,
    open_index,
    refuse,
    resume_point,
    saved_identity,
    split_batch,
)
from disttrain.pulse import STACKS, STOP, Phase, Pulse, doing, pack
from disttrain.runfolder import RunFolder, new_run_path, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator, PartialState
    from torch import nn

    from disttrain.checkpoint import Checkpoint
    from disttrain.choices import Settings
    from disttrain.data.batches import Loader
    from disttrain.data.plan import Ids
    from disttrain.parts import Parts, Position
    from disttrain.shards.index import Index

log = logging.getLogger("disttrain")

_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
_SECOND_S = 1.0  # Ctrl-C in a terminal reaches a rank of torchrun twice: from the terminal and from torchrun


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Run folder (default runs/<name>/<UTC time>)."
)
@click.option("--resume", default="auto", help="auto, never, or a run folder or checkpoint to go on from.")
@click.option("--force", is_flag=True, help="Go on although config or data set differ from the checkpoint's.")
@click.option("-q", "--quiet", is_flag=True, help="Show the outcome only.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def main(
    config_path: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: str,
    force: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Trains CONFIG as one rank of the group that the environment describes."""
    gc.disable()  # until all is imported and built: importing torch takes a fifth less time
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives torchrun
    os.environ.update(slurm.task_environment(os.environ))
    rank = Rank(int(os.environ.get("RANK", "0")), run_dir)
    rank.listen()
    try:
        config = load_config(config_path, overrides)
        check_model_name(config.model.name)
        run(config, rank, resume, force=force, verbosity=int(verbose) - int(quiet))
    except StoppedError as stop:
        code = stop.exit_code
        try:
            rank.settle(state="stopped", exit_code=code, reason=str(stop))
        except StorageError as error:
            rank.fail(error)
            code = error.exit_code
    except (Exception, SystemExit) as error:  # a model that calls sys.exit has not finished the run
        rank.fail(error)
        code = error.exit_code if isinstance(error, DisttrainError) else TrainingError.exit_code
    else:
        code = 0
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    rank.pulse.leave(code)
    os._exit(code)  # without waiting for the threads of a broken process group


class Rank:
    """This process's number, its run folder once that is known, and how it speaks.

    Args:
        number: rank among all processes.
        run_dir: the run folder, when it was given.

    Attributes:
        folder: the run folder, once it is known.
        stop: whether this rank was asked to stop.
        pulse: shows the launcher that it lives.
    """

    def __init__(self, number: int, run_dir: Path | None) -> None:
        self.number = number
        self.run_dir = run_dir
        self.folder: RunFolder | None = None
        self.stop = False
        self._began = utc_now()
        self._terminal = os.dup(2)
        if run_dir is not None and (folder := RunFolder(run_dir)).locked_by_launcher():
            self.enter(folder)
        self.pulse = Pulse.connect(os.environ, number)

    def enter(self, folder: RunFolder) -> None:
        """Begins to log into the folder; ranks but 0 send everything they print there too."""
        self.folder = folder
        path = folder.log(self.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
        form = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
        formatter = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.info("rank %d, process %d on %s", self.number, os.getpid(), socket.gethostname())
        self._stacks = path.open("a")
        faulthandler.register(STACKS, self._stacks)
        if self.number:
            with path.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)

    def listen(self) -> None:
        """Takes SIGTERM, SIGINT, SIGUSR2 and the launcher's word as the wish to stop; ends with the launcher.

        A thread hears them, so that they count while the main thread waits for others.
        """
        here, there = socket.socketpair()
        there.setblocking(False)
        for number in _STOPS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        hear = self._hear_signals if self.pulse.connection is None else self._hear_launcher
        threading.Thread(target=hear, args=(here, there), daemon=True).start()

    def _hear_signals(self, here: socket.socket, _there: socket.socket) -> None:
        asked_at = None
        while True:
            for number in _STOPS & set(here.recv(64)):
                if asked_at is None and self.pulse.place[0] is Phase.START:
                    stop = StoppedError(
                        "stopped before training began; nothing is lost, the same command goes on"
                    )
                    self.settle(state="stopped", exit_code=stop.exit_code, reason=str(stop))
                    if self.number == 0:
                        os.write(self._terminal, f"disttrain: {stop}\n".encode())
                    os._exit(stop.exit_code)
                now = time.monotonic()
                asked_at = now if asked_at is None else asked_at
                if now - asked_at > _SECOND_S:
                    os._exit(128 + number)
                self.stop = True

    def _hear_launcher(self, here: socket.socket, _there: socket.socket) -> None:
        launcher = self.pulse.connection
        assert launcher is not None
        while True:
            for ready in wait_for_any([here, launcher]):
                if ready is launcher:
                    try:
                        word = launcher.recv(64)
                    except OSError:
                        word = b""
                    if word != STOP:
                        os.kill(os.getpid(), signal.SIGKILL)  # it has died: nobody would end this process
                    self.stop = True
                else:
                    stops = _STOPS & set(here.recv(64))
                    if signal.SIGTERM in stops and self.pulse.place[0] is Phase.START:
                        os._exit(128 + signal.SIGTERM)  # torchrun, because another rank could not start
                    self.stop = self.stop or bool(stops)

    def settle(self, **status: Any) -> None:
        """Writes the end of the run into status.json, from rank 0."""
        if self.number == 0 and self.folder is not None:
            self.folder.update_status(**status)

    def fail(self, error: BaseException) -> None:
        """Writes down what ended this rank; the first rank to fail says so and settles the run."""
        text = str(error) if isinstance(error, DisttrainError) else "".join(traceback.format_exception(error))
        first = self.number == 0
        if self.folder is not None:
            log.error("%s", text)
            with contextlib.suppress(StorageError):  # it is said on the terminal, and by the exit code
                self.folder.write_error(self.number, error)
                cause = self.folder.first_error(since=self._began)
                first = cause is not None and cause["rank"] == self.number
                if first and cause is not None:
                    self.folder.update_status(
                        state="failed",
                        exit_code=cause["exit_code"],
                        reason=cause["message"],
                        rank=self.number,
                        host=cause["host"],
                    )
        if first:
            name = f"rank {self.number}: " if self.number else ""
            os.write(self._terminal, f"disttrain: {name}{text.rstrip()}\n".encode())


def run(config: Config, rank: Rank, resume: str, *, force: bool, verbosity: int) -> None:
    """Trains as one rank, from joining the group to leaving it.

    Raises:
        HangError: another rank did not come, or did not answer.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at start; used if train.reproducible
    rank.pulse.beat(Phase.START, 0, 1)
    import torch
    import torch.distributed as dist

    rank.pulse.beat(Phase.START, 0, 2)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(config, device)
    check_shared_memory(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    split_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    if rank.number == 0:
        check_trackers(config)
    index = open_index(config, log.info)
    rank.pulse.beat(Phase.START, 0, 3)
    group = join(config, device)
    rank.pulse.beat(Phase.START, 0, 4)
    stopped = None
    try:
        if rank.pulse.connection is None and group.num_processes > 1:  # else the launchers have compared
            gathered: list[Any] = [None] * group.num_processes
            dist.all_gather_object(gathered, (socket.gethostname(), facts(config, index)))
            compare_peers({f"rank {i} on {host}": found for i, (host, found) in enumerate(gathered)})
        folder, checkpoint = enter_folder(config, rank, group, index, resume, force=force)
        rank.pulse.beat(Phase.START, 0, 5)
        if folder is not None:
            train_in_folder(config, rank, folder, group, index, checkpoint, verbosity, force=force)
    except StoppedError as stop:
        stopped = stop
    except RuntimeError as error:
        if (isinstance(error, dist.DistError) or "gloo" in str(error)) and _TIMED_OUT.search(str(error)):
            raise HangError(
                f"rank {rank.number} on {socket.gethostname()} waited {_patience_s(config):g} s for the "
                f"others {doing(pack(*rank.pulse.place))}: one of them hangs or is gone"
            ) from error
        raise
    if dist.is_initialized():
        # Only together: torchrun ends the others as soon as one has gone, and rank 0 may still be saving. A
        # rank that fails leaves without, because the others would hear of that before anyone knows the cause.
        with contextlib.nullcontext() if stopped is None else contextlib.suppress(RuntimeError):
            dist.barrier()
            dist.destroy_process_group()
    if stopped is not None:
        raise stopped


_TIMED_OUT = re.compile(r"time(d )?out", re.IGNORECASE)


def _patience_s(config: Config) -> float:
    """Returns the seconds for which a rank waits for others; a launcher that watches it is sooner."""
    return config.monitor.stall_timeout_s + 30


def join(config: Config, device: Literal["cuda", "cpu"]) -> PartialState:
    """Joins the process group and sets what holds for all arithmetic of this process.

    Raises:
        BusyError: the port on which the ranks meet is taken.
        HangError: another rank has not come.
        UsageError: the group is smaller than promised.
    """
    import torch
    from accelerate import PartialState

    torch.backends.cudnn.benchmark = not config.train.reproducible
    torch.use_deterministic_algorithms(config.train.reproducible)
    if device == "cpu":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // local_size)))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    patience = datetime.timedelta(seconds=_patience_s(config))
    if expected > int(os.environ.get("LOCAL_WORLD_SIZE", "1")) and not own_name_leads_here():
        interface = interface_to(os.environ["MASTER_ADDR"])
        if interface is not None and os.environ.setdefault("GLOO_SOCKET_IFNAME", interface) == interface:
            log.info("gloo listens on %s, because the name of this host leads nowhere", interface)
    try:
        group = PartialState(cpu=device == "cpu", timeout=patience)
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise BusyError(f"{address} is taken on {socket.gethostname()}; choose another port") from None
        if not _TIMED_OUT.search(str(error)):
            raise
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        who = f"{came[1]} of {expected} ranks joined; " if came else ""
        raise HangError(
            f"{who}rank {os.environ.get('RANK')} waited {patience.total_seconds():g} s for the others at "
            f"{address}; look for the ranks that did not start"
        ) from None
    if group.num_processes != expected:
        raise UsageError(
            f"the launcher promised {expected} processes, the group has {group.num_processes}; "
            "use `disttrain run`, torchrun, or accelerate launch with a file from launch/"
        )
    return group


def enter_folder(
    config: Config, rank: Rank, group: PartialState, index: Index, resume: str, *, force: bool
) -> tuple[RunFolder | None, Path | None]:
    """Agrees on the run folder and on where to begin; rank 0 makes the folder. Every rank calls this.

    Returns:
        The run folder, or None when the run in it has finished already; and the checkpoint to go on from.
    """
    from accelerate.utils import broadcast_object_list

    agreed: list[Any] = [None, None]
    if rank.number == 0:
        folder = RunFolder(rank.run_dir or new_run_path(config.name))
        if folder.is_run():
            folder.create()  # its lock: what a run that goes on there does meanwhile is no damage
        now = identity(config, index, None if config.data.on_error == "skip" else ())
        start = resume_point(folder, resume, now, force=force)
        if start.finished:
            print(f"{folder.path}: this run has finished already; nothing to do", flush=True)
        else:
            folder.create()
            checkpoint = prepare_folder(folder, config, now, start)
            agreed = [str(folder.path), checkpoint and str(checkpoint.resolve())]
    if group.num_processes > 1:
        broadcast_object_list(agreed)
    path, checkpoint_path = agreed
    if path is None:
        return None, None
    if rank.number:
        folder = RunFolder(Path(path))
        folder.check_writable("logs", "errors")
    if rank.folder is None:
        rank.enter(folder)
    return folder, Path(checkpoint_path) if checkpoint_path else None


def prepare_folder(folder: RunFolder, config: Config, now: dict[str, Any], start: Start) -> Path | None:
    """Makes a run folder ready to begin as decided, and says what was found. Rank 0 alone calls this.

    Args:
        folder: made and locked.
        config: of this run; takes the place of another one in the folder.
        now: the identity of this run.
        start: what was decided.

    Returns:
        The checkpoint to go on from.
    """
    checkpoint, notes = start.checkpoint, list(start.notes)
    if checkpoint is not None:
        if checkpoint.resolve().parent == folder.checkpoints.resolve():
            try:
                checkpoint, lines = set_aside(checkpoint, start.step)
            except OSError as error:
                raise storage_error(folder.checkpoints, error) from None
            notes += lines
        else:
            folder.update_status(began_from=str(checkpoint.resolve()))
    if start.changes:
        folder.record_forced(start.step, start.changes)
        notes += [f"--force: going on with {change}" for change in start.changes]
    if folder.config.exists():
        old = load_config(folder.config)
        if changes_since({"config": old.model_dump(mode="json")}, now):
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
    verbosity: int,
    *,
    force: bool,
) -> None:
    """Builds the parts, trains, and keeps the run folder. Every rank calls this."""
    from disttrain.observe import RunObserver
    from disttrain.parts import Hooks
    from disttrain.phases import Phases
    from disttrain.saver import RunSaver, checkpoint_bytes
    from disttrain.train import train

    parts, position, choices = build(config, rank, group, index, checkpoint_path, force=force)
    gc.freeze()  # what was imported stays for good; no collection looks at it again
    gc.enable()
    if rank.number == 0:
        if not folder.config.exists():
            write_atomically(folder.config, dump_config(config))
        folder.forget_after(position.step, position.epoch - position.evaluation_due)
    observer = RunObserver(config, folder, parts, position, index, choices, verbosity=verbosity)

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        rank.pulse.saving(True)
        try:
            observer.sync()
            yield
        finally:
            rank.pulse.saving(False)

    saver = RunSaver(parts, position, index, folder, done=observer.saved, writing=writing)
    if rank.number == 0:
        warning = check_space(folder.checkpoints, checkpoint_bytes(parts), config.checkpoint.keep)
        if warning is not None:
            observer.note(warning)

    def settle(**status: Any) -> None:
        place = {"step": position.step, "epoch": position.epoch, "samples_seen": position.samples_seen}
        rank.settle(**status, **place)

    settle(
        state="running",
        exit_code=None,
        reason=None,
        rank=None,
        host=None,
        world_size=parts.world_size,
        started_at=folder.status().get("started_at") or utc_now(),
        restarts=folder.status().get("restarts", 0),
    )
    with observer:
        if checkpoint_path is not None:
            observer.note(f"going on from {checkpoint_path}, step {position.step:,}")
        try:
            phases = Phases(rank.pulse.beat, group.device)
            train(parts, position, Hooks(observer, observer.gauges, saver, lambda: rank.stop, phases))
        finally:
            with contextlib.suppress(DisttrainError):  # whatever ended the run, what is being saved is kept
                saver.wait()
            settle()
        settle(state="finished", exit_code=0, reason="all epochs done")
        observer.finished()


def build(
    config: Config,
    rank: Rank,
    group: PartialState,
    index: Index,
    checkpoint_path: Path | None,
    *,
    force: bool = False,
) -> tuple[Parts, Position, dict[str, str]]:
    """Makes model, optimizer, data and augmentation, in the state of the checkpoint if there is one.

    Every rank calls this. With `force`, config or data set may differ from the checkpoint's.

    Returns:
        The parts, where to begin, and what was chosen for the user and why.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from disttrain.augment import Augment
    from disttrain.checkpoint import load, restore, restore_scaler
    from disttrain.data.plan import make_plan, usable_ids
    from disttrain.models import build_model
    from disttrain.optim import build_optimizer
    from disttrain.parts import Parts, Position
    from disttrain.rank_state import restore_rank_state, seed_own_code

    device = group.device
    say = print if rank.number == 0 else log.info
    choices: dict[str, str] = {}
    skipped = skipped_samples(config, index, group, say)
    plan = make_plan(config, index, skipped["train"])
    loaders = open_loaders(config, index, skipped, group, say, choices)

    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name,
        num_classes=len(index.classes),
        in_channels=index.channels,
        image_size=(index.height, index.width),
        args=config.model.args,
    ).to(device)
    checkpoint = load(checkpoint_path) if checkpoint_path is not None else None
    steps_left = plan.steps_per_epoch * config.train.epochs - (checkpoint.value("step") if checkpoint else 0)
    saved = checkpoint.value("arithmetic") if checkpoint else None
    accelerator, settings = prepare_arithmetic(config, group, model, index, steps_left, saved, choices)
    augment = Augment(
        config.augment,
        seed=config.seed,
        mean=index.mean if config.data.normalize == "mean_std" else (0.0,) * index.channels,
        std=index.std if config.data.normalize == "mean_std" else (1.0,) * index.channels,
        device=device,
        channels_last=settings.channels_last,
    )
    if checkpoint is None and hasattr(model, "init_from_images"):
        with contextlib.closing(loaders["train"].batches(plan.ids, [slice(0, INIT_IMAGES)])) as batches:
            cast(Any, model).init_from_images(augment.plain(next(batches).images))
    ema = None
    if config.train.ema is not None:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema), use_buffers=True)
    optimizer, rates = build_optimizer(config.optim, config.schedule, model)
    position = Position()
    if checkpoint is not None:
        if checkpoint.value("optimizer") != config.optim.name:
            raise CheckpointError(
                f"{checkpoint_path}: was saved with optim.name = {checkpoint.value('optimizer')}, "
                f"the config has {config.optim.name}; resume with the config it was saved with"
            )
        fields = dataclasses.fields(Position)
        position = Position(**{field.name: checkpoint.value(field.name) for field in fields})
        now = identity(config, index, plan.skipped.tolist())
        if check_identity(checkpoint, now, rank, force=force) and position.samples:
            say(f"the samples have another order now: epoch {position.epoch + 1} begins again")
            position.samples = 0
        restore(checkpoint, model, optimizer, ema, force=force)
        restore_scaler(checkpoint, accelerator.scaler, force=force)
    model = accelerator.prepare(model)
    if accelerator.num_processes > 1:
        # Batch-norm statistics are averaged when they are used, not broadcast in every step. Set here because
        # the constructor's argument has a new name in each torch.
        model.broadcast_buffers = False
        model._set_ddp_runtime_logging_sample_rate(config.monitor.log_every_steps)
    parts = Parts(
        config=config,
        accelerator=accelerator,
        model=model,
        ema=ema,
        optimizer=optimizer,
        rates=rates,
        plan=plan,
        augment=augment,
        train_data=loaders["train"],
        val_data=loaders["val"],
        val_ids=usable_ids(index.splits["val"].samples, skipped["val"]),
        val_skipped=len(skipped["val"]),
        image_size=(index.height, index.width),
        settings=settings,
        compiled_batch=split_batch(config, group.num_processes) if settings.compiled else None,
    )
    if checkpoint is not None and parts.world_size > 2:
        settle_buckets(parts, (index.channels, index.height, index.width))
    seed_own_code(config.seed, rank.number)
    if checkpoint is not None:
        restore_rank_state(parts, checkpoint.part("ranks"))
    return parts, position, choices


def settle_buckets(parts: Parts, image: tuple[int, int, int]) -> None:
    """Lets DDP order its gradient buckets, as it does after the first step of a run. Every rank calls this.

    The place of a gradient in its bucket decides in which order more than two ranks are summed up: without
    this, the first step of a run that goes on would differ in the last bit from one that was never stopped.

    Args:
        parts: of a run that goes on; only the generators of random numbers change.
        image: channels, height and width.
    """
    import torch

    from disttrain.parts import as_written

    buffers = [(buffer, buffer.clone()) for buffer in parts.bare_model.buffers()]
    with as_written(parts):
        parts.model(torch.zeros(2, *image, device=parts.accelerator.device)).sum().backward()
    parts.optimizer.zero_grad(set_to_none=True)
    for buffer, saved in buffers:
        buffer.copy_(saved)


def check_identity(checkpoint: Checkpoint, now: dict[str, Any], rank: Rank, *, force: bool) -> bool:
    """Compares config and data set with those of the checkpoint, now that what is left out is known.

    Returns:
        Whether the order of the samples is another one, so that what is left of an epoch cannot be told.

    Raises:
        CheckpointError: the checkpoint does not say what it was saved with.
        UsageError: they differ, and that is not forced.
    """
    saved = saved_identity(checkpoint.path, checkpoint.state)
    changes = changes_since(saved, now)
    if changes and not force:
        raise refuse(f"{checkpoint.path}: was saved with", changes)
    left_out = [change for change in changes if change.startswith("data.skipped")]
    found_late = left_out and now["config"]["data"]["on_error"] == "skip"
    if found_late and rank.number == 0 and rank.folder is not None:
        rank.folder.record_forced(checkpoint.value("step"), left_out)
    return bool(saved["order"] != now["order"])


INIT_IMAGES = 5000
"""Training images at most that a model with `init_from_images` sees before the first step."""


def prepare_arithmetic(
    config: Config,
    group: PartialState,
    model: nn.Module,
    index: Index,
    steps: int,
    saved: dict[str, Any] | None,
    choices: dict[str, str],
) -> tuple[Accelerator, Settings]:
    """Chooses precision, memory order, compilation, threads and bucket size and applies them to the model.

    Every rank calls this.

    Args:
        config: what the user has set.
        group: the process group.
        model: on its device; is put into the chosen memory order and compiled.
        index: the data set.
        steps: optimizer steps in the rest of the run.
        saved: the settings kept in the checkpoint that is gone on from, with their device and world size, or
            None.
        choices: takes what is chosen and why.

    Returns:
        The accelerator, and what was chosen.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from disttrain.choices import Workload, allow_tf32, bucket_mib, choose

    batch = split_batch(config, group.num_processes)
    choice = choose(
        config.train,
        Workload(
            model,
            batch,
            (index.channels, index.height, index.width),
            len(index.classes),
            steps * config.train.accumulate,
            group.num_processes,
        ),
        threads=torch.get_num_threads(),
        saved=saved,
    )
    choices |= choice.reasons
    settings = choice.settings
    allow_tf32(settings.precision == "tf32")
    if group.device.type == "cpu":
        torch.set_num_threads(settings.threads)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.compiled:
        model.compile(dynamic=False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    bucket, reason = bucket_mib(trained, group.device)
    if group.num_processes > 1:
        choices["bucket"] = f"{bucket:.3g} MiB: {reason}"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # a launcher's setting is not part of the experiment
    accelerator = Accelerator(
        cpu=group.device.type == "cpu",
        mixed_precision=settings.precision if settings.precision in {"bf16", "fp16"} else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=bucket)],
    )
    return accelerator, settings


def skipped_samples(
    config: Config, index: Index, group: PartialState, say: Callable[[str], None]
) -> dict[str, Ids]:
    """Returns the ids of each split that cannot be used on any node. Every rank calls this."""
    import numpy as np
    from accelerate.utils import gather_object

    from disttrain.shards.verify import survey

    skipped = {split: np.empty(0, np.int64) for split in ("train", "val")}
    if config.data.on_error == "skip":
        for split in skipped:
            found = survey(index, split, say)
            if group.num_processes > 1:
                found = np.unique(np.concatenate(gather_object([found])))
            skipped[split] = found
            if len(found) == index.splits[split].samples:
                raise DataError(
                    f"{index.base or index.folder}: no sample of the {split} split can be used; "
                    f"`disttrain data verify {index.name}` tells why"
                )
    return skipped


def open_loaders(
    config: Config,
    index: Index,
    skipped: dict[str, Ids],
    group: PartialState,
    say: Callable[[str], None],
    choices: dict[str, str],
) -> dict[str, Loader]:
    """Returns what serves each split to this rank; `choices` takes how and why."""
    from disttrain.data.batches import choose_place
    from disttrain.data.cached import Cached, open_split
    from disttrain.data.streamed import Streamed
    from disttrain.shards.images import expect_images

    device = group.device
    place, reason = choose_place(config.data.cache, index.decoded_bytes, device)
    choices["cache"] = f"{place}: {reason}"
    if place != "none":
        return {
            split: Cached(open_split(index, split, skipped[split], say), device, place)
            for split in ("train", "val")
        }
    workers = config.data.workers
    if workers is None:
        workers = max(1, min(8, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    expect_images(index.splits["train"].samples * config.train.epochs // group.num_processes)
    size = config.train.batch_size // group.num_processes
    loaders = {
        split: Streamed(index, split, device, batch_size=size, workers=workers, say=say)
        for split in ("train", "val")
    }
    choices["cache"] += (
        f"; {config.data.streams} streams, {workers} decoding threads per process, at most "
        f"{loaders['train'].most_bytes / 2**20:,.1f} MiB of decoded samples under way in each"
    )
    return dict(loaders)


if __name__ == "__main__":
    main()
