"""Data sets at s3://, gs:// and hf:// addresses, through servers on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from click.testing import CliRunner
from fsspec.config import conf
from s3fs import S3FileSystem

from disttrain.cli import main
from disttrain.errors import DataError, UnsafeError, UsageError
from disttrain.shards import remote, stores
from disttrain.shards.index import load_index
from disttrain.shards.remote import check_url, fetch_shard, fetch_text
from disttrain.urls import without_secrets
from kit.s3 import S3
from kit.server import Server
from kit.shards import read_split

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
RANGE = f"bytes=0-{len(CONTENT)}"  # one byte more, to see that there is none


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that answers requests of S3, and makes trouble."""
    (tmp_path / "www" / "bucket").mkdir(parents=True)
    (tmp_path / "www" / "bucket" / "a.tar").write_bytes(CONTENT)
    server = Server(tmp_path / "www")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home folder and cache, and a key for S3."""
    for name in ("HOME", "DISTTRAIN_CACHE"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key-for-tests"),
        ("AWS_SECRET_ACCESS_KEY", "secret-for-tests"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("no_proxy", "*"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_PAUSE_S", 0.01)
    S3FileSystem.clear_instance_cache()  # it would go on with the environment of another test


def fetch(name: str = "a.tar") -> Path:
    return fetch_shard(f"s3://bucket/{name}", size=len(CONTENT), sha256=SHA256)


def refuse(handler: BaseHTTPRequestHandler, status: int, code: str, words: str = "words of S3") -> bool:
    """Sends an error as S3 does."""
    body = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>".encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


# --- S3 ---------------------------------------------------------------------------------------------


def test_a_data_set_in_a_bucket_is_that_on_the_disk(
    s3: S3, seven_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    s3.upload(seven_root, "photos/prefix")
    local, index = load_index("seven", str(seven_root)), load_index("seven", "s3://photos/prefix/")
    assert (index.digest, index.base) == (local.digest, "s3://photos/prefix/seven")
    for split in ("train", "val"):
        assert list(read_split(index, split)) == list(read_split(local, split))
        assert list(read_split(index, split)) == list(read_split(local, split))  # from the cache
    shards = [request for request in s3.requests if request.startswith("GET /photos/") and ".tar" in request]
    assert len(shards) == len(set(shards)) == 9


def test_an_index_may_name_shards_in_a_bucket(
    s3: S3, seven_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    s3.upload(seven_root, "elsewhere")
    (tmp_path / "seven").mkdir()
    text = (seven_root / "seven" / "index.json").read_text()
    for login in ("me:secret@", ""):
        shards = re.sub(r'"([a-z]+-\d\.tar)"', rf'"s3://{login}elsewhere/seven/\1"', text)
        (tmp_path / "seven" / "index.json").write_text(shards)
        if login:
            with pytest.raises(UnsafeError, match=r"refused to open .* s3://.* address"):
                load_index("seven", str(tmp_path))
    local, index = load_index("seven", str(seven_root)), load_index("seven", str(tmp_path))
    assert list(read_split(index, "val")) == list(read_split(local, "val"))


@pytest.mark.parametrize(("place", "words"), [("no-bucket", "bucket"), ("there", "key")])
def test_a_missing_bucket_or_key_is_told(
    s3: S3, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    s3.put("there")
    with pytest.raises(DataError, match=rf"s3://{place}/seven/index\.json: not found: .* {words} .*AWS_"):
        load_index("seven", f"s3://{place}")


@pytest.mark.parametrize("missing", ["keys", "profile"])
def test_without_credentials_the_message_says_where_they_may_be(
    server: Server, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    if missing == "profile":
        monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(DataError, match=r"s3://bucket/a\.tar: access denied: .*AWS_ACCESS_KEY_ID.*~/\.aws"):
        fetch()
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken")]
)
def test_refused_credentials_are_not_told(server: Server, status: int, code: str) -> None:
    server.trouble = lambda handler, content: refuse(handler, status, code)
    with pytest.raises(DataError, match=r"a\.tar: access denied: words of S3; .*AWS_PROFILE") as caught:
        fetch()
    assert caught.value.exit_code == 65
    assert "for-tests" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("failures", [2, 4])
def test_a_busy_store_is_asked_four_times(server: Server, failures: int) -> None:
    server.trouble = lambda handler, content: (
        len(server.requests) <= failures and refuse(handler, 503, "SlowDown", "Reduce your request rate")
    )
    if failures == 2:
        assert fetch().read_bytes() == CONTENT
    else:
        with pytest.raises(DataError, match=r"a\.tar: Reduce your request rate; check the URL"):
            fetch()
    assert len(server.requests) == min(failures + 1, 4)


def test_a_broken_download_goes_on_with_the_chunk_that_broke(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rest = f"bytes=0-{2**20 - 1}", f"bytes={2**20}-{len(CONTENT)}"

    def cut(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        if handler.headers["Range"] != rest or server.requests.count(("/bucket/a.tar", rest)) > 1:
            return False
        handler.send_response(206)
        handler.send_header("Content-Length", str(2**20))
        handler.end_headers()
        handler.wfile.write(content[2**20 : 2**20 + 1000])
        handler.close_connection = True
        return True

    monkeypatch.setattr(stores, "_CHUNK_BYTES", 2**20)
    server.trouble = cut
    assert fetch().read_bytes() == CONTENT
    assert sorted(part for _, part in server.requests if part) == [first, rest, rest]


def test_a_silent_store_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.05)
    server.trouble = lambda handler, content: bool(time.sleep(0.3)) or True
    with pytest.raises(
        DataError, match=r"a\.tar: Read timeout on endpoint URL: .*; check the URL and the net"
    ):
        fetch()
    assert len(server.requests) == 4


def test_no_store_at_all(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TRIES", 2)
    server.http.socket.close()
    with pytest.raises(DataError, match=r"a\.tar: Could not connect to the endpoint URL: .*; check the URL"):
        fetch()


@pytest.mark.parametrize(
    ("content", "requests", "words"),
    [
        (CONTENT[:-1] + b"x", 2, "SHA-256"),
        (CONTENT + b"x", 1, "larger than"),
        (CONTENT[:-1], 4, "IncompleteRead|not satisfiable"),
    ],
    ids=["other", "longer", "shorter"],
)
def test_an_object_that_changed_is_refused(
    server: Server, tmp_path: Path, content: bytes, requests: int, words: str
) -> None:
    (tmp_path / "www" / "bucket" / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"s3://bucket/a\.tar: .*({words})") as caught:
        fetch()
    assert caught.value.exit_code == 65
    assert len(server.requests) == requests
    assert not [path for path in (tmp_path / "DISTTRAIN_CACHE" / "shards").iterdir() if path.suffix == ".tar"]


# --- Addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///x",
        "s3://AKIA1:sec/ret@bucket/x",
        "gs://me:secret@bucket/x",
        "s3://bucket/x?versionId=1",
        "s3://bucket::file:///etc/passwd",
        "s3://bucket/a b",
        "hf://user/model",
        "hf://datasets/name",
    ],
)
def test_malformed_addresses_are_refused(url: str) -> None:
    with pytest.raises(
        UsageError, match=r"not a valid address; expected .* credentials|comes from"
    ) as caught:
        check_url(url)
    assert not {"sec", "ret", "secret"} & set(str(caught.value).replace("/", ":").split(":"))


def test_addresses_that_are_read() -> None:
    for url in (
        "s3://bucket",
        "gs://my_bucket/a/b",
        "hf://datasets/u/n",
        "hf://datasets/u/n@refs/pr/1/folder",
    ):
        check_url(url)
    assert without_secrets("x 's3://KEY:a/b@bucket/x' y") == "x 's3://bucket/x' y"


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)
    url = f"{scheme}://datasets/user/name"
    with pytest.raises(UsageError) as caught:
        fetch_text(url, 10)
    assert str(caught.value) == f'{url}: needs the package {package}; run pip install "disttrain[{scheme}]"'


@pytest.mark.parametrize("command", [("index",), ("pack", "--name", "x")])
@pytest.mark.parametrize(
    ("url", "copies"),
    [
        (
            "s3://bucket/x",
            ["aws s3 sync s3://bucket/x FOLDER", "aws s3 sync FOLDER/NAME s3://BUCKET/FOLDER/NAME"],
        ),
        ("gs://bucket/x", ["gcloud storage rsync -r gs://bucket/x FOLDER"]),
        ("hf://datasets/u/n", ["hf upload --repo-type dataset USER/NAME FOLDER/NAME NAME"]),
    ],
)
def test_making_a_data_set_there_says_what_to_do(
    command: tuple[str, ...], url: str, copies: list[str]
) -> None:
    result = CliRunner().invoke(main, ["data", *command, url])
    assert result.exit_code == 2
    assert f"{url}: is on a server" in result.output
    assert not [copy for copy in copies if copy not in result.output]


# --- Google Cloud Storage and Hugging Face, as far as a small server goes ----------------------------


def test_gs_reads_ranges_of_objects(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "gs", {"endpoint_url": server.url, "token": "anon"})
    folder = tmp_path / "www" / "download/storage/v1/b/bucket/o"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "www" / "bucket" / "a.tar", folder / "seven%2Fa.tar")
    url = "gs://bucket/seven/a.tar"
    assert fetch_shard(url, size=len(CONTENT), sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == [("/download/storage/v1/b/bucket/o/seven%2Fa.tar?alt=media", RANGE)]
    with pytest.raises(DataError, match=r"gs://bucket/x: not found: .*GOOGLE_APPLICATION_CREDENTIALS"):
        fetch_text("gs://bucket/x", 10)
    server.trouble = lambda handler, content: refuse(handler, 403, "", "words of Google")
    with pytest.raises(DataError, match=r"a\.tar: access denied: .*words of Google.*FSSPEC_GS_TOKEN=anon"):
        fetch_text(url, 10)


def test_hf_reads_ranges_of_files(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "hf", {"endpoint": server.url, "token": "hf_for-tests"})
    files = {
        "api/datasets/u/n/revision/v1": {"id": "u/n", "sha": "1" * 40, "siblings": []},
        "api/datasets/u/n/tree/v1/seven": [
            {"type": "file", "oid": "0" * 40, "size": len(CONTENT), "path": "seven/a.tar"}
        ],
    }
    for name, content in files.items():
        (tmp_path / "www" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "www" / name).write_text(json.dumps(content))
    folder = tmp_path / "www" / "datasets/u/n/resolve/v1/seven"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "www" / "bucket" / "a.tar", folder)
    url = "hf://datasets/u/n@v1/seven/a.tar"
    assert fetch_shard(url, size=len(CONTENT), sha256=SHA256).read_bytes() == CONTENT
    assert server.requests[-1] == ("/datasets/u/n/resolve/v1/seven/a.tar", RANGE)
    assert set(server.logins) == {"Bearer hf_for-tests"}
    with pytest.raises(DataError, match=r"x\.tar: not found: .*check the address.*HF_TOKEN") as caught:
        fetch_text("hf://datasets/u/n@v1/seven/x.tar", 10)
    assert "for-tests" not in str(caught.value)
