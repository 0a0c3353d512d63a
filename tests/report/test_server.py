"""`disttrain serve` through HTTP and in a browser: lists, pages, texts, and nothing else of the disk."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from disttrain.cli import main
from disttrain.report.listing import Listing
from disttrain.report.pages import Pages, open_inside, tail
from disttrain.report.server import is_expected
from kit.commands import background
from kit.run_files import CONFIG, train_record, write_lines, write_run

CHROMIUM = shutil.which("chromium")


# --- What may be asked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost:8765", "LOCALHOST", "127.0.0.1:1", "[::1]:8765", "node7:80", "10.1.2.3"]
)
def test_names_and_addresses_of_this_machine_are_expected(host: str) -> None:
    assert is_expected(host, {"localhost", "node7"})


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8765", "evil.example@x", "[::1", ""]
)
def test_other_names_are_not_expected(host: str) -> None:
    assert not is_expected(host, {"localhost", "node7"})


def test_only_regular_files_inside_the_folder_are_opened(tmp_path: Path) -> None:
    runs, secret = tmp_path / "runs", tmp_path / "secret.log"
    (runs / "a").mkdir(parents=True)
    secret.write_text("secret")
    (runs / "a/in.log").write_text("inside")
    (runs / "a/link.log").symlink_to(secret)
    (runs / "b").symlink_to(tmp_path)
    os.mkfifo(runs / "a/pipe.log")
    assert tail(runs, runs / "a/in.log") == "inside"
    names = ("a/link.log", "b/secret.log", "../secret.log", "a/pipe.log", "a", "a/none.log")
    for path in (secret, *(runs / name for name in names)):
        with pytest.raises(OSError, match="No such file"):
            open_inside(runs, path)


def test_of_a_long_log_the_last_lines_are_shown(tmp_path: Path) -> None:
    (tmp_path / "long.log").write_text("".join(f"line {number:06}\n" for number in range(10_000)))
    head, first, *_, last = tail(tmp_path, tmp_path / "long.log").splitlines()
    assert head == "[the last lines of 120,000 bytes]"
    assert (first, last) == ("line 004539", "line 009999")


def test_a_taken_port_and_a_missing_folder_end_with_one_line(taken_port: int, tmp_path: Path) -> None:
    for arguments, code, text in (
        ([str(tmp_path), "--port", str(taken_port)], 73, "Address already in use; give another --port"),
        ([str(tmp_path), "--host", "192.0.2.1"], 2, "--host 192.0.2.1: is not an address of this machine"),
        ([str(tmp_path / "none")], 2, "no such folder; give the folder of your runs"),
    ):
        result = CliRunner().invoke(main, ["serve", *arguments])
        assert (result.exit_code, result.output.count("\n")) == (code, 1)
        assert text in result.output


def test_a_browser_is_given_the_token_in_a_file_that_only_the_user_reads(tmp_path: Path) -> None:
    with contextlib.closing(Pages(Listing(tmp_path))) as pages:
        file = pages.doorway("http://[::1]:8765/?token=abc&x=1")
        assert file.parent.stat().st_mode & 0o077 == 0
        assert 'url=http://[::1]:8765/?token=abc&amp;x=1"' in file.read_text()
    assert not file.exists()


# --- A server ---------------------------------------------------------------------------------------


class Client:
    """Asks a server, without following redirects."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.port = urlsplit(url).port

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        """Returns the status, the headers and the text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[Client]:
    """Starts the command, and ends it with Ctrl-C."""
    process = background(["serve", str(folder), "--port", "0", *options], folder.parent, folder)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://"), line + process.communicate()[0]
    client = Client(line.split()[0])
    try:
        yield client
    finally:
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=240)[0]
    assert (process.returncode, output) == (0, ""), "it says nothing but its address, and no token in a log"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of which is broken, and a secret outside."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    for name, accuracies in {"first": (0.5, 0.9), "sub/second": (0.5, 0.8)}.items():
        write_run(folder / name, accuracies=accuracies, config=CONFIG.replace("demo", Path(name).name))
    (folder / "first/logs").mkdir()
    (folder / "first/logs/rank_00000.log").write_text("a line\n")
    (folder / "first/logs/rank_00001.log").symlink_to(folder.parent / "secret")
    (folder.parent / "secret").write_text("secret")
    write_run(folder / "broken")
    (folder / "broken/config.yaml").unlink()
    (folder / "broken/config.yaml").symlink_to(folder.parent / "secret")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Client]:
    with served(runs) as client:
        yield client


@pytest.mark.integration
def test_it_shows_the_runs_and_writes_nothing(server: Client, runs: Path) -> None:
    before = sorted(runs.rglob("*"))
    code, _, text = server.get("/runs.json")
    assert code == 200
    assert [row["path"] for row in json.loads(text)["rows"]] == ["broken", "first", "sub/second"]
    for path, kind, part in (
        ("/", "text/html", str(runs)),
        ("/run/sub/second/report.html", "text/html", "live.js"),
        ("/run/first/config.yaml", "text/plain", "name: first"),
        ("/run/first/logs/", "text/html", "rank_00000.log"),
        ("/run/first/logs/rank_00000.log", "text/plain", "a line"),
    ):
        code, headers, text = server.get(path)
        assert (code, headers["Content-Type"].partition(";")[0]) == (200, kind), path
        assert part in text
    assert sorted(runs.rglob("*")) == before


@pytest.mark.integration
def test_nothing_else_of_the_disk_is_served(server: Client) -> None:
    for path in (
        "/run/broken/report.html",
        "/run/broken/config.yaml",
        "/run/first/logs/rank_00001.log",
        "/run/first/logs/../../../secret",
        "/run/first/logs/..%2f..%2f..%2fsecret",
        "/run/../config.yaml",
        "/run/%2e%2e/config.yaml",
        "/run//etc/config.yaml",
        "/run/%2Fetc/config.yaml",
        "/run/first/status.json",
        "/assets/../server.py",
        "/assets/%2e%2e/report.js",
        "/assets/runs.html",
        "/compare?run=first&run=../first",
        "/version?run=/etc",
    ):
        code, headers, text = server.get(path)
        assert (code, headers["Content-Type"].partition(";")[0]) == (404, "text/html"), path
        assert "secret" not in text.replace(path, "")
        assert "Traceback" not in text
    for host in ("evil.example", f"evil.example:{server.port}"):
        code, _, text = server.get("/runs.json", Host=host)
        assert (code, "second" in text) == (403, False)
    assert server.get("/compare?run=first")[0] == 400


@pytest.mark.integration
def test_beyond_this_machine_it_asks_for_the_token(runs: Path) -> None:
    with served(runs, "--host", "0.0.0.0") as client:
        token = client.url.partition("?token=")[2]
        assert len(token) >= 32
        for path in ("/", "/runs.json", "/assets/runs.js", "/?token=wrong", "/no/such/page"):
            code, _, text = client.get(path, Cookie=f"disttrain-{client.port}=wrong")
            assert (code, token in text) == (403, False)
        code, headers, _ = client.get(f"/run/first/config.yaml?token={token}")
        assert (code, headers["Location"]) == (302, "/run/first/config.yaml")
        cookie, *how = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Lax"} <= set(how)
        assert client.get("/run/first/config.yaml", Cookie=cookie)[0] == 200
        assert client.get("/no/such/page", Cookie=cookie)[0] == 404


# --- In a browser -----------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of Debian's Chromium, which fails the test if it complains."""
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 500})
        page.set_default_timeout(120_000)
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    assert not complaints


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("#runs tbody tr:visible a").all_inner_texts()
    return found


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_runs_are_sorted_filtered_compared_and_followed(server: Client, runs: Path, page: Any) -> None:
    page.goto(server.url)
    page.get_by_role("button", name="best accuracy").click()
    assert names(page)[:2] == ["first", "sub/second"]
    page.get_by_role("button", name="best accuracy").click()
    assert names(page)[:2] == ["sub/second", "first"]
    page.get_by_label("Compare first").check()
    page.get_by_label("Filter").fill("SECOND cnn")
    assert names(page) == ["sub/second"]
    page.get_by_label("Compare sub/second").check()
    page.reload()
    page.get_by_text("1 of 3 runs").wait_for()
    assert page.get_by_label("Compare sub/second").is_checked(), "sort, filter and ticks outlive a reload"
    with page.expect_response("**/runs.json"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert names(page) == ["sub/second"]
    page.get_by_role("button", name="Compare 2").click()
    page.get_by_role("heading", name="2 runs compared").wait_for()
    assert page.url == f"{server.url}compare?run=sub%2Fsecond&run=first"
    page.get_by_role("link", name="All runs").click()
    page.get_by_role("link", name="sub/second").click()
    page.wait_for_url("**/run/sub/second/report.html")
    page.evaluate("scrollTo(0, 200)")
    write_lines(runs / "sub/second/metrics.jsonl", [train_record(21)], "ab")
    with page.expect_navigation():
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_function("scrollY === 200")
    page.keyboard.press("Shift")
    write_lines(runs / "sub/second/metrics.jsonl", [train_record(22)], "ab")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_role("button", name="New data: reload").wait_for()
