"""Data sets on servers that demand a login or a signature, and that nobody gets to see it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from click.testing import CliRunner

from disttrain.cli import main
from disttrain.config import dump_config, load_config
from disttrain.errors import DataError, UsageError
from disttrain.shards.index import load_index
from disttrain.shards.reader import open_shard
from disttrain.urls import public, without_secrets
from kit import REPOSITORY
from kit.server import Server

BASIC = "Basic " + base64.b64encode(b"me:pass/w@rd").decode()


@pytest.fixture
def server(tmp_path: Path, seven_root: Path) -> Iterator[Server]:
    shutil.copytree(seven_root / "seven", tmp_path / "www" / "seven")
    server = Server(tmp_path / "www")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no server that is known."""
    (tmp_path / "home").mkdir()
    for name, value in (
        ("HOME", tmp_path / "home"),
        ("DISTTRAIN_CACHE", tmp_path / "cache"),
        ("no_proxy", "*"),
    ):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DISTTRAIN_SERVERS", "{}")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("DISTTRAIN_HTTP_TOKEN", raising=False)
    return tmp_path / "home"


def write_netrc(path: Path, mode: int = 0o600) -> None:
    path.write_text("machine 127.0.0.1 login me password pass/w@rd\n")
    path.chmod(mode)


@pytest.mark.parametrize("way", ["url", "signature", "token", "netrc", "$NETRC"])
def test_a_login_gets_in(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    root = server.url
    server.demand(BASIC)
    with pytest.raises(DataError, match=r"401 Unauthorized; check the login or the signature; .*~/\.netrc"):
        load_index("seven", root)
    if way == "url":
        root = root.replace("//", "//me:pass%2Fw%40rd@")
    elif way == "signature":
        server.demand(None, "sig=a%2Fb&se=1")
        root += "/?sig=a%2Fb&se=1"
    elif way == "token":
        server.demand("Bearer abc")
        monkeypatch.setenv("DISTTRAIN_HTTP_TOKEN", "abc")
    elif way == "netrc":
        write_netrc(home / ".netrc")
    else:
        write_netrc(home / "mine")
        monkeypatch.setenv("NETRC", "~/mine")
    index = load_index("seven", root)
    assert index.base == f"{server.url}/seven"
    assert len(open_shard(index, "train", 0).contents.keys) == 3


def test_a_wrong_login_is_not_told(server: Server, home: Path) -> None:
    server.demand(BASIC)
    with pytest.raises(DataError) as caught:
        load_index("seven", server.url.replace("//", "//me:secret@") + "?sig=hidden")
    assert str(caught.value).startswith(f"{server.url}/seven/index.json: the server answered 401")
    assert not {"secret", "hidden"} & set(str(caught.value).replace("?", "=").replace("@", ":").split("="))
    (home / ".netrc").write_text("machin 127.0.0.1")
    with pytest.raises(DataError, match=r"\(~/\.netrc cannot be used: bad toplevel token 'machin'"):
        load_index("seven", server.url)


def test_a_password_with_a_slash_is_not_told_either() -> None:
    for url in ("http://me:sec/ret@host/x", "http://me:sec#ret@host/x", "http://me:sec?ret@host:x/"):
        with pytest.raises(UsageError, match=r"not a valid URL.* %XX for special characters") as caught:
            load_index("seven", url)
        assert "sec" not in str(caught.value)
        assert "ret@" not in str(caught.value)


def test_servers_that_an_index_names_get_no_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Server(tmp_path / "www")
    content = json.loads((tmp_path / "www" / "seven" / "index.json").read_text())
    for split in content["splits"].values():
        for shard in split["shards"]:
            shard["file"] = f"{other.url}/seven/{shard['file']}?sig=hidden"
    (tmp_path / "www" / "seven" / "index.json").write_text(json.dumps(content))
    monkeypatch.setenv("DISTTRAIN_HTTP_TOKEN", "abc")
    try:
        index = load_index("seven", server.url.replace("//", "//me:secret@"))
        said: list[str] = []
        open_shard(index, "train", 0, said.append)
    finally:
        other.close()
    assert server.logins == ["Basic " + base64.b64encode(b"me:secret").decode()]
    assert other.logins == [None]
    assert other.requests == [("/seven/train-0.tar?sig=hidden", None)]
    assert "hidden" not in index.place(index.splits["train"].shards[0]) + "".join(said)


def test_a_redirect_hands_no_login_to_another_server(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "www")

    def redirect(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        handler.send_response(302)
        handler.send_header("Location", f"{other.url}{handler.path.partition('?')[0]}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.trouble = redirect
    try:
        load_index("seven", server.url.replace("//", "//me:secret@"))
    finally:
        other.close()
    assert server.logins != [None]
    assert other.logins == [None]


def test_a_config_has_no_login() -> None:
    config = load_config(
        REPOSITORY / "configs/quickstart.yaml", ["data.root=https://me:secret@host/x/?sig=hidden"]
    )
    assert config.data.root == "https://host/x"
    assert "secret" not in dump_config(config)
    assert public("/some/folder?x") == "/some/folder?x"
    assert without_secrets("a 'https://u:p@h/x?s=1' b=http://h/y#z c") == "a 'https://h/x' b=http://h/y c"


@pytest.mark.parametrize("command", [("index",), ("pack", "--name", "x")])
def test_folders_on_a_server_are_refused_with_what_to_do(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["data", *command, "http://me:secret@host/x?sig=1"])
    assert result.exit_code == 2
    assert "http://host/x: is on a server" in result.output
    assert "download it" in result.output
