"""An S3 server: moto, in this process."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from moto.server import ThreadedMotoServer


class S3(logging.Handler):
    """Serves buckets in memory.

    Attributes:
        url: its address.
        requests: method and path of each request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.log = logging.getLogger("werkzeug")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self)
        self.log.propagate = False
        self.server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = "http://{}:{}".format(*self.server.get_host_and_port())

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"(GET|HEAD|PUT|POST) (/\S*) HTTP", record.getMessage())
        if found:
            self.requests.append(f"{found[1]} {found[2]}")

    def put(self, path: str, content: bytes = b"") -> None:
        """Stores an object at BUCKET/KEY, or makes a bucket."""
        self._ask("PUT", path, content)

    def delete(self, path: str) -> None:
        """Removes the object at BUCKET/KEY."""
        self._ask("DELETE", path, None)

    def _ask(self, method: str, path: str, content: bytes | None) -> None:
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request",
            "Content-Type": "application/octet-stream",  # else the server takes it for a form
        }
        request = urllib.request.Request(f"{self.url}/{path}", content, headers, method=method)
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    def upload(self, folder: Path, place: str) -> None:
        """Stores the files of a folder under BUCKET/FOLDER, in a new bucket."""
        self.put(place.partition("/")[0])
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{place}/{path.relative_to(folder)}", path.read_bytes())

    def environment(self) -> Mapping[str, str]:
        """Returns the variables with which S3's clients find this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key-for-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-for-tests",
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "*",
        }

    def close(self) -> None:
        self.server.stop()
        self.log.removeHandler(self)
