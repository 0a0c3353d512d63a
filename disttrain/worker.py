"""What every rank runs: join the group, build the parts, train, and leave a truthful end behind.

Started by `disttrain run`, `accelerate launch -m disttrain.worker`, `torchrun -m disttrain.worker` or
`srun python -m disttrain.worker`; all of them lead to the same run. torch is imported only after the config
has been read, so that a mistake in it is told at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from disttrain import slurm
from disttrain.config import Config, dump_config, load_config
from disttrain.errors import (
    CheckpointError,
    DataError,
    DisttrainError,
    StoppedError,
    TrainingError,
    UsageError,
)
from disttrain.files import write_atomically
from disttrain.models import check_model_name
from disttrain.parallel import usable_cores
from disttrain.preflight import check_device, check_trackers, open_index, resume_point, split_batch
from disttrain.runfolder import RunFolder, new_run_path, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator, PartialState
    from torch import nn

    from disttrain.choices import Settings
    from disttrain.data.batches import Loader
    from disttrain.data.plan import Ids
    from disttrain.parts import Parts, Position
    from disttrain.shards.index import Index

log = logging.getLogger("disttrain")


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Run folder (default runs/<name>/<UTC time>)."
)
@click.option("--resume", default="auto", help="auto, never, or a run folder or checkpoint to go on from.")
@click.option("-q", "--quiet", is_flag=True, help="Show the outcome only.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def main(
    config_path: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: str,
    quiet: bool,
    verbose: bool,
) -> None:
    """Trains CONFIG as one rank of the group that the environment describes."""
    gc.disable()  # until all is imported and built: importing torch takes a fifth less time
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives torchrun
    os.environ.update(slurm.task_environment(os.environ))
    rank = Rank(int(os.environ.get("RANK", "0")), run_dir)
    try:
        config = load_config(config_path, overrides)
        check_model_name(config.model.name)
        run(config, rank, resume, verbosity=int(verbose) - int(quiet))
    except StoppedError as stop:
        rank.settle(state="stopped", exit_code=stop.exit_code, reason=str(stop))
        code = stop.exit_code
    except Exception as error:
        rank.fail(error)
        code = error.exit_code if isinstance(error, DisttrainError) else TrainingError.exit_code
    else:
        code = 0
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for the threads of a broken process group


class Rank:
    """This process's number, its run folder once that is known, and how it speaks.

    Args:
        number: rank among all processes.
        run_dir: the run folder, when it was given.
    """

    def __init__(self, number: int, run_dir: Path | None) -> None:
        self.number = number
        self.run_dir = run_dir
        self.folder: RunFolder | None = None
        self.stop = False
        self._terminal = os.dup(2)
        if run_dir is not None and (folder := RunFolder(run_dir)).locked_by_launcher():
            self.enter(folder)

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
        if self.number:
            with path.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)

    def listen(self) -> None:
        """Takes SIGTERM, SIGINT and SIGUSR2 as the wish to stop; a second one ends the process at once."""

        def request(number: int, _frame: object) -> None:
            self.stop = True
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, request)

    def settle(self, **status: Any) -> None:
        """Writes the end of the run into status.json, from rank 0."""
        if self.number == 0 and self.folder is not None:
            self.folder.update_status(**status)

    def fail(self, error: Exception) -> None:
        """Writes down what ended this rank; the first rank to fail says so and settles the run."""
        text = str(error) if isinstance(error, DisttrainError) else "".join(traceback.format_exception(error))
        first = self.number == 0
        if self.folder is not None:
            log.error("%s", text)
            self.folder.write_error(self.number, error)
            cause = self.folder.first_error()
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


def run(config: Config, rank: Rank, resume: str, *, verbosity: int) -> None:
    """Trains as one rank, from joining the group to leaving it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at start; used if train.reproducible
    import torch

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(config, device)
    split_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    if rank.number == 0:
        check_trackers(config)
    index = open_index(config, log.info)
    rank.listen()
    group = join(config, device)
    try:
        folder, checkpoint = enter_folder(config, rank, group, resume)
        if folder is not None:
            train_in_folder(config, rank, folder, group, index, checkpoint, verbosity)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def join(config: Config, device: Literal["cuda", "cpu"]) -> PartialState:
    """Joins the process group and sets what holds for all arithmetic of this process."""
    import torch
    from accelerate import PartialState

    torch.backends.cudnn.benchmark = not config.train.reproducible
    torch.use_deterministic_algorithms(config.train.reproducible)
    if device == "cpu":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // local_size)))
    group = PartialState(cpu=device == "cpu")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if group.num_processes != expected:
        raise UsageError(
            f"the launcher promised {expected} processes, the group has {group.num_processes}; "
            "use `disttrain run`, torchrun, or accelerate launch with a file from launch/"
        )
    return group


def enter_folder(
    config: Config, rank: Rank, group: PartialState, resume: str
) -> tuple[RunFolder | None, Path | None]:
    """Agrees on the run folder and on where to begin; rank 0 makes the folder. Every rank calls this.

    Returns:
        The run folder, or None when the run in it has finished already; and the checkpoint to go on from.
    """
    from accelerate.utils import broadcast_object_list

    agreed: list[Any] = [None, None]
    if rank.number == 0:
        folder = RunFolder(rank.run_dir or new_run_path(config.name))
        checkpoint, finished = resume_point(folder, resume, config)
        if finished:
            print(f"{folder.path}: this run has finished already; nothing to do", flush=True)
        else:
            folder.create()
            agreed = [str(folder.path), checkpoint and str(checkpoint.resolve())]
    if group.num_processes > 1:
        broadcast_object_list(agreed)
    path, checkpoint_path = agreed
    if path is None:
        return None, None
    if rank.number:
        folder = RunFolder(Path(path))
    if rank.folder is None:
        rank.enter(folder)
    return folder, Path(checkpoint_path) if checkpoint_path else None


