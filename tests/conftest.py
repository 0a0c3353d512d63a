"""What every test gets: data and caches of its own, and a check that it leaves nothing running."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kit import REPOSITORY
from kit.commands import Run

# A shell ignores SIGINT in what it runs in the background, and nohup ignores SIGHUP: so would all that the
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


os.environ["OMP_NUM_THREADS"] = "1"  # several threads of a process collapse where tests run side by side
os.environ["DISTTRAIN_REPORT"] = "0"  # a test that wants a report at the end of a run asks for it


STARTS_RUNS = {"disttrain", "trained_run", "trained", "start", "mistakes"}
"""Fixtures that start the command."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests that start the command into the integration tier; skips the tests marked gpu without one."""
    from disttrain.monitor.nvml import visible_gpus

    for item in items:
        whole_runs = item.path.is_relative_to(REPOSITORY / "tests/integration")
        starts_runs = STARTS_RUNS & set(getattr(item, "fixturenames", ()))
        if whole_runs or starts_runs or item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.integration)
    if not visible_gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the digits packed in it; shared by all tests, never written by them."""
    from disttrain.shards.datasets import prepare
    from disttrain.shards.pack import Options

    root = tmp_path_factory.mktemp("data")
    prepare("digits", None, str(root), Options())
    return root


@pytest.fixture(scope="session")
def decoded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for decoded data sets, shared by all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def seven_root(tmp_path_factory: pytest.TempPathFactory, decoded_cache: Path) -> Path:
    """A data root with `seven`: seven uneven shards made elsewhere, of PNG, JPEG and WebP files."""
    from disttrain.shards.existing_tars import index_folder
    from disttrain.shards.pack import Options
    from kit.shards import SEVEN, write_tar

    root = tmp_path_factory.mktemp("seven")
    for split, shards in SEVEN.items():
        for number, samples in enumerate(shards):
            write_tar(root / "seven" / f"{split}-{number}.tar", samples, seed=1000 * len(split) + number)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DISTTRAIN_CACHE", str(decoded_cache))
        index_folder(root / "seven", {"train": (), "val": ()}, Options())
    return root


@pytest.fixture(autouse=True)
def _own_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, decoded_cache: Path
) -> None:
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))
    monkeypatch.setenv("DISTTRAIN_CACHE", str(decoded_cache))
    for name in list(os.environ):  # a test run inside a Slurm job or under torchrun must not notice it
        if name.startswith(("SLURM_", "TORCHELASTIC_", "ACCELERATE_", "PET_")) or name in {
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "DISTTRAIN_SUPERVISOR",
            "DISTTRAIN_SECRET",
        }:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fails a test that changes the environment or leaves a child process or a thread."""
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    before = set(psutil.Process().children())  # such as a browser that serves the tests of a module
    yield
    leftover = [
        child
        for child in set(psutil.Process().children()) - before
        if child.status() != psutil.STATUS_ZOMBIE
        # Python's own, which watches over the semaphores of other processes and ends with this one.
        and not any("resource_tracker" in word for word in child.cmdline())
    ]
    assert not leftover, f"processes left behind: {leftover}"
    left = [t for t in threading.enumerate() if t not in threads and not t.daemon]
    assert not left, f"threads left behind: {left}"
    changed = {k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k)}
    changed = {k for k in changed if not k.startswith(("PYTEST_", "TORCH", "KMP_"))}  # set by importing torch
    assert not changed, f"environment variables changed: {sorted(changed)}"


@pytest.fixture
def disttrain(tmp_path: Path, digits_root: Path) -> Run:
    """Runs the command in tmp_path as a user does, with the digits prepared; returns the ended process."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 240) -> object:
        return subprocess.run(
            [sys.executable, "-m", "disttrain", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"DISTTRAIN_DATA": str(digits_root)} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run  # type: ignore[return-value]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A small experiment on the digits: two epochs, no dropout, no batch norm."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "name: tiny\n"
        "data: {name: digits}\n"
        "model: {name: cnn_mnist}\n"
        "train: {epochs: 2, batch_size: 64}\n"
        "optim: {name: adam, lr: 1e-2}\n"
        "monitor: {log_every_steps: 5}\n"
    )
    return path


@pytest.fixture
def port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
    return number


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A TCP port on which the test itself listens."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, decoded_cache: Path) -> Path:
    """The folder of a finished run on the digits with a moving average; never written by a test."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(
        "name: tiny\n"
        f"data: {{name: digits, root: {digits_root}}}\n"
        "model: {name: cnn_mnist}\n"
        "train: {epochs: 3, batch_size: 64, ema: 0.9, precision: fp32, channels_last: false}\n"
        "optim: {name: adam, lr: 1e-2}\n"
    )
    done = subprocess.run(
        [*(sys.executable, "-m", "disttrain", "run", "tiny.yaml"), "--procs", "1", "--run-dir", "run"],
        cwd=folder,
        env=os.environ | {"DISTTRAIN_CACHE": str(decoded_cache)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"
