"""Several hosts on this machine, and a real Slurm on them; nothing of the system's is touched.

A host is a network, a host name, processes and a disk of its own: Linux namespaces without names, held by one
process each that dies with the tests. With it go the host's processes, mounts and interfaces, whatever
happened before. All hosts share the file system, but for `Hosts.local` and /etc/hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
SLURM_PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
CONTROL = "control"
"""The host between the others, on which Slurm's controller runs and jobs are submitted."""

# The last command adopts and buries what the daemons leave behind, as a host's first process must.
_FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi  # no name server to wait for
mount -t tmpfs -o mode=700 none "$3"
ip link set lo up
echo ready
while sleep 3600; do :; done
"""

_SLURM_CONF = """
ClusterName=test
SlurmctldHost=control
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{settings}
NodeName={nodes} CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Hosts:
    """Running hosts.

    Attributes:
        names: of the hosts but CONTROL; each resolves on every host.
        local: a folder that is another, empty one on every host, as a node's own disk is.
        env: variables of every command that is started on them.
    """

    names: list[str]
    local: Path
    env: dict[str, str]
    _pids: dict[str, int]

    def start(self, host: str, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Starts a command on a host; `env` in the options adds to the variables."""
        own = f"/proc/{self._pids[host]}/ns"
        enter = ["nsenter", f"--net={own}/net", f"--uts={own}/uts", f"--mount={own}/mnt"]
        enter += [f"--pid={own}/pid_for_children", "--wd=" + str(options.pop("cwd", Path.cwd())), "--"]
        env = self.env | options.pop("env", {})
        return subprocess.Popen([*enter, *map(str, command)], env=env, text=True, **options)

    def on(
        self, host: str, *command: str | Path, timeout: float = 60, check: bool = True, **options: Any
    ) -> str:
        """Runs a command on a host and returns what it printed on both streams.

        Raises:
            AssertionError: it ended with another code than 0, unless `check` is false.
        """
        child = self.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = child.communicate(timeout=timeout)
        finally:
            child.kill()
            child.wait()
        assert not check or child.returncode == 0, f"{command} on {host}: {child.returncode}\n{output}"
        return output

    def unplug(self, host: str) -> None:
        """Cuts a host off from the others; its processes go on."""
        self.on(host, "ip", "link", "set", "eth0", "down")

    def kill(self, host: str) -> None:
        """Ends a host and everything on it at once, as a loss of power does."""
        os.kill(self._pids.pop(host), 9)


def why_no_hosts() -> str | None:
    """Returns why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if reason := _missing(HOST_PROGRAMS):
        return reason
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "type", "bridge"]
    tried = subprocess.run(probe, capture_output=True, text=True, env={"PATH": search_path()})
    return f"needs network namespaces: {tried.stderr.strip()}" if tried.returncode else None


def why_no_slurm() -> str | None:
    """Returns why no cluster can be started here, or None."""
    return why_no_hosts() or _missing(SLURM_PROGRAMS)


@contextlib.contextmanager
def hosts(folder: Path, count: int = 2, env: Mapping[str, str] | None = None) -> Iterator[Hosts]:
    """Makes hosts node0, node1, ... at 10.0.0.10, 10.0.0.11, ... and CONTROL at 10.0.0.1; ends them at last.

    Args:
        folder: new; for their files.
        count: hosts but CONTROL.
        env: added to the variables of all commands.
    """
    names = [f"node{number}" for number in range(count)]
    addresses = {CONTROL: "10.0.0.1"} | {name: f"10.0.0.{10 + i}" for i, name in enumerate(names)}
    (folder / "local").mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    made = Hosts(names, folder / "local", os.environ | (env or {}), {})
    made.env["PATH"] = search_path(made.env["PATH"])
    with contextlib.ExitStack() as stack:
        for name, address in addresses.items():
            made._pids[name] = stack.enter_context(_namespaces(name, folder, made.env))
            if name == CONTROL:
                made.on(name, "ip", "link", "add", "eth0", "type", "bridge")
            else:
                plug = ["ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0"]
                # Its number in the eyes of this process, so not from among the processes of CONTROL.
                outer = ["nsenter", f"--net=/proc/{made._pids[CONTROL]}/ns/net"]
                subprocess.run([*outer, *plug, "netns", str(made._pids[name])], env=made.env, check=True)
                made.on(CONTROL, "ip", "link", "set", f"to-{name}", "master", "eth0", "up")
            made.on(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            made.on(name, "ip", "link", "set", "eth0", "up")
        yield made


@contextlib.contextmanager
def slurm(
    folder: Path,
    count: int = 2,
    env: Mapping[str, str] | None = None,
    *,
    proctrack: str = "pgid",
    settings: str = "",
) -> Iterator[Hosts]:
    """Makes hosts with a Slurm on them, of 8 CPUs and 4 GPUs each, and waits until all are idle.

    Args:
        folder: new; for the files of the hosts and of Slurm.
        count: nodes.
        env: added to the variables of all commands.
        proctrack: how Slurm finds the processes of a task. With pgid a signal reaches the task alone, as it
            does with the cgroup of real clusters; with linuxproc all that the task has started, too.
        settings: more lines of slurm.conf.
    """
    with hosts(folder, count, {"SLURM_CONF": str(folder / "slurm.conf")} | dict(env or {})) as made:
        (folder / "state").mkdir()
        nodes = ",".join(made.names)
        config = _SLURM_CONF.format(folder=folder, nodes=nodes, proctrack=proctrack, settings=settings)
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        for number in range(4):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR, os.makedev(1, 3))  # Slurm only counts them
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        made.on(CONTROL, "munged", "--force", *options)
        _daemon(made, CONTROL, "slurmctld")
        for name in made.names:
            _daemon(made, name, "slurmd")
        deadline = time.monotonic() + 120
        while made.on(CONTROL, "sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(count):
            assert time.monotonic() < deadline, "\n".join(p.read_text() for p in folder.glob("slurm*.log"))
            time.sleep(0.2)
        yield made


def _daemon(made: Hosts, host: str, program: str) -> None:
    # Into no pipe: the daemon keeps its streams, and their reader would wait for it.
    child = made.start(host, [program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert child.wait(timeout=60) == 0, program


@contextlib.contextmanager
def _namespaces(name: str, folder: Path, env: Mapping[str, str]) -> Iterator[int]:
    """Makes a host without a network; gives the process whose end is that of the host."""
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--pid",
        "--mount-proc",
    ]
    command += ["--fork", "--kill-child", "bash", "-c", _FIRST_PROCESS, "_"]
    command += [name, str(folder / "hosts"), str(folder / "local")]
    holder = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", f"{name} did not start"
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()  # ends when the last process of the host has closed the pipe


def _missing(programs: Mapping[str, str]) -> str | None:
    missing = [name for name in programs if shutil.which(name, path=search_path()) is None]
    packages = sorted({programs[name] for name in missing})
    return f"needs {', '.join(missing)} (Debian: {', '.join(packages)})" if missing else None


def search_path(path: str | None = None) -> str:
    """Returns PATH with the folders of the system's daemons."""
    return (path or os.environ["PATH"]) + ":/usr/local/sbin:/usr/sbin:/sbin"
