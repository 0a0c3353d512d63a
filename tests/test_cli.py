"""The command: help, plans, data sets, and one line with the right exit code for every mistake."""

import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from disttrain.cli import main
from disttrain.config import dump_config, json_schema, load_config
from disttrain.models import CATALOG
from disttrain.shards.pack import Options, pack
from kit import toy

# Runs the command on many command lines in one process, and tells which modules that has imported.
_MANY = """
import contextlib, io, json, sys
before = set(sys.modules)
from disttrain.cli import main

results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, prog_name="disttrain")
        except SystemExit as end:
            results.append((end.code or 0, out.getvalue(), err.getvalue()))
packages = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps({"results": results, "packages": sorted(packages)}))
"""


def run_many(command_lines, cwd, **variables):
    """Returns (exit code, stdout, stderr) of each command line, and the packages imported by them all."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", _MANY],
        input=json.dumps(command_lines),
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert len(answer["results"]) == len(command_lines)
    return answer["results"], set(answer["packages"])


def commands(group=main, path=()):
    """Yields the words of every command."""
    yield path
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))


def snapshot(*folders):
    """Returns every file below the folders with its size and time."""
    return {
        (path, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Images of two classes, five each, 6x4 pixels."""
    folder = tmp_path_factory.mktemp("images")
    for level, name in ((40, "dark"), (200, "light")):
        (folder / name).mkdir()
        for i in range(5):
            Image.new("L", (6, 4), level + i).save(folder / name / f"{i}.png")
    return folder


# --- Help -------------------------------------------------------------------------------------------


def test_every_command_has_help_that_imports_nothing_heavy(tmp_path):
    all_commands = list(commands())
    assert {("run",), ("data", "pack"), ("config", "schema"), ("models",)} <= set(all_commands)
    results, packages = run_many([[*words, "--help"] for words in all_commands], tmp_path)
    for words, (code, out, err) in zip(all_commands, results, strict=True):
        assert (code, err) == (0, ""), words
        assert out.startswith(f"Usage: {' '.join(['disttrain', *words])} "), words
    assert packages == {"click", "disttrain"}


