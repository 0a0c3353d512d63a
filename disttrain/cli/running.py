"""The commands run, bench, top and doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from disttrain.cli.shared import (
    COUNT,
    JSON,
    NODE,
    PATH,
    PROCESSES,
    REPORT,
    SECONDS,
    aside,
    ready_to_measure,
    say,
)
from disttrain.errors import UsageError
from disttrain.urls import without_secrets

if TYPE_CHECKING:
    from disttrain.config import Config
    from disttrain.launch.plan import LaunchPlan
    from disttrain.launch.prepare import Ready
    from disttrain.launch.secret import Secret
    from disttrain.launch.supervisor import Outcome
    from disttrain.runs.runfolder import RunFolder
    from disttrain.shards.index import Index
    from disttrain.slurm_env import Node

_REPORT_EVAL_S = "10"  # time limit for evaluating the best checkpoint in the report of a finished run
_STOPPED = {75, 130, 138, 140, 143}  # no report: the run will be resumed, or was ended by a signal


def _check_profile(_: click.Context, __: click.Parameter, which: str | None) -> str | None:
    """Returns the value of --profile, which without one takes the next word of the command for its value."""
    if which not in {None, "rank0", "all"}:
        raise UsageError(
            f"--profile {which}: expected rank0 or all; write --profile last, or --profile=rank0"
        )
    return which


@click.command()
@click.argument("config_path", metavar="CONFIG", type=PATH)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--gpus", type=COUNT, help="GPUs on this node (default: all visible).")
@click.option("--procs", type=COUNT, help="CPU processes, instead of GPUs.")
@click.option("--nodes", type=COUNT, help="Number of nodes (default: from Slurm, else 1).")
@NODE
@click.option("--run-dir", type=PATH, help="Run folder (default: runs/<name>/<UTC time>).")
@click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    help="auto: resume an unfinished run in --run-dir; PATH: start from this run or checkpoint.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Resume although config or data set have changed; the run folder records the changes.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    help="Number of restarts from the last checkpoint after a crash.",
)
@click.option(
    "--wait-for-nodes",
    "wait_for_nodes_s",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="A restart waits this long for a node, then goes on without it. A node that returns is taken back.",
)
@click.option("--min-nodes", type=COUNT, default=1, help="The fewest nodes to go on with.")
@click.option(
    "--profile",
    is_flag=False,
    flag_value="rank0",
    metavar="[all]",
    callback=_check_profile,
    help="Write a trace of a few steps of rank 0, or of all ranks, into the run folder.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and start nothing.")
@REPORT
@click.option("-q", "--quiet", is_flag=True, help="Show only the outcome.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def run(
    config_path: Path,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    nodes: int | None,
    run_dir: Path | None,
    resume: str,
    force: bool,
    max_restarts: int,
    profile: str | None,
    dry_run: bool,
    report: bool,
    quiet: bool,
    verbose: bool,
    **place: Any,
) -> None:
    """Train the experiment in CONFIG.

    KEY=VALUE overrides a setting, for example optim.lr=0.1. train.batch_size is the global batch, so the
    number of GPUs does not change the experiment.
    """
    from disttrain.config import dump_config
    from disttrain.launch.plan import LaunchPlan, plan_nodes, plan_secret
    from disttrain.launch.prepare import check_run, processes_here, say_gpu_troubles
    from disttrain.launch.rendezvous import sharing_failures
    from disttrain.launch.secret import Secret
    from disttrain.models import check_model_name
    from disttrain.runs.runfolder import RunFolder, new_run_path

    elastic = _take_elastic(place, max_restarts)
    node = plan_nodes(nodes, **place, environ=os.environ)
    secret = Secret.of(os.environ, plan_secret(run_dir, os.environ)) if node else Secret()
    with sharing_failures(None if dry_run else node, secret):
        config = _read_config(config_path, overrides, run_dir)
        check_model_name(config.model.name)
        here = processes_here(gpus=gpus, procs=procs)
        say_gpu_troubles(here.device, procs, aside)
        run_dir, resume = _where_to_begin(run_dir, resume, config, node)
        plan = LaunchPlan(
            config_path,
            tuple(map(without_secrets, overrides)),  # the ranks get the config from the environment
            run_dir or Path("runs") / config.name / "<UTC time>",
            resume,
            **here._asdict(),
            **((node._asdict() if node else {}) | elastic),
            verbosity=int(verbose) - int(quiet),
            force=force,
            profile=profile,
            config=dump_config(config),
            stall_timeout_s=config.monitor.stall_timeout_s,
        )
        ready = check_run(plan, config, dry_run=dry_run, say=click.echo)
        if ready is None or dry_run:
            _show(plan, config, ready)
            return
        folder = ready.folder if run_dir else RunFolder(new_run_path(config.name))
        folder.create() if plan.node_rank == 0 else folder.check_writable("logs", "errors")
    _train(plan, folder, config, ready.index, secret, max_restarts=max_restarts, report=report)


def _take_elastic(place: dict[str, Any], max_restarts: int) -> dict[str, Any]:
    """Takes what to do about lost nodes out of the options of the nodes, for the launch plan."""
    elastic = {name: place.pop(name) for name in ("wait_for_nodes_s", "min_nodes")}
    if elastic["wait_for_nodes_s"] is not None and max_restarts == 0:
        raise UsageError("--wait-for-nodes: to go on without a node is a restart; add --max-restarts N")
    return elastic


def _where_to_begin(
    run_dir: Path | None, resume: str, config: Config, node: Node | None
) -> tuple[Path | None, str]:
    """Returns the run folder, None for a new one, and what to resume from; a requeued job goes on."""
    from disttrain import slurm_env
    from disttrain.launch.plan import plan_run_dir
    from disttrain.runs.resume import resume_again
    from disttrain.runs.runfolder import RunFolder

    run_dir = run_dir or plan_run_dir(config.name, node, os.environ)
    if run_dir and slurm_env.requeued(os.environ):
        resume = resume_again(RunFolder(run_dir), resume)
    return run_dir, resume


def _read_config(config_path: Path, overrides: tuple[str, ...], run_dir: Path | None) -> Config:
    """Returns the config of a run. A requeued job keeps the one that it began with."""
    from disttrain import slurm_env
    from disttrain.config import differences, load_config
    from disttrain.runs.runfolder import RunFolder

    begun = RunFolder(run_dir).config if run_dir and slurm_env.requeued(os.environ) else None
    if begun is None or not begun.is_file():
        return load_config(config_path, overrides)
    config = load_config(begun)
    try:
        changes = differences(config, load_config(config_path, overrides))
    except UsageError as error:
        changes = [str(error)]
    if changes:
        aside(f"{config_path}: has changed since the job began ({changes[0]}); continuing with {begun}")
    return config


def _show(plan: LaunchPlan, config: Config, ready: Ready | None) -> None:
    """Prints the plan of a run, or that it has already finished."""
    if ready is None:
        from disttrain.runs.resume import finished_text
        from disttrain.runs.runfolder import RunFolder

        click.echo(finished_text(RunFolder(plan.run_dir)))
        return
    from disttrain.launch.dryrun import plan_lines

    for label, text in plan_lines(plan, config, ready):
        click.echo(f"{label:<11} {text}")


def _train(
    plan: LaunchPlan,
    folder: RunFolder,
    config: Config,
    index: Index,
    secret: Secret,
    *,
    max_restarts: int,
    report: bool,
) -> NoReturn:
    """Trains until the run ends, tells the outcome, writes the report, and exits with the run's code."""
    from disttrain.launch.launcher import launch
    from disttrain.runs.agreement import shared_facts

    plan, facts = replace(plan, run_dir=folder.path), shared_facts(config, index)
    outcome = launch(plan, folder, max_restarts=max_restarts, say=say, facts=facts, secret=secret)
    if outcome.detail:
        aside(outcome.detail.rstrip())
    if outcome.message:
        aside(f"disttrain: {outcome.message}")
    if report and plan.node_rank == 0 and folder.metrics.exists() and outcome.exit_code not in _STOPPED:
        seconds = "0" if outcome.exit_code else _REPORT_EVAL_S
        command = [sys.executable, "-m", "disttrain", "report", str(folder.path), "--seconds", seconds]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:  # does not affect the exit code of the run
            why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            aside(f"cannot write the report ({why[0]}); try `disttrain report {folder.path}`")
        elif plan.verbosity >= 0:
            say(f"report: {folder.path / 'report.html'}")
    if plan.node_rank == 0:
        _announce(config, folder, outcome)
    sys.exit(outcome.exit_code)


