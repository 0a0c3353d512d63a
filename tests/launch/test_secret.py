"""Where the nodes of a run find its secret, and who else could."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disttrain.errors import UsageError
from disttrain.launch import rendezvous as module
from disttrain.launch.plan import plan_secret
from disttrain.launch.rendezvous import Channel
from disttrain.launch.secret import SECRET, Secret, with_secret
from disttrain.runs.runfolder import RunFolder
from kit.nodes import LONG, join, meet


def test_the_text_of_the_environment_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert Secret.of({SECRET: LONG}, file).read() == LONG.encode()
    assert Secret.of({SECRET: ""}, file) == Secret.of({}, file) == Secret(file=file)
    with pytest.raises(UsageError, match="DISTTRAIN_SECRET has 6 characters, but needs 16; set DISTTRAIN"):
        Secret.of({SECRET: "secret"}, file)
    assert LONG not in repr(Secret(LONG)), "an error report would show it"


def test_srun_hands_on_the_secret_that_is_set_or_a_new_one() -> None:
    assert with_secret({"A": "b", SECRET: LONG}) == {"A": "b", SECRET: LONG}
    new, other = with_secret({"A": "b"}), with_secret({SECRET: ""})
    assert new["A"] == "b"
    assert len(new[SECRET]) == 64
    assert new[SECRET] != other[SECRET]


def test_the_file_is_known_before_the_config() -> None:
    assert plan_secret(Path("a/run"), {"SLURM_JOB_ID": "7"}) == Path("a/run/.secret")
    assert plan_secret(None, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == Path("runs/.secret-7")
    assert plan_secret(None, {}) is None


def test_only_the_user_can_read_the_file_while_node_0_waits(tmp_path: Path) -> None:
    file = tmp_path / "new/run/.secret"
    previous = os.umask(0)
    try:
        with Secret(file=file).offered(holds_folder=True) as text:
            assert file.stat().st_mode & 0o777 == 0o600
            assert Secret(file=file).read() == text
            assert len(text) == 64
    finally:
        os.umask(previous)
    assert list(tmp_path.iterdir()) == [], "folders made for it go too"
    with Secret(file=file).offered(holds_folder=True) as other:
        assert other != text
        (file.parent / "logs").mkdir()
    assert [path.name for path in file.parent.iterdir()] == ["logs"]


def test_a_file_that_a_killed_launcher_left_is_used_and_removed(tmp_path: Path) -> None:
    secret = Secret(file=tmp_path / ".secret")
    with secret.offered(holds_folder=True) as text:
        with secret.offered(holds_folder=False) as other:  # of a launcher that was refused this run folder
            assert other == text
        assert secret.read() == text
    secret._make(tmp_path / ".secret")
    with secret.offered(holds_folder=True):
        pass
    assert list(tmp_path.iterdir()) == []


def open_to_all(file: Path) -> None:
    file.write_text(LONG)
    file.chmod(0o644)


def empty(file: Path) -> None:
    file.touch(0o600)


def link(file: Path) -> None:
    (file.parent / "elsewhere").write_text(LONG)
    (file.parent / "elsewhere").chmod(0o600)
    file.symlink_to("elsewhere")


def pipe(file: Path) -> None:
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (open_to_all, r"is open to other users \(mode 0644\); remove it, or set DISTTRAIN_SECRET to"),
        (empty, "is not complete; remove it"),
        (link, "Too many levels of symbolic links; set DISTTRAIN_SECRET to"),
        (pipe, "is not a regular file; remove it"),
    ],
)
def test_a_file_that_others_may_know_is_refused(make, problem, tmp_path: Path) -> None:
    make(tmp_path / ".secret")
    secret = Secret(file=tmp_path / ".secret")
    with pytest.raises(UsageError, match=problem), secret.offered(holds_folder=True):
        pass
    with pytest.raises((UsageError, OSError)):
        secret.read()
    assert os.path.lexists(tmp_path / ".secret"), "what is not ours stays"


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Secret(file=tmp_path / ".secret")
    with secret.offered(holds_folder=True):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(UsageError, match=r"\.secret: belongs to another user; remove it"):
            secret.read()


def test_a_file_system_without_modes_needs_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fchmod = os.fchmod
    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: fchmod(descriptor, 0o777))
    refused = pytest.raises(UsageError, match=r"mode 0777\).* set DISTTRAIN_SECRET to the same random text")
    with refused, Secret(file=tmp_path / ".secret").offered(holds_folder=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_needs_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    secret = Secret(file=tmp_path / "file/run/.secret")
    refused = pytest.raises(UsageError, match="Not a directory; set DISTTRAIN_SECRET")
    with refused, secret.offered(holds_folder=True):
        pass


def test_nodes_meet_by_the_file_of_the_run_folder_and_leave_none(port: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    before = sorted(folder.path.iterdir())
    channels = meet(port, *[Secret(file=folder.secret)] * 3)
    assert [type(channel) for channel in channels] == [Channel] * 3
    assert sorted(folder.path.iterdir()) == before
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("there", ["text", "file"])
def test_a_node_with_another_secret_says_how_to_share_one(
    there: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNSEEN_S", 0.3)  # a file of another node may appear late on NFS
    theirs = Secret("another text, long enough") if there == "text" else Secret(file=tmp_path / "b/.secret")
    notes: list[str] = []
    first, second = meet(port, Secret(file=tmp_path / "a/.secret"), theirs, timeout_s=0.9, say=notes.append)
    remedy = "set DISTTRAIN_SECRET to the same random text on every node"
    assert isinstance(second, UsageError)
    assert str(second).startswith(f"node 0 at 127.0.0.1:{port} turned this node away: ")
    problem = {
        "text": "it has another secret than DISTTRAIN_SECRET",
        "file": f"{tmp_path / 'b/.secret'}: No such file or directory",
    }[there]
    assert f"{problem}; {remedy}" in str(second)
    assert "1 of 2 nodes joined" in str(first)
    assert remedy in str(first)
    does = {"text": "has another secret than this run", "file": "cannot read the secret of this run"}[there]
    assert len(notes) == 1
    assert notes[0].startswith(f"port {port}: turned away 127.0.0.1, which {does}; if it is a node of this")
    assert list(tmp_path.iterdir()) == []


def test_the_remedy_for_folders_that_are_not_shared_works(port: int) -> None:
    for channel in meet(port, *[Secret.of({SECRET: LONG}, None)] * 2):
        assert isinstance(channel, Channel)
        channel.close()


def test_a_file_that_others_can_read_is_refused_by_a_node(port: int, tmp_path: Path) -> None:
    open_to_all(tmp_path / ".secret")
    with pytest.raises(UsageError, match="is open to other users"):
        join(port, 0, Secret(file=tmp_path / ".secret"))
