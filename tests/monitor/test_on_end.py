"""The command that hears how a run has ended."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from disttrain import slurm_env
from disttrain.config import Config, dump_config, parse_config, settings, shown
from disttrain.monitor import on_end
from disttrain.monitor.on_end import announce_end
from disttrain.runs.runfolder import RunFolder
from disttrain.urls import without_secrets
from kit import REPOSITORY
from kit.run_files import CONFIG, write_run

RECIPES = re.findall(r"^    on_end: .*", (REPOSITORY / "docs/monitoring.md").read_text(), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(write_run(tmp_path / "run", status={"reason": "all epochs done"}))
    found.log(0).parent.mkdir()
    return found


def announce(command: str, folder: RunFolder, *, requeue: bool = False, **environ: str) -> list[str]:
    """Runs the command as at the end of a run; returns what was said."""
    said: list[str] = []
    environ = {"PATH": "/usr/bin:/bin", **environ}
    announce_end(command, "demo", folder, requeue=requeue, environ=environ, say=said.append)
    return said


def test_the_command_gets_the_outcome_as_variables_and_as_json(folder: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = 'cat >"$OUT.json"; env >"$OUT.env"'
    assert announce(command, folder, requeue=True, OUT=str(out)) == []
    document = json.loads(Path(f"{out}.json").read_text())
    assert document["summary"] == "demo: finished, all epochs done; accuracy 75.00 % (750 of 1,000)"
    assert (document["state"], document["exit_code"], document["requeue"]) == ("finished", 0, True)
    assert (document["train"]["step"], document["eval"]["accuracy"]) == (30, 0.75)
    names = dict(line.split("=", 1) for line in Path(f"{out}.env").read_text().splitlines())
    assert names["DISTTRAIN_SUMMARY"] == document["summary"]
    assert names["DISTTRAIN_RUN_DIR"] == str(tmp_path / "run")
    assert (names["DISTTRAIN_STATE"], names["DISTTRAIN_EXIT_CODE"]) == ("finished", "0")
    assert (names["DISTTRAIN_ACCURACY"], names["DISTTRAIN_REQUEUE"]) == ("0.75", "1")
    assert names["DISTTRAIN_HOST"] == "", "unknown"
    assert "DISTTRAIN_TRAIN" not in names


def test_a_run_that_failed_before_its_first_step(folder: RunFolder, tmp_path: Path) -> None:
    folder.metrics.unlink()
    folder.update_status(state="failed", exit_code=70, reason="rank 1 was killed\nby SIGKILL", rank=1)
    command = 'echo "$DISTTRAIN_SUMMARY: $DISTTRAIN_RANK, $DISTTRAIN_ACCURACY"'
    assert announce(command, folder) == []
    assert "demo: failed, rank 1 was killed: 1, \n" in folder.log(0).with_name("on_end.log").read_text()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("echo the token is secret; exit 3", "ended with exit code 3"),
        ("sleep 60 & sleep 60", "did not end in 0.3 s"),
        ("kill -TERM $PPID; sleep 60", "was killed by a request to stop"),
    ],
)
def test_a_failure_is_one_line_without_the_command(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, command: str, problem: str
) -> None:
    monkeypatch.setattr(on_end, "_LIMIT_S", 0.3 if "&" in command else 30.0)
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    log = folder.log(0).with_name("on_end.log")
    assert announce(command, folder) == [f"monitor.on_end {problem}; see {log}"]
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGTERM) == before
    assert log.read_text().splitlines()[-1].endswith(f"Z {problem}")


def test_a_folder_that_cannot_be_written_is_a_message(folder: RunFolder) -> None:
    log = folder.log(0).with_name("on_end.log")
    log.mkdir()
    assert announce("true", folder) == [f"monitor.on_end failed: Is a directory; see {log}"]


def test_the_command_is_in_the_config_file_only() -> None:
    config = parse_config(CONFIG + "monitor: {on_end: 'curl https://hook/SECRET'}", "demo.yaml")
    assert config.monitor.on_end == "curl https://hook/SECRET"
    assert "SECRET" in dump_config(config)
    assert "SECRET" not in dump_config(shown(config)) + str(settings(config))
    assert without_secrets("monitor.on_end=curl -d @- \n$SECRET") == "monitor.on_end=(hidden)"
    plain: Config = parse_config(CONFIG, "demo.yaml")
    assert shown(plain) == plain


@pytest.mark.parametrize(
    ("left", "stopped_by", "expected"),
    [
        ("2", signal.SIGUSR2, True),
        ("0", signal.SIGUSR2, False),
        ("2", signal.SIGINT, False),
        ("2", None, False),
    ],
)
def test_a_stop_by_slurm_is_followed_by_a_requeue(left: str, stopped_by: int, expected: bool) -> None:
    assert slurm_env.will_requeue({"DISTTRAIN_REQUEUES_LEFT": left}, stopped_by) is expected
    assert not slurm_env.will_requeue({}, stopped_by), "another script than slurm/train.sh"


@pytest.fixture
def posted() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The address of a web server, and what was posted to it: type and content."""
    found: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            found.append((self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/topic", found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_the_recipes_of_the_document_send_what_they_say(
    folder: RunFolder, posted: tuple[str, list[tuple[str, str]]], tmp_path: Path
) -> None:
    url, found = posted
    mail = tmp_path / "mail"
    mail.write_text('#!/bin/sh\necho "$*" >"$0.sent"; cat >>"$0.sent"\n')
    mail.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "URL": url, "TOKEN": "x"}
    for recipe in RECIPES:
        assert announce(yaml.safe_load(recipe)["on_end"], folder, **environ) == [], recipe
    summary = "demo: finished, all epochs done; accuracy 75.00 % (750 of 1,000)"
    (_, to_ntfy), (_, to_slack), (kind, to_webhook) = found
    assert to_ntfy == summary
    assert json.loads(to_slack) == {"text": summary}
    assert (kind, json.loads(to_webhook)["summary"]) == ("application/json", summary)
    first, *rest = (tmp_path / "mail.sent").read_text().splitlines()
    assert first == f"-s {summary} me@example.org"
    assert json.loads("\n".join(rest))["state"] == "finished"