def _announce(config: Config, folder: RunFolder, outcome: Outcome) -> None:
    """Runs `monitor.on_end`, if it is set."""
    if config.monitor.on_end is None:
        return
    from disttrain import slurm_env
    from disttrain.launch.secret import SECRET
    from disttrain.monitor.on_end import announce_end

    announce_end(
        config.monitor.on_end,
        config.name,
        folder,
        requeue=slurm_env.will_requeue(os.environ, outcome.signal),
        environ={name: value for name, value in os.environ.items() if name != SECRET},
        say=lambda text: aside(f"disttrain: {text}"),
    )


@click.command()
@click.argument("config_path", metavar="[CONFIG]", type=PATH, required=False)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@PROCESSES
@SECONDS
@JSON
def bench(
    config_path: Path | None,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Show where the time of a training step goes on this machine.

    Measures CONFIG, or a small network on the built-in digits: the phases of a step, and real data against a
    replayed batch. Then tries each setting of precision, channels_last and compile, and other numbers of
    processes. Does not compile if train.compile is false.
    """
    from rich.console import Console

    from disttrain.bench.bench import DEFAULT, summary, tables
    from disttrain.bench.bench import bench as measure
    from disttrain.config import Config, load_config
    from disttrain.parallel import usable_cores

    config = Config.model_validate(DEFAULT) if config_path is None else load_config(config_path, overrides)
    plan, _ = ready_to_measure(config, gpus, procs)
    results = measure(config, plan, seconds=seconds, cores=usable_cores(), say=aside)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    console = Console(highlight=False)
    for table in tables(results):
        console.print(table)
        console.print()
    for line in summary(results):
        click.echo(line)


@click.command()
@click.argument("run_dir", metavar="[RUN]", type=PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, once.")
def top(run_dir: Path | None, as_json: bool) -> None:
    """Watch the GPUs of a run, or of this node.

    RUN is a run folder. The run may have ended, and top writes nothing to the folder. Press Ctrl-C to quit.
    Without a terminal, top prints everything once.
    """
    from disttrain.monitor.top import show

    show(run_dir, as_json=as_json)


@click.command()
@click.argument("checks", metavar="[CHECK]...", nargs=-1)
@click.option(
    "--nodes",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(0),
    metavar="[N]",
    help="Measure the network between the nodes of the Slurm job, or between N nodes that run this command.",
)
@NODE
@JSON
def doctor(checks: tuple[str, ...], nodes: int | None, as_json: bool, **place: Any) -> None:
    """Check this machine and say how to fix what does not work.

    CHECK selects some of: packages, driver, gpus, machine, disk, clock, network, slurm, data, allreduce,
    step. With --nodes, doctor measures latency and bandwidth between every pair of nodes instead. Exits with
    1 if a check fails. Warnings do not affect the exit code.
    """
    from disttrain.doctor import examine, report
    from disttrain.errors import UsageError

    if nodes is None:
        findings = examine(checks)
    elif checks:
        raise UsageError("--nodes cannot be combined with other checks; leave them out")
    else:
        from disttrain.doctor.nodes import examine_nodes, starts_srun
        from disttrain.launch.plan import plan_nodes
        from disttrain.launch.secret import Secret, with_secret

        if not nodes and (command := starts_srun(os.environ)) is not None:
            sys.exit(subprocess.run(command, env=with_secret(os.environ)).returncode)
        secret = Secret.of(os.environ, None)
        findings = examine_nodes(plan_nodes(nodes or None, **place, environ=os.environ), secret, aside)
    found = []
    for name, finding in findings:
        found.append({"check": name, **finding._asdict()})
        if not as_json:
            click.echo(report(finding))
    if as_json and (found or nodes is None):
        click.echo(json.dumps(found, indent=1))
    sys.exit(any(finding["status"] == "failure" for finding in found))


COMMANDS = (run, bench, top, doctor)
