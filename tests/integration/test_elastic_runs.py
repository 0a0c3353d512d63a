"""A run that goes on without a lost node and takes it back, with launchers on this machine as the nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kit.commands import wait_for
from kit.resumed import digest
from kit.run_results import computed_records, ids_per_step, metrics, status
from kit.supervision import HOST, SLOW, Start

EPOCHS = 12
SETTINGS = [
    "model.name=mine:Net",
    f"train.epochs={EPOCHS}",
    "train.batch_size=48",
    "train.precision=fp32",
    "train.reproducible=true",
    "train.virtual_ranks=4",
    "train.trace_samples=true",
    "checkpoint.every_steps=7",
    "monitor.log_every_steps=5",
]


@pytest.mark.nightly
def test_a_run_goes_on_without_a_node_and_takes_it_back(start: Start, tmp_path: Path, port: int) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    run = tmp_path / "run"

    def node(number: int, *more: str) -> subprocess.Popen[str]:
        place = ["--nodes", "3", "--node-rank", number, "--master-addr", "127.0.0.1", "--master-port", port]
        place += ["--max-restarts", "1", "--wait-for-nodes", "0.5"]
        return start("run", "tiny.yaml", "--run-dir", "run", "--procs", "1", *SETTINGS, *more, *place)

    def trains(world_size: int) -> bool:
        found = (run / "status.json").exists() and status(run).get("world_size") == world_size
        return found and len(metrics(run)) > 0 and metrics(run)[-1]["step"] > status(run)["began_at"] + 5

    first, second, third = (node(number) for number in range(3))
    wait_for(lambda: trains(3) and (run / "checkpoints/latest").exists(), first)
    second.kill()
    second.wait()
    begin = time.monotonic()
    wait_for(lambda: status(run)["restarts"] == 1, first)
    noticed_s = time.monotonic() - begin
    wait_for(lambda: trains(2), first)
    lost_s = time.monotonic() - begin
    other = node(1, "optim.lr=0.5")
    assert "optim.lr is 0.01 on node 0" in other.communicate(timeout=120)[0]
    assert other.returncode == 2
    assert status(run)["world_size"] == 2
    back = node(1)
    begin = time.monotonic()
    wait_for(lambda: trains(3), first)
    print(f"lost: noticed after {noticed_s:.1f} s, trains after {lost_s:.1f} s; ", end="")
    print(f"back: trains after {time.monotonic() - begin:.1f} s; load {os.getloadavg()[0]:.0f}")
    (tmp_path / "hurry").touch()
    outputs = [process.communicate(timeout=120)[0] for process in (first, back, third)]
    assert [process.returncode for process in (first, second, third, back)] == [0, -signal.SIGKILL, 0, 0]
    for line in (
        f"node 1 ({HOST}) is gone",
        "restart 1 of 1 from the last checkpoint",
        "going on with 2 of 3 nodes, without node 1",
        "going on with 3 of 3 nodes",
    ):
        assert line in outputs[0].splitlines()
    ended = status(run)
    assert (ended["state"], ended["restarts"], ended["samples_seen"]) == ("finished", 1, EPOCHS * 1438)

    whole = start("run", "tiny.yaml", "--run-dir", "whole", "--procs", "1", *SETTINGS)
    assert whole.wait(timeout=120) == 0, whole.communicate()
    assert digest(run) == digest(tmp_path / "whole")
    assert computed_records(run) == computed_records(tmp_path / "whole")
    steps = {step: sorted(ids) for step, ids in ids_per_step(run).items()}
    assert steps == {step: sorted(ids) for step, ids in ids_per_step(tmp_path / "whole").items()}
