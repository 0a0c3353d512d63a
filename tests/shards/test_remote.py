"""Data sets on a web server, through a real one on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

from disttrain.errors import DataError, StorageError, UnsafeError, UsageError
from disttrain.shards import remote
from disttrain.shards.index import load_index
from disttrain.shards.remote import check_url, fetch_shard, fetch_text
from kit.commands import Run, wait_for
from kit.marks import nightly
from kit.server import Server
from kit.shards import read_split

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.tar").write_bytes(CONTENT)
    server = Server(tmp_path / "www")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DISTTRAIN_SERVERS", "{}")
    monkeypatch.setattr(remote, "_PAUSE_S", 0.01)
    return tmp_path / "cache" / "shards"


def fetch(server: Server, name: str = "a.tar", content: bytes = CONTENT, sha256: str = "") -> Path:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    return fetch_shard(f"{server.url}/{name}", size=len(content), sha256=digest)


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix not in {".tar", ".used", ".lock"})


def send(handler: BaseHTTPRequestHandler, content: bytes, stated: int) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(stated))
    handler.end_headers()
    handler.wfile.write(content)
    handler.close_connection = True
    return True


# --- Shards -----------------------------------------------------------------------------------------


def test_a_shard_is_downloaded_once(server: Server, cache: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        path = fetch_shard(f"{server.url}/a.tar", size=len(CONTENT), sha256=SHA256, say=said.append)
        assert path.read_bytes() == CONTENT
    assert server.requests == [("/a.tar", None)]
    assert len(said) == 1
    assert "downloading" in said[0]
    assert left_over(cache) == []


def test_processes_that_need_a_shard_at_once_download_it_once(server: Server) -> None:
    def slowly(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        time.sleep(0.5)
        return False

    server.trouble = slowly
    program = f"""
from disttrain.shards.remote import fetch_shard
print(fetch_shard("{server.url}/a.tar", size={len(CONTENT)}, sha256="{SHA256}").stat().st_size)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0] for process in processes] == [f"{len(CONTENT)}\n"] * 3
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, ranges: bool) -> None:
    server.ranges = ranges
    server.trouble = lambda handler, content: (
        len(server.requests) < 2 and send(handler, content[:1000000], len(content))
    )
    assert fetch(server).read_bytes() == CONTENT
    assert server.requests == [("/a.tar", None), ("/a.tar", "bytes=1000000-")]


def test_a_busy_server_is_asked_again(server: Server) -> None:
    def busy(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        if len(server.requests) < 3:
            handler.send_error(503)
            return True
        return False

    server.trouble = busy
    assert fetch(server).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_missing_shard_is_told_at_once(server: Server, cache: Path) -> None:
    with pytest.raises(DataError, match=r"b\.tar: the server answered 404"):
        fetch(server, "b.tar")
    assert len(server.requests) == 1
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("content", "requests", "words"),
    [
        (CONTENT[:-1] + b"x", 2, "SHA-256"),
        (CONTENT + b"x", 1, "larger than"),
        (CONTENT[:-1], 4, "IncompleteRead"),
    ],
    ids=["other", "longer", "shorter"],
)
def test_other_content_than_the_index_says_is_refused(
    server: Server, cache: Path, tmp_path: Path, content: bytes, requests: int, words: str
) -> None:
    (tmp_path / "www" / "a.tar").write_bytes(content)
    server.ranges = False
    with pytest.raises(DataError, match=rf"a\.tar: .*{words}") as caught:
        fetch(server)
    assert caught.value.exit_code == 65
    assert len(server.requests) == requests
    assert list(cache.glob("*.tar")) == left_over(cache) == []


def test_a_silent_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.05)
    server.trouble = lambda handler, content: bool(time.sleep(0.3)) or True
    with pytest.raises(DataError, match=r"a\.tar: .*(timed out|closed)"):
        fetch(server)
    assert len(server.requests) == 4


def test_no_server_at_all(server: Server) -> None:
    server.http.socket.close()
    with pytest.raises(DataError, match=r"check the URL and the network"):
        fetch(server)


def test_a_user_and_password_are_not_told(server: Server) -> None:
    url = server.url.replace("//", "//me:secret@")
    with pytest.raises(DataError) as caught:
        fetch_text(f"{url}/missing", 100)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/x"])
