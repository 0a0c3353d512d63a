"""disttrain as a library: what docs/python.md promises, and parts for loops of one's own."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import disttrain
from disttrain.data.epoch_plan import digest
from disttrain.errors import DataError, StoppedError, UsageError
from disttrain.shards.index import load_index
from kit import REPOSITORY
from kit.run_results import status
from kit.shards import SEVEN, read_split


def python(code: str, cwd: Path, *launcher: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = cwd / "program.py"
    path.write_text(code)
    return subprocess.run(
        [sys.executable, *launcher, str(path)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=480,
    )


def test_importing_it_imports_nothing_else(tmp_path: Path) -> None:
    code = """
import sys
before = set(sys.modules)
import disttrain
packages = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert packages == {"disttrain"}, packages
assert set(disttrain.__all__) <= set(dir(disttrain))
disttrain.train, disttrain.evaluate, disttrain.load_config
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(disttrain.__all__) - {"__version__"}))
def test_every_name_is_there_with_types_and_a_description(name: str) -> None:
    value = getattr(disttrain, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert all(p.annotation is not p.empty for p in inspect.signature(value).parameters.values())
        assert inspect.signature(value).return_annotation is not inspect.Signature.empty
    modules = {path.stem for path in (REPOSITORY / "disttrain").iterdir()}
    assert name not in modules, "the module would take its place"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        disttrain.trian  # noqa: B018


@pytest.mark.integration
def test_the_examples_of_the_document_run(tmp_path: Path, digits_root: Path) -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "photos").mkdir()
    digits = read_split(load_index("digits", str(digits_root)), "val")
    for number in (1, 2):
        (tmp_path / "photos" / f"{number}.png").write_bytes(next(digits)[1])
    done = python("\n".join(blocks), tmp_path, DISTTRAIN_DATA=str(digits_root))
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert re.search(r"^photos/1.png \d 0\.\d+$", out, re.MULTILINE)
    assert "2 nowhere: is not a run folder" in out
    assert f"{-(-1438 // 64)} {-(-1438 // 64)} ('0', '1'" in out
    assert (tmp_path / "out" / "README.md").exists()


# --- Runs -------------------------------------------------------------------------------------------


def test_a_run_that_fails_raises_what_it_failed_with(
    config_file: Path, tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_DATA", str(digits_root))
    with pytest.raises(UsageError, match=r"optim\.learning_rate: unknown key"):
        disttrain.train(config_file, "optim.learning_rate=1")
    with pytest.raises(DataError, match="there is no data set 'none'"):
        disttrain.train(config_file, "data.name=none", run_dir=tmp_path / "a", procs=1)


@pytest.mark.integration
def test_an_interrupt_stops_and_saves_the_run_and_it_goes_on(
    config_file: Path, tmp_path: Path, digits_root: Path
) -> None:
    code = f"""
import os, signal, threading, time
import disttrain
from pathlib import Path

def interrupt():
    while not Path("run/metrics.jsonl").exists() or not Path("run/metrics.jsonl").read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    disttrain.train({str(config_file)!r}, "train.epochs=2000", procs=1, run_dir="run", quiet=True)
except disttrain.DisttrainError as error:
    print(type(error).__name__, error.exit_code, error)
"""
    done = python(code, tmp_path, DISTTRAIN_DATA=str(digits_root))
    assert done.returncode == 0, done.stderr
    assert f"{StoppedError.__name__} 75 stopped " in done.stdout
    assert status(tmp_path / "run")["state"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / "latest" / "MANIFEST.json").exists()


# --- Data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_an_epoch_has_every_sample_once_over_all_ranks(seven_root: Path, world_size: int, cache: str) -> None:
    total = sum(SEVEN["train"])
    size = next(size for size in range(60, 100) if 0 < total % size < 7)  # the last batch is tiny
    ranks = [
        disttrain.open_data(
            "seven", batch_size=size, root=str(seven_root), rank=rank, world_size=world_size,
            cache=cache, seed=3,
        )  # type: ignore[arg-type]
        for rank in range(world_size)
    ]  # fmt: skip
    epochs = []
    for _ in range(2):
        served = [list(data) for data in ranks]
        assert {len(batches) for batches in served} == {len(ranks[0])} == {-(-total // size)}
        steps = [np.concatenate([batch.ids for batch in step]) for step in zip(*served, strict=True)]
        assert [len(step) for step in steps] == [size] * (total // size) + [total % size]
        assert digest(np.concatenate(steps)) == digest(np.arange(total))
        assert all(batch.images.shape[1:] == (8, 8, 3) for batches in served for batch in batches)
        assert all(len(b.images) == len(b.labels) == len(b.ids) for batches in served for b in batches)
        epochs.append([step.tolist() for step in steps])
    assert epochs[0] != epochs[1]
    alone = disttrain.open_data("seven", batch_size=size, root=str(seven_root), seed=3)
    assert [batch.ids.tolist() for batch in alone.epoch(0)] == epochs[0]
    assert [batch.ids.tolist() for batch in alone.epoch(1, first=4)] == epochs[1][4:]


def test_validation_is_in_order_and_a_remainder_may_be_dropped(seven_root: Path) -> None:
    data = disttrain.open_data("seven", "val", batch_size=40, root=str(seven_root), drop_remainder=True)
    assert [batch.ids.tolist() for batch in data] == [list(range(40)), list(range(40, 80))]
    assert len(data) == 2
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        disttrain.open_data("seven", "test", batch_size=4, root=str(seven_root))
    with pytest.raises(UsageError, match="rank 0 of 5 with batch_size = 4: the rank must be below"):
        disttrain.open_data("seven", batch_size=4, root=str(seven_root), world_size=5)


@pytest.mark.nightly
@pytest.mark.integration
def test_a_loop_of_ones_own_under_torchrun_sees_every_sample_once(tmp_path: Path, seven_root: Path) -> None:
    code = """
import json, os
import torch
import torch.distributed as dist
import disttrain

dist.init_process_group("gloo")
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(192, 4))
data = disttrain.open_data("seven", batch_size=90)
seen = []
for images, labels, ids in data:
    loss = torch.nn.functional.cross_entropy(network(images.flatten(1) / 255), labels, reduction="sum")
    (loss * dist.get_world_size() / 90).backward()
    seen += ids.tolist()
open(f"rank_{dist.get_rank()}.json", "w").write(json.dumps([len(data), seen]))
dist.destroy_process_group()
"""
    launcher = "-m torch.distributed.run --standalone --log_dir /dev/null"
    launcher += " --local-addr 127.0.0.1 --nproc-per-node 2"
    done = python(code, tmp_path, *launcher.split(), DISTTRAIN_DATA=str(seven_root), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0][0] == ranks[1][0] == -(-sum(SEVEN["train"]) // 90)
    assert sorted(ranks[0][1] + ranks[1][1]) == list(range(sum(SEVEN["train"])))
    assert ranks[0][1]
    assert ranks[1][1]
