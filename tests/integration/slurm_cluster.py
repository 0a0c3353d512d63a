"""A real Slurm of one node on this machine, with a munge of its own; nothing of the system's is touched."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Returns why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_search_path()) is None]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the cluster and gives the environment in which its commands work; stops it in the end."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    config = CONFIG.format(folder=folder, host=host, controller_port=_free_port(), node_port=_free_port())
    (folder / "slurm.conf").write_text(config)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
    names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    names |= {"log-file": "munged.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / name}" for option, name in names.items()]
    try:
        subprocess.run(["munged", "--force", *options], env=env, check=True)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon, "-f", folder / "slurm.conf"], env=env, check=True)
        deadline = time.monotonic() + 60
        while subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, text=True
        ).stdout.strip() not in {"1"}:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield env
    finally:
        daemons = []
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                daemons.append(psutil.Process(int((folder / f"{name}.pid").read_text())))
                daemons[-1].terminate()
        _, alive = psutil.wait_procs(daemons, timeout=20)
        for daemon in alive:
            daemon.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _search_path() -> str:
    return os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"
