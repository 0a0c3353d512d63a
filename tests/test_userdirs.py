"""Where what is made from data sets lies."""

import os
from pathlib import Path

import pytest

from disttrain.errors import UsageError
from disttrain.userdirs import decoded_folder, user_cache


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """A Slurm job with both folders of its own on the node, and no $DISTTRAIN_CACHE."""
    folders = {name: tmp_path / name for name in ("SLURM_TMPDIR", "TMPDIR")}
    for name, folder in folders.items():
        folder.mkdir(mode=0o700)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("DISTTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return folders


def test_a_job_decodes_on_the_disk_of_its_node(job, monkeypatch, tmp_path):
    assert decoded_folder() == job["SLURM_TMPDIR"] / "disttrain/decoded"
    monkeypatch.delenv("SLURM_TMPDIR")
    assert decoded_folder() == job["TMPDIR"] / "disttrain/decoded"
    monkeypatch.setenv("TMPDIR", "")
    assert decoded_folder() == tmp_path / "user/disttrain/decoded"


def test_the_folder_that_was_asked_for_has_the_last_word(job, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "mine"))
    assert decoded_folder() == tmp_path / "mine/decoded"


def test_outside_of_a_job_it_is_the_users_cache(job, monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert decoded_folder() == tmp_path / "user/disttrain/decoded"


@pytest.mark.parametrize("how", ["missing", "a file", "relative", "open to all", "open to the group"])
def test_a_folder_that_is_not_the_jobs_alone_is_passed_over(job, monkeypatch, how):
    folder = job["SLURM_TMPDIR"]
    match how:
        case "missing":
            folder.rmdir()
        case "a file":
            folder.rmdir()
            folder.touch()
        case "relative":
            monkeypatch.chdir(folder.parent)
            monkeypatch.setenv("SLURM_TMPDIR", folder.name)
        case "open to all":
            folder.chmod(0o1777)
        case "open to the group":
            folder.chmod(0o770)
    assert decoded_folder() == job["TMPDIR"] / "disttrain/decoded"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_folder_of_another_user_is_passed_over(job):
    os.chown(job["SLURM_TMPDIR"], 65534, 65534)
    assert decoded_folder() == job["TMPDIR"] / "disttrain/decoded"


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # as in a container: not in /etc/passwd
    with pytest.raises(UsageError, match=r"no home folder.*set HOME .*DISTTRAIN_DATA and DISTTRAIN_CACHE"):
        user_cache()
