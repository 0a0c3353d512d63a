"""`disttrain run`, and what shows a machine and a run: bench, top, doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain.cli.shared import PATH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from disttrain.doctor.rules import Finding

_INSIDE_S = 10  # in which the report of a run that has finished looks at validation images
_NODE_RANK = click.option("--node-rank", type=click.IntRange(0), help="This node, 0 to nodes - 1.")
_MASTER_ADDR = click.option("--master-addr", metavar="HOST", help="Address of node 0.")
_MASTER_PORT = click.option("--master-port", type=click.IntRange(1, 65535), help="A free port on node 0.")


@click.command()
@click.argument("config_path", metavar="CONFIG", type=PATH)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--gpus", type=click.IntRange(1), help="GPUs on this node (default: all visible).")
@click.option("--procs", type=click.IntRange(1), help="Processes without GPUs (CPU, gloo).")
@click.option("--nodes", type=click.IntRange(1), help="Number of nodes (default: from Slurm, else 1).")
@_NODE_RANK
@_MASTER_ADDR
@_MASTER_PORT
@click.option("--run-dir", type=PATH, help="Run folder (default: runs/<name>/<UTC time>).")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: go on with an unfinished run in --run-dir; PATH: from a run folder or checkpoint.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Go on although config or data set differ from the checkpoint's; the run folder keeps a record.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Restarts from the last checkpoint after a crash.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and start nothing.")
@click.option(
    "--report/--no-report",
    default=True,
    envvar="DISTTRAIN_REPORT",
    help="Write report.html into the run folder when the run has finished or failed (default: yes).",
)
@click.option("-q", "--quiet", is_flag=True, help="Show the outcome only.")
@click.option("-v", "--verbose", is_flag=True, help="Show every log point.")
def run(
    config_path: Path,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    run_dir: Path | None,
    resume: str,
    force: bool,
    max_restarts: int,
    dry_run: bool,
    report: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Train the experiment in CONFIG.

    KEY=VALUE changes a setting, for example optim.lr=0.1. The number of GPUs never changes the experiment:
    train.batch_size is the global batch.
    """
    from disttrain.config import load_config
    from disttrain.launch.launcher import launch
    from disttrain.launch.peers import telling_nodes
    from disttrain.launch.plan import LaunchPlan, plan_nodes, plan_run_dir
    from disttrain.launch.prepare import prepare, processes_here
    from disttrain.models import check_model_name
    from disttrain.monitor.nvml import unusable_gpus
    from disttrain.runs.agreement import facts
    from disttrain.runs.runfolder import RunFolder, new_run_path

    node = plan_nodes(
        nodes=nodes, node_rank=node_rank, master_addr=master_addr, master_port=master_port, environ=os.environ
    )
    with telling_nodes(None if dry_run else node):
        config = load_config(config_path, overrides)
        check_model_name(config.model.name)
        device, processes, chosen, threads = processes_here(gpus=gpus, procs=procs)
        if device == "cpu" and procs is None and (why := unusable_gpus()):
            note = "training on the CPU, although this machine has GPUs"
            click.echo(f"{note} ({why}); see `disttrain doctor`, or say --procs N if that is meant", err=True)
        run_dir = run_dir or plan_run_dir(config.name, node.nodes if node else 1, os.environ)
        plan = LaunchPlan(
            config_path=config_path,
            overrides=overrides,
            run_dir=run_dir or Path("runs") / config.name / "<UTC time>",
            resume=resume,
            device=device,
            processes=processes,
            gpus=chosen,
            threads=threads,
            **(node._asdict() if node else {}),
            verbosity=int(verbose) - int(quiet),
            force=force,
            stall_timeout_s=config.monitor.stall_timeout_s,
        )
        ready = prepare(plan, config, dry_run=dry_run, say=click.echo)
        if ready is None:
            click.echo(f"{run_dir}: this run has finished already; nothing to do")
            return
        if dry_run:
            from disttrain.launch.dryrun import describe

            for label, text in describe(plan, config, ready):
                click.echo(f"{label:<11} {text}")
            return
        folder = ready.folder if run_dir else RunFolder(new_run_path(config.name))
        if plan.node_rank == 0:
            folder.create()
        else:
            folder.check_writable("logs", "errors")
    if plan.nodes > 1 and "SLURM_STEP_ID" in os.environ:
        # Slurm ends all tasks with the first that fails; once the run has ended, each still says why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    outcome = launch(
        replace(plan, run_dir=folder.path),
        folder,
        max_restarts=max_restarts,
        say=click.echo,
        facts=facts(config, ready.index),
    )
    if outcome.detail:
        click.echo(outcome.detail.rstrip(), err=True)
    if outcome.message:
        click.echo(f"disttrain: {outcome.message}", err=True)
    if report and plan.node_rank == 0 and folder.metrics.exists() and outcome.exit_code not in _STOPPED:
        _write_report(folder.path, quiet=quiet, inside_s=0 if outcome.exit_code else _INSIDE_S)
    sys.exit(outcome.exit_code)


