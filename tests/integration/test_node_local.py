"""Two nodes with a disk each: what they read of the shared one, and what each makes for itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit import slurm_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.why_no_hosts()), reason=str(slurm_cluster.why_no_hosts())),
]

# Writes down which files of data sets a process opens.
SPY = """
import os, sys
def spy(event, arguments):
    if event == "open" and str(arguments[0]).endswith(("index.json", ".tar")):
        if os.environ.get("RANK"):
            with open(os.environ["OPENED"] + "-" + os.environ["RANK"], "a") as file:
                file.write(os.path.basename(arguments[0]) + "\\n")
sys.addaudithook(spy)
"""


def test_each_node_decodes_once_and_each_rank_reads_the_index_once(
    tmp_path: Path, config_file: Path, digits_root: Path
) -> None:
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy/sitecustomize.py").write_text(SPY)
    with slurm_cluster.hosts(tmp_path / "hosts") as hosts:
        hosts.env |= {
            "DISTTRAIN_DATA": str(digits_root),
            "DISTTRAIN_CACHE": "",
            "XDG_CACHE_HOME": str(tmp_path / "home"),
            "SLURM_JOB_ID": "4711",
            "SLURM_TMPDIR": str(hosts.local),
            "OMP_NUM_THREADS": "1",
            "OPENED": str(tmp_path / "opened"),
            "PYTHONPATH": f"{tmp_path / 'spy'}:{hosts.env.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, "-m", "disttrain", "run", str(config_file), "--procs", "2"]
        command += ["--run-dir", str(tmp_path / "run"), "--nodes", "2", "--master-addr", "node0"]
        command += ["--master-port", "29500", "--node-rank"]
        launchers = [
            hosts.start(name, [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank, name in enumerate(hosts.names)
        ]
        printed = [launcher.communicate(timeout=240)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], printed
        for name in hosts.names:
            made = hosts.on(name, "ls", hosts.local / "disttrain/decoded").split()
            assert [re.sub("-[0-9a-f]{16}-", "-", folder) for folder in made] == [
                "digits-train",
                "digits-val",
            ]
    assert not (tmp_path / "home/disttrain/decoded").exists()
    logs = [path.read_text() for path in sorted((tmp_path / "run/logs").glob("rank_*.log"))]
    said = [printed[0] + logs[0] + logs[1], logs[2] + logs[3]]
    for text in said:
        assert len(re.findall("decoding digits/(train|val) once", text)) == 2
    for rank in range(4):
        opened = (tmp_path / f"opened-{rank}").read_text().split()
        assert opened.count("index.json") == 1
    shards = [(tmp_path / f"opened-{rank}").read_text().count(".tar") for rank in range(4)]
    assert sorted([shards[0] + shards[1], shards[2] + shards[3]]) == [2, 2], "each shard once per node"