def test_the_module_is_the_command(disttrain):
    done = disttrain("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"disttrain, version \d+\.\d+\S*\n", done.stdout)


# --- Mistakes ---------------------------------------------------------------------------------------

RUN = ["run", "tiny.yaml"]
MISTAKES = {
    "wrong key": ([*RUN, "optim.learning_rate=1"], 2,
        "override 'optim.learning_rate=1': optim.learning_rate: unknown key; did you mean optim.lr?"),
    "wrong value": ([*RUN, "train.epochs=two"], 2,
        "override 'train.epochs=two': train.epochs: expected a whole number, got 'two'"),
    "no override": ([*RUN, "optim.lr"], 2,
        "'optim.lr' is not an override; write key=value, for example optim.lr=0.1"),
    "no config": (["run", "tyni.yaml"], 2, "tyni.yaml: no such config file; did you mean tiny.yaml?"),
    "config is a folder": (["run", "."], 2, ".: cannot be read: Is a directory"),
    "config is no text": (["run", "binary.yaml"], 2, "binary.yaml: is not UTF-8 text; save it as UTF-8"),
    "unknown model": ([*RUN, "model.name=cnn_mnits"], 2,
        "model.name: unknown model 'cnn_mnits'; did you mean cnn_mnist?; "),
    "missing data": ([*RUN, "data.name=mnist"], 65, "there is no data set 'mnist'"),
    "batch": ([*RUN, "--procs", "3"], 2,
        "train.batch_size = 64 cannot be divided by 3 processes; use a train.batch_size of 63 or 66"),
    "batch in a dry run": ([*RUN, "--procs", "3", "--dry-run"], 2, "train.batch_size = 64 cannot be divided"),
    "no GPU": ([*RUN, "--gpus", "2"], 2,
        "--gpus 2: this machine has no usable GPU; train on the CPU with --procs N"),
    "GPUs and processes": ([*RUN, "--gpus", "1", "--procs", "1"], 2, "--gpus and --procs cannot be combined"),
    "precision": ([*RUN, "--procs", "1", "train.precision=fp16"], 2, "train.precision = fp16 needs a GPU"),
    "classes": ([*RUN, "model.num_classes=7"], 2, "model.num_classes = 7, but digits has 10 classes"),
    "node without nodes": ([*RUN, "--node-rank", "1"], 2, "--node-rank and --master-addr need --nodes N"),
    "nodes without a folder": (
        [*RUN, "--nodes", "2", "--node-rank", "0", "--master-addr", "a", "--master-port", "1"], 2,
        "--nodes 2 needs a --run-dir that all nodes share"),
    "nothing to resume": ([*RUN, "--resume", "nowhere"], 66,
        "--resume nowhere: neither a run folder with a checkpoint nor a checkpoint"),
    "run of another config": ([*RUN, "seed=7", "--run-dir", "done"], 2,
        "done: holds a run of another config or data set:\ndisttrain:   seed: 0 -> 7\ndisttrain: undo"),
    "run not to be continued": ([*RUN, "--run-dir", "done", "--resume", "never"], 2,
        "done: holds a run; choose another --run-dir or --resume auto"),
    "foreign folder": ([*RUN, "--run-dir", "."], 73, ".: is not a run folder (it holds "),
    "file in the way": ([*RUN, "--run-dir", "tiny.yaml"], 73,
        "tiny.yaml: is not a folder; choose another --run-dir"),
    "unknown data set": (["data", "prepare", "minst"], 2,
        "'minst' is not one of digits, mnist, cifar10; did you mean mnist?"),
    "missing source": (["data", "prepare", "mnist", "--source", "nowhere"], 65, "nowhere: no such folder"),
    "source of the digits": (["data", "prepare", "digits", "--source", "."], 2,
        "digits comes with disttrain; leave out --source"),
    "nothing to pack": (["data", "pack", "nowhere", "--name", "x"], 65, "nowhere: no such folder"),
    "no layout": (["data", "pack", "done", "--name", "x"], 65, "done: has no folder train; expected "),
    "fraction": (["data", "pack", "done", "--name", "x", "--val-fraction", "1.5"], 2, "--val-fraction 1.5: "),
    "bad name": (["data", "pack", "done", "--name", "a/b"], 2, "'a/b' is not a valid name of a data set"),
    "nothing to inspect": (["data", "inspect", "minst"], 65, "did you mean mnist?; make it with "),
}  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, digits_root):
    """What the command answers to each mistake, the packages it imported, and its folder before and after."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = folder / "tiny.yaml"
    config.write_text(
        "name: tiny\ndata: {name: digits}\nmodel: {name: cnn_mnist}\n"
        "train: {epochs: 2, batch_size: 64}\noptim: {lr: 1e-2}\n"
    )
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    (folder / "done").mkdir()
    (folder / "done" / "config.yaml").write_text(dump_config(load_config(config)))
    before = snapshot(folder, digits_root)
    lines = [arguments for arguments, _, _ in MISTAKES.values()]
    variables = {"DISTTRAIN_DATA": str(digits_root), "CUDA_VISIBLE_DEVICES": ""}
    results, packages = run_many(lines, folder, **variables)
    return dict(zip(MISTAKES, results, strict=True)), packages, before, snapshot(folder, digits_root)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_an_exit_code(mistakes, mistake):
    _, expected_code, message = MISTAKES[mistake]
    code, out, err = mistakes[0][mistake]
    assert (code, out) == (expected_code, "")
    assert len(err.splitlines()) == 1 + message.count("\n"), err
    assert err.startswith("disttrain: ")
    assert message in err


def test_no_mistake_imports_torch(mistakes):
    assert not mistakes[1] & {"torch", "torchvision", "accelerate", "webdataset"}


def test_no_mistake_leaves_a_file(mistakes):
    assert mistakes[2] == mistakes[3]


def test_a_config_key_given_as_an_option_is_told_how_to_write_it():
    done = CliRunner().invoke(main, ["run", "tiny.yaml", "--optim.weight_decay=0.1"])
    assert done.exit_code == 2
    assert "Set a config key without dashes: optim.weight_decay=VALUE" in done.output


def test_several_mistakes_are_a_line_each(disttrain, config_file):
    done = disttrain("run", config_file, "train.epochs=0", "optim.lr=x", "--procs", 1)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "disttrain: override 'train.epochs=0': train.epochs: must be greater than 0, got 0",
        "disttrain: override 'optim.lr=x': optim.lr: expected a number, got 'x'",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--gpus", "0"], ["--procs", "0"], ["--max-restarts", "-1"], ["--master-port", "70000"], ["--nope"]],
)
def test_an_option_that_click_refuses(disttrain, config_file, arguments):
    done = disttrain("run", config_file, *arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_has_finished_is_left_alone(disttrain, config_file, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(config_file)))
    (run / "status.json").write_text('{"state": "finished", "exit_code": 0}')
    before = snapshot(run)
    done = disttrain("run", config_file, "--procs", 1, "--run-dir", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run: this run has already finished; nothing to do\n"
    assert snapshot(run) == before


# --- The plan of a run ------------------------------------------------------------------------------


def plan_of(done):
    """Returns the texts of every label of a dry run."""
    assert (done.returncode, done.stderr) == (0, "")
    plan = {}
    for line in done.stdout.splitlines():
        plan.setdefault(line[:11].strip(), []).append(line[12:])
    return plan


def test_a_dry_run_shows_the_plan_and_starts_nothing(
    disttrain, config_file, tmp_path, digits_root, decoded_cache
):
    before = snapshot(tmp_path, digits_root, decoded_cache)
    plan = plan_of(
        disttrain("run", "tiny.yaml", "seed=3", "--procs", 2, "--dry-run", env={"OMP_NUM_THREADS": "1"})
    )
    (command,) = plan.pop("command")
    ranks = [re.sub(r" -> \S+ -> ", " -> HOST -> ", line) for line in plan.pop("ranks")]
    words = shlex.split(command)
    assert words[:4] == [
        "OMP_NUM_THREADS=1",
        "CUDA_VISIBLE_DEVICES=",
        "PET_STANDALONE=1",
        "PET_LOCAL_ADDR=127.0.0.1",
    ]
    assert words[4:8] == [sys.executable, "-m", "disttrain.launch.accelerate_launch", "--config_file"]
    assert words[9:] == [
        *("--num_machines", "1", "--num_processes", "2", "--num_cpu_threads_per_process", "1"),
        *("--log_dir", os.devnull, "--main_process_port", "0", "--module", "disttrain.worker"),
        *("tiny.yaml", "seed=3"),
        *("--run-dir", "runs/tiny/<UTC time>"),
    ]
    assert ranks == ["rank 0 -> HOST -> cpu", "rank 1 -> HOST -> cpu"]
    threads = plan.pop("threads")[0]
    assert threads.startswith("1 per process on ")
    assert plan == {
        "batch": ["64 global = 2 ranks x 32"],
        "steps": [
            "23 per epoch x 2 epochs = 46; 22 full batches, "
            "remainder: 30 samples: a smaller last batch, averaged correctly"
        ],
        "data": ["digits: train 1,438 in 1 shard (2.8 MiB), val 359 in 1 shard (0.7 MiB), images 1x8x8"],
        "shards": [
            f"every node decodes all shards once: 0.1 MiB in {decoded_cache}/decoded, "
            "or streams them if that does not fit"
        ],
        "model": ["cnn_mnist, 1,898 parameters"],
        "checkpoint": ["0.05 MiB each, 2 + the best"],
        "run folder": ["runs/tiny/<UTC time>"],
    }
    assert snapshot(tmp_path, digits_root, decoded_cache) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_a_dry_run_of_one_process_with_other_settings(disttrain, config_file, tmp_path):
    plan = plan_of(disttrain(
        "run", "tiny.yaml", "data.remainder=drop", "train.accumulate=4", "train.ema=0.99", "optim.name=sgd",
        "--procs", 1, "--dry_run", "--run_dir", "my run", "--resume", "never", "-q",
    ))  # fmt: skip
    (command,) = plan["command"]
    assert shlex.split(command)[2:] == [
        *(sys.executable, "-m", "disttrain.worker", "tiny.yaml", "data.remainder=drop", "train.accumulate=4"),
        *("train.ema=0.99", "optim.name=sgd", "--run-dir", "my run", "--resume", "never", "--quiet"),
    ]
    assert plan["batch"] == ["64 global = 1 rank x 64 (4 passes of 16)"]
    assert plan["steps"] == [
        "22 per epoch x 2 epochs = 44; 22 full batches, remainder: 30 samples: left out in each epoch"
    ]
    assert plan["run folder"] == ["my run"]
    assert not (tmp_path / "my run").exists()


@pytest.mark.nightly
def test_a_dry_run_on_a_node_of_a_slurm_job(disttrain, config_file, tmp_path):
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "1",
    }
    plan = plan_of(disttrain("run", "tiny.yaml", "--procs", 1, "--dry-run", "-v", env=variables))
    words = shlex.split(plan["command"][0])
    start = words.index("--num_machines")
    port = words[start + 13]
    assert words[start:] == [
        *("--num_machines", "2", "--num_processes", "2", "--num_cpu_threads_per_process", words[start + 5]),
        *(
            "--log_dir",
            os.devnull,
            "--machine_rank",
            "1",
            "--main_process_ip",
            "gpu03",
            "--main_process_port",
            port,
        ),
        *("--module", "disttrain.worker", "tiny.yaml", "--run-dir", "runs/tiny/slurm-4711", "--verbose"),
    ]
    assert 1024 < int(port) < 32768
    assert [line.split(" -> ")[0] for line in plan["ranks"]] == ["rank 0", "rank 1"]
    assert plan["ranks"][0] == "rank 0 -> node 0 -> cpu"


# --- Data sets --------------------------------------------------------------------------------------


def test_the_digits_are_prepared_once(disttrain, tmp_path):
    first = disttrain("data", "prepare", "digits", "--root", "sets")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[:2] == [
        f"digits: {tmp_path}/sets/digits",
        "images   1 x 8 x 8, 10 classes",
    ]
    assert first.stdout.splitlines()[-2:] == [
        "train    1,438 samples in 1 shard, 2.8 MiB",
        "val      359 samples in 1 shard, 0.7 MiB",
    ]
    before = snapshot(tmp_path / "sets")
    second = disttrain("data", "prepare", "digits", "--root", "sets")
    assert second.returncode == 0
    assert second.stdout.splitlines()[0] == f"digits is already prepared: {tmp_path}/sets/digits"
    assert snapshot(tmp_path / "sets") == before


def test_a_folder_of_images_is_packed_and_inspected(disttrain, image_folder, tmp_path):
    pack = ["data", "pack", image_folder, "--name", "levels", "--root", "sets"]
    packed = disttrain(*pack, "--val_fraction", 0.4)
    assert (packed.returncode, packed.stderr) == (0, "")
    again = disttrain(*pack, "--val-fraction", 0.4)
    assert again.returncode == 65
    assert again.stderr == (
        f"disttrain: {tmp_path}/sets/levels: already exists; replace it with --force or choose another name\n"
    )
    replaced = disttrain(*pack, "--val-fraction", 0.2, "--size", 2, "--force")
    assert (replaced.returncode, replaced.stderr) == (0, "")

    shown = disttrain("data", "inspect", "levels", "--root", "sets")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[:2] == [
        f"levels: {tmp_path}/sets/levels",
        "images   1 x 2 x 2, 2 classes",
    ]
    assert [line.split() for line in shown.stdout.splitlines()[-3:]] == [
        ["class", "train", "val"],
        ["dark", "4", "1"],
        ["light", "4", "1"],
    ]


def test_inspect_lists_all_classes_in_a_pipe_and_some_on_a_terminal(tmp_path, monkeypatch):
    names = tuple(f"{label}, one of many classes whose names are long" for label in range(1000))
    splits = {
        split: toy.Listed(toy.samples(toy.images(3, seed, (8, 8, 3))))
        for seed, split in enumerate(("train", "val"))
    }
    pack("many", str(tmp_path), splits, names, 3, Options())
    command = ["data", "inspect", "many", "--root", str(tmp_path)]
    whole = CliRunner().invoke(main, command).output
    assert all(name in whole for name in names)
    monkeypatch.setattr("disttrain.cli.data.columns", lambda stream: 60)
    lines = CliRunner().invoke(main, command).output.splitlines()
    assert lines[6].startswith("the 10 smallest and largest of 1,000 classes in train")
    assert [len(line) for line in lines[7:]] == [60] * 21
    assert [line.split()[-2:] for line in lines[-3:]] == [["1", "1"]] * 3
    assert lines[-1].startswith("2, one of many")


# --- The rest ---------------------------------------------------------------------------------------


def test_the_schema_is_printed_as_json(disttrain):
    done = disttrain("config", "schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


def test_every_model_is_listed_with_parameters_and_source(disttrain):
    done = disttrain("models")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(CATALOG)
    assert all(entry.source in line for line, entry in zip(lines, CATALOG.values(), strict=False))
    sizes = {line.split()[0]: line.split()[1] for line in lines[:-1]}
    assert (sizes["cnn_mnist"], sizes["lenet5"]) == ("9,098", "61,706")