_STOPPED = {75, 130, 138, 140, 143}  # the run goes on later, or somebody wanted an end at once


def _write_report(run_dir: Path, *, quiet: bool, inside_s: int) -> None:
    """Writes the report of a run that has ended; if it cannot be written, that changes no exit code."""
    command = [sys.executable, "-m", "disttrain", "report", str(run_dir), "--seconds", str(inside_s)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        click.echo(f"no report ({why[0]}); try `disttrain report {run_dir}`", err=True)
    elif not quiet:
        click.echo(f"report: {run_dir / 'report.html'}")


@click.command()
@click.argument("config_path", metavar="[CONFIG]", type=PATH, required=False)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--gpus", type=click.IntRange(1), help="GPUs to measure on (default: all visible).")
@click.option("--procs", type=click.IntRange(1), help="Processes without GPUs (default: 1).")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2,
    show_default=True,
    help="Length of each measurement.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    config_path: Path | None,
    overrides: tuple[str, ...],
    gpus: int | None,
    procs: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Show where the time of a training step goes on this machine.

    Measures the phases of a step of CONFIG (default: a small network on the embedded digits), real samples
    against a replayed batch, precision x channels_last x compile (without compile if train.compile is false),
    and the speed on other numbers of processes.
    """
    from rich.console import Console

    from disttrain.config import Config, load_config
    from disttrain.launch.jobs import plan_job
    from disttrain.measure.bench import DEFAULT, summary, tables
    from disttrain.measure.bench import bench as measure
    from disttrain.models import check_model_name
    from disttrain.parallel import usable_cores
    from disttrain.preflight import check_device, open_index, split_batch

    config = Config.model_validate(DEFAULT) if config_path is None else load_config(config_path, overrides)
    check_model_name(config.model.name)
    plan = plan_job(gpus=gpus, procs=procs)
    check_device(config, plan.device)
    split_batch(config, plan.world_size)
    open_index(config, lambda text: click.echo(text, err=True))
    results = measure(
        config, plan, seconds=seconds, cores=usable_cores(), say=lambda text: click.echo(text, err=True)
    )
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
    """Show every GPU of a run, live, or the GPUs of this node.

    RUN is a run folder; it is only read, and may be that of a run that has ended. Ends with Ctrl-C. Where
    there is no terminal all is shown once.
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
    help="Measure between all nodes: of the Slurm job, or N that run this.",
)
@_NODE_RANK
@_MASTER_ADDR
@_MASTER_PORT
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    checks: tuple[str, ...],
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    as_json: bool,
) -> None:
    """Show what works on this machine and what does not, each with its remedy.

    CHECK chooses some of: packages, driver, gpus, machine, disk, clock, network, slurm, data, allreduce,
    step. With --nodes, latency and bandwidth between every pair of nodes instead. Ends with 1 if there is a
    failure; a warning is none.
    """
    from disttrain.doctor import examine, report
    from disttrain.errors import UsageError

    findings: Iterable[tuple[str, Finding]]
    if nodes is None:
        findings = examine(checks)
    else:
        from disttrain.doctor.nodes import examine_nodes, starts_srun
        from disttrain.launch.plan import plan_nodes

        if checks:
            raise UsageError("--nodes is a check of its own: leave out the others")
        if not nodes and (command := starts_srun(os.environ)) is not None:
            sys.exit(subprocess.run(command).returncode)
        place = plan_nodes(
            nodes=nodes or None,
            node_rank=node_rank,
            master_addr=master_addr,
            master_port=master_port,
            environ=os.environ,
        )
        if place is None:
            raise UsageError(
                "--nodes: there is one node only; call this in a Slurm job of several, or on each node with "
                "--nodes N --node-rank R --master-addr HOST --master-port PORT"
            )
        findings = (("nodes", finding) for finding in examine_nodes(place))
    found = []
    for name, finding in findings:
        found.append({"check": name, **finding._asdict()})
        if not as_json:
            click.echo(report(finding))
    if as_json and (found or nodes is None):
        click.echo(json.dumps(found, indent=1))
    sys.exit(any(finding["status"] == "failure" for finding in found))


COMMANDS = (run, bench, top, doctor)
