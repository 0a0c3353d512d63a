"""A web server of a folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves a folder; `trouble` is asked before each answer.

    Attributes:
        requests: path and Range header of each.
        logins: Authorization header of each.
        trouble: called with the handler and the file; returns whether it has answered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        self.logins: list[str | None] = []
        self.trouble: Callable[[BaseHTTPRequestHandler, bytes], bool] = lambda handler, content: False
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.logins.append(self.headers.get("Authorization"))
                path = folder / self.path.partition("?")[0].lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                if outer.trouble(self, content):
                    return
                given = self.headers.get("Range") if outer.ranges else None
                begin, _, last = (given or "bytes=0-")[6:].partition("-")
                part = content[int(begin) : int(last) + 1 if last else None]
                self.send_response(206 if given else 200)
                if given:
                    end = int(begin) + len(part) - 1
                    self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a client left
        self.http.daemon_threads = False  # so that closing the server waits for them
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def demand(self, authorization: str | None, query: str = "") -> None:
        """Answers 401 unless a request has this header and this query."""

        def refuse(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
            given = handler.headers.get("Authorization"), handler.path.partition("?")[2]
            if given == (authorization, query):
                return False
            handler.send_error(401)
            return True

        self.trouble = refuse