def train_in_folder(
    config: Config,
    rank: Rank,
    folder: RunFolder,
    group: PartialState,
    index: Index,
    checkpoint_path: Path | None,
    verbosity: int,
) -> None:
    """Builds the parts, trains, and keeps the run folder. Every rank calls this."""
    from disttrain.observe import RunObserver
    from disttrain.parts import Hooks
    from disttrain.train import train

    parts, position, choices = build(config, rank, group, index, checkpoint_path)
    gc.freeze()  # what was imported stays for good; no collection looks at it again
    gc.enable()
    if rank.number == 0:
        if not folder.config.exists():
            write_atomically(folder.config, dump_config(config))
        folder.forget_after(position.step)
    observer = RunObserver(config, folder, parts, position, index, choices, verbosity=verbosity)
    saver = RunSaver(parts, position, index, folder, observer.saved)

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
            train(parts, position, Hooks(observer, observer.gauges, saver, lambda: rank.stop))
        finally:
            with contextlib.suppress(DisttrainError):  # whatever ended the run, what is being saved is kept
                saver.wait()
            settle()
        settle(state="finished", exit_code=0, reason="all epochs done")
        observer.finished()


class RunSaver:
    """Saves the checkpoints of a run: every rank averages its statistics, rank 0 writes.

    Args:
        parts: what is saved.
        position: where the run is.
        index: the data set.
        folder: the run folder.
        done: told of every complete checkpoint and whether it is the best.
    """

    def __init__(
        self,
        parts: Parts,
        position: Position,
        index: Index,
        folder: RunFolder,
        done: Callable[[Path, bool], None],
    ) -> None:
        from disttrain.checkpoint import Writer

        self._parts = parts
        self._position = position
        self._state = {
            "optimizer": parts.config.optim.name,
            "data_digest": data_digest(index, parts.plan.skipped),
            "arithmetic": {
                **dataclasses.asdict(parts.settings),
                "device": parts.accelerator.device.type,
                "world_size": parts.world_size,
            },
        }
        self._writer = (
            Writer(folder.checkpoints, parts.config.checkpoint.keep, done) if parts.rank == 0 else None
        )

    def save(self, *, best: bool, stopping: bool = False) -> None:
        """Takes a snapshot and begins to write it. Every rank calls this."""
        from disttrain.checkpoint import snapshot
        from disttrain.collectives import average_buffers
        from disttrain.rank_state import gather_rank_states

        parts = self._parts
        # At a step where a run that is not stopped saves nothing, each rank's statistics are kept apart.
        ranks = gather_rank_states(parts, with_buffers=stopping and parts.world_size > 1)
        average_buffers(parts, parts.bare_model)
        if parts.ema is not None:
            average_buffers(parts, parts.ema.module)
        if self._writer is not None:
            scaler = parts.accelerator.scaler
            tensors = {
                "model": parts.bare_model.state_dict(),
                "optimizer": parts.optimizer.state_dict(),
                "ranks": ranks,
            }
            if parts.ema is not None:
                tensors["ema"] = parts.ema.state_dict()
            state = dataclasses.asdict(self._position) | self._state
            state["scaler"] = scaler.state_dict() if scaler else None
            self._writer.begin(snapshot(self._position.step, tensors, state), best)

    def check(self) -> None:
        """Reports a save that has ended."""
        if self._writer is not None:
            self._writer.check()

    def wait(self) -> None:
        """Returns when everything is saved."""
        if self._writer is not None:
            self._writer.wait()


def build(
    config: Config, rank: Rank, group: PartialState, index: Index, checkpoint_path: Path | None
) -> tuple[Parts, Position, dict[str, str]]:
    """Makes model, optimizer, data and augmentation, in the state of the checkpoint if there is one.

    Every rank calls this.

    Returns:
        The parts, where to begin, and what was chosen for the user and why.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from disttrain.augment import Augment
    from disttrain.checkpoint import load, restore
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
    steps_left = plan.steps_per_epoch * config.train.epochs - (checkpoint.state["step"] if checkpoint else 0)
    saved = checkpoint.state["arithmetic"] if checkpoint else None
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
        if checkpoint.state["optimizer"] != config.optim.name:
            raise CheckpointError(
                f"{checkpoint_path}: was saved with optim.name = {checkpoint.state['optimizer']}, "
                f"the config has {config.optim.name}; resume with the config it was saved with"
            )
        if checkpoint.state["data_digest"] != data_digest(index, plan.skipped):
            raise UsageError(
                f"{checkpoint_path}: {index.name} is not the data set it was trained on (index.json or the "
                "samples left out have changed); bring that back or begin another run"
            )
        restore(checkpoint, model, optimizer, ema)
        fields = {field.name for field in dataclasses.fields(Position)}
        position = Position(**{key: value for key, value in checkpoint.state.items() if key in fields})
    model = accelerator.prepare(model)
    if accelerator.num_processes > 1:
        # Batch-norm statistics are averaged when they are used, not broadcast in every step. Set here because
        # the constructor's argument has a new name in each torch.
        model.broadcast_buffers = False
    if checkpoint is not None and accelerator.scaler is not None and checkpoint.state["scaler"]:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
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
        restore_rank_state(parts, checkpoint.parts["ranks"])
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


def data_digest(index: Index, skipped: Ids) -> str:
    """Returns what tells the samples of a run from others: the digest of the index and what is left out."""
    if len(skipped) == 0:
        return index.digest
    return hashlib.sha256(index.digest.encode() + skipped.tobytes()).hexdigest()


if __name__ == "__main__":
    main()
