"""One plan through real processes: any number of ranks and workers, from the cache or from the shards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.epoch_plan import Plan
from disttrain.shards.index import load_index
from kit.commands import Run
from kit.marks import nightly
from kit.resumed import digest
from kit.run_results import ids_per_step, metrics
from kit.shards import read_split

SEVEN_YAML = """
name: seven
data: {name: seven, streams: 4, shuffle_buffer: 100}
augment: {crop_padding: 1, flip: true, cutout: 2}
model: {name: cnn_mnist}
train: {epochs: 2, batch_size: 84, trace_samples: true}
optim: {name: sgd, lr: 0.02}
monitor: {log_every_steps: 3}
"""
BATCH, SAMPLES = 84, 720  # eight full batches and a rest of 48, divisible by 1, 2, 3 and 4


def planned(
    root: Path, epochs: int, batch_size: int = BATCH, **options: int
) -> dict[tuple[int, int], list[int]]:
    """Returns what `ids_per_step` must find."""
    shards = tuple(shard.samples for shard in load_index("seven", str(root)).splits["train"].shards)
    plan = Plan(0, shards, BATCH, streams=4, shuffle_buffer=100)
    steps = plan.steps_per_epoch
    return {
        (epoch + 1, epoch * steps + step + 1): plan.order(epoch)[list(plan.batch(step))].tolist()
        for epoch in range(epochs)
        for step in range(steps)
    }


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """The losses of the runs so far, which must agree."""
    return {}


@pytest.mark.parametrize(
    ("procs", "cache"),
    [
        (3, "none"),
        *nightly(
            *((1, "none"), (1, "host"), (2, "none"), (2, "host"), (3, "host"), (4, "host"), (4, "none"))
        ),
    ],
)
def test_every_world_trains_on_the_plan(
    procs: int, cache: str, disttrain: Run, tmp_path: Path, seven_root: Path, losses: dict[str, list[float]]
) -> None:
    (tmp_path / "seven.yaml").write_text(SEVEN_YAML)
    result = disttrain(
        "run", "seven.yaml", f"data.cache={cache}", "--procs", str(procs), "--run-dir", "run",
        env={"DISTTRAIN_DATA": str(seven_root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert ids_per_step(tmp_path / "run") == planned(seven_root, 2)
    records = metrics(tmp_path / "run")
    assert [r["total"] for r in records if r["kind"] == "eval"] == [95, 95]
    assert {record["skipped"] for record in records} == {0}
    losses[f"{procs} {cache}"] = [record["loss"] for record in records]
    first = next(iter(losses.values()))
    assert losses[f"{procs} {cache}"] == pytest.approx(first, abs=1e-5)
    if f"{procs} host" in losses and f"{procs} none" in losses:
        assert losses[f"{procs} host"] == losses[f"{procs} none"], "the same bits from cache and shards"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--procs", "1", "data.cache=host"], ["--procs", "3", "data.cache=none", "data.workers=0"]),
        *nightly(
            (["--procs", "2", "data.cache=none", "data.workers=1"], ["--procs", "1", "data.cache=none"])
        ),
    ],
    ids=["one cached, three streamed", "two streamed, one streamed"],
)
def test_resume_on_other_ranks_and_cache_trains_on_what_is_left(
    first: list[str], then: list[str], disttrain: Run, tmp_path: Path, seven_root: Path
) -> None:
    (tmp_path / "seven.yaml").write_text(SEVEN_YAML.replace("epochs: 2", "epochs: 30"))
    arguments = ["run", "seven.yaml", "--run-dir", "run", "monitor.log_every_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "disttrain", *arguments, *first],
        cwd=tmp_path,
        env=os.environ | {"DISTTRAIN_DATA": str(seven_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "run/metrics.jsonl").exists() and len(metrics_lines(tmp_path / "run")) > 12:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    result = disttrain(*arguments, *then, env={"DISTTRAIN_DATA": str(seven_root)})
    assert result.returncode == 0, result.stderr
    assert ids_per_step(tmp_path / "run") == planned(seven_root, 30)


def metrics_lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_data_set_that_changed_since_the_checkpoint_is_refused(
    disttrain: Run, tmp_path: Path, seven_root: Path, digits_root: Path
) -> None:
    (tmp_path / "seven.yaml").write_text(SEVEN_YAML.replace("seven, ", "digits, "))
    arguments = ["run", "seven.yaml", "--procs", "1", "--run-dir", "run"]
    env = {"DISTTRAIN_DATA": str(tmp_path / "data")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_root / "digits")
    assert disttrain(*arguments, "train.epochs=1", env=env).returncode == 0
    (tmp_path / "data" / "digits").unlink()
    (tmp_path / "data" / "digits").symlink_to(seven_root / "seven")
    result = disttrain(
        "run", "seven.yaml", "--procs", "1", "--run-dir", "other", "--resume", "run", "train.epochs=2",
        env=env,
    )  # fmt: skip
    assert result.returncode == 2
    assert "was saved with another config or data set:" in result.stderr
    assert "data.digest: " in result.stderr


@pytest.mark.nightly
def test_balanced_sampling_is_the_same_for_any_ranks_and_loaders(
    disttrain: Run, tmp_path: Path, seven_root: Path
) -> None:
    (tmp_path / "seven.yaml").write_text(SEVEN_YAML)
    settings = ("data.sampling=balanced", "train.reproducible=true", "train.virtual_ranks=4")
    for procs, cache, epochs in (("1", "host", (2,)), ("2", "none", (1, 2))):
        for number in epochs:
            result = disttrain(
                *("run", "seven.yaml", *settings, f"data.cache={cache}", f"train.epochs={number}"),
                *("--procs", procs, "--run-dir", procs),
                env={"DISTTRAIN_DATA": str(seven_root)},
            )
            assert result.returncode == 0, result.stderr
            assert "data.sampling = balanced: 180 or more places for each class in an epoch" in result.stdout
    one, two = tmp_path / "1", tmp_path / "2"
    assert ids_per_step(two) == ids_per_step(one)
    assert digest(two) == digest(one)
    labels = np.array([label for _, _, label in read_split(load_index("seven", str(seven_root)), "train")])
    for epoch in (1, 2):
        ids = [sample for (of, _), batch in ids_per_step(one).items() if of == epoch for sample in batch]
        assert np.bincount(labels[ids]).tolist() == [SAMPLES // 4] * 4