def test_a_server_may_not_send_elsewhere(server: Server, target: str) -> None:
    def redirect(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.trouble = redirect
    with pytest.raises(UnsafeError, match="refused the redirect to") as caught:
        fetch(server)
    assert caught.value.exit_code == 77


def test_a_redirect_is_followed_from_where_the_connection_broke(server: Server, tmp_path: Path) -> None:
    def elsewhere(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        if handler.path == "/b.tar":
            return len(server.requests) < 3 and send(handler, content[:1000000], len(content))
        handler.send_response(307)
        handler.send_header("Location", f"{server.url}/b.tar")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    shutil.copy(tmp_path / "www" / "a.tar", tmp_path / "www" / "b.tar")
    server.trouble = elsewhere
    assert fetch(server).read_bytes() == CONTENT
    rest = "bytes=1000000-"
    assert server.requests == [("/a.tar", None), ("/b.tar", None), ("/a.tar", rest), ("/b.tar", rest)]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("pipe:touch pwned", UnsafeError),
        ("file:///etc/passwd", UnsafeError),
        ("cat x |", UnsafeError),
        ("ftp://host/x", UsageError),
        ("s3a://bucket/x", UsageError),
        ("http:///x", UsageError),
        ("http://host/a b", UsageError),
    ],
)
def test_other_addresses_are_refused(url: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        check_url(url)
    with pytest.raises(kind):
        fetch_text(url, 10)


def test_half_an_index_is_asked_for_again(server: Server) -> None:
    server.trouble = lambda handler, content: (
        len(server.requests) < 2 and send(handler, content[:1000], len(content))
    )
    assert fetch_text(f"{server.url}/a.tar", len(CONTENT)) == CONTENT
    assert len(server.requests) == 2


def test_an_index_may_not_be_endless(server: Server) -> None:
    with pytest.raises(DataError, match="larger than 1000 bytes"):
        fetch_text(f"{server.url}/a.tar", 1000)


# --- The cache --------------------------------------------------------------------------------------


def test_the_shard_that_was_not_used_for_longest_goes_first(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_SHARD_CACHE_GIB", str(5 * 2**20 / 2**30))
    contents = {name: name.encode() + CONTENT for name in "abc"}
    for name, content in contents.items():
        (tmp_path / "www" / name).write_bytes(content)
    first = fetch(server, "a", contents["a"])
    second = fetch(server, "b", contents["b"])
    os.utime(second.with_suffix(".used"), (1, 1))
    with first.open("rb"):
        third = fetch(server, "c", contents["c"])
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    monkeypatch.setenv("DISTTRAIN_SHARD_CACHE_GIB", "1e-9")
    again = fetch(server, "b", contents["b"])
    assert list(cache.glob("*.tar")) == [again]


@pytest.mark.parametrize("value", ["much", "0", "-1", "inf", "nan"])
def test_the_limit_of_the_cache_must_be_a_number(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("DISTTRAIN_SHARD_CACHE_GIB", value)
    with pytest.raises(UsageError, match=f"DISTTRAIN_SHARD_CACHE_GIB={value}"):
        fetch(server)


def test_a_full_disk_is_told_before_the_download(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(StorageError, match=r"a shard needs 2 MiB, but only 1 MiB are free"):
        fetch(server)
    assert server.requests == []


def test_what_a_killed_download_left_is_not_trusted(server: Server, cache: Path) -> None:
    server.trouble = lambda handler, content: (
        handler.send_response(200),
        handler.end_headers(),
        handler.wfile.write(content[: 2**20]),
        handler.wfile.flush(),
        time.sleep(1),
        True,
    )[-1]
    program = f"""
from disttrain.shards.remote import fetch_shard
fetch_shard("{server.url}/a.tar", size={len(CONTENT)}, sha256="{SHA256}")
"""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        wait_for(lambda: list(cache.glob(".*.partial")), process)
        process.kill()
    assert left_over(cache) != []
    server.trouble = lambda handler, content: False
    assert fetch(server).read_bytes() == CONTENT
    assert left_over(cache) == []


# --- Data sets --------------------------------------------------------------------------------------


def test_a_data_set_on_a_server_is_that_on_the_disk(
    server: Server, tmp_path: Path, seven_root: Path, cache: Path
) -> None:
    shutil.copytree(seven_root / "seven", tmp_path / "www" / "seven")
    local, index = load_index("seven", str(seven_root)), load_index("seven", server.url + "/")
    assert index.digest == local.digest
    for split in ("train", "val"):
        assert list(read_split(index, split)) == list(read_split(local, split))
    damaged = sorted(cache.glob("*.tar"))[0]
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    before = len(server.requests)
    for split in ("train", "val"):
        assert list(read_split(index, split)) == list(read_split(local, split))
    assert len(server.requests) == before + 1  # fetched again


def test_an_index_may_name_shards_on_a_server(
    server: Server,
    tmp_path: Path,
    seven_root: Path,
    disttrain: Run,
) -> None:
    shutil.copytree(seven_root / "seven", tmp_path / "www" / "seven")
    (tmp_path / "data" / "seven").mkdir(parents=True)
    content = json.loads((seven_root / "seven" / "index.json").read_text())
    for split in content["splits"].values():
        for shard in split["shards"]:
            shard["file"] = f"{server.url}/seven/{shard['file']}"
    (tmp_path / "data" / "seven" / "index.json").write_text(json.dumps(content))
    result = disttrain("data", "verify", "seven", "--root", "data", env={"no_proxy": "*"})
    assert result.returncode == 0, result.stderr
    assert "815 samples in 9 shards" in result.stdout


@pytest.mark.parametrize("cache_mode", ["none", *nightly("host")])
def test_training_from_a_server(
    server: Server,
    tmp_path: Path,
    seven_root: Path,
    config_file: Path,
    disttrain: Run,
    cache_mode: str,
) -> None:
    shutil.copytree(seven_root / "seven", tmp_path / "www" / "seven")
    server.demand("Basic " + base64.b64encode(b"me:pass/word").decode(), "sig=s3cret%2F")
    root = server.url.replace("//", "//me:pass%2Fword@") + "?sig=s3cret%2F"
    result = disttrain(
        "run", config_file, "--procs", "2", "data.name=seven", f"data.root={root}", "--run-dir", "run",
        f"data.cache={cache_mode}", "train.epochs=1", env={"no_proxy": "*"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [result.stdout, result.stderr]
    said += [path.read_bytes().decode(errors="replace") for path in Path("run").rglob("*") if path.is_file()]
    assert not [text for text in said if re.search("pass.{1,3}word|s3cret", text)]
    shards = [path for path, _ in server.requests if ".tar" in path]
    assert len(shards) == len(set(shards)) == 9
