"""Data sets on an http(s) server: the index on demand, the shards through a cache on the local disk.

A shard is downloaded once per node, under the name of its hash, and appears when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import math
import os
import random
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from disttrain.errors import DataError, StorageError, UnsafeError, UsageError, reason
from disttrain.files import appearing, file_lock
from disttrain.units import mib
from disttrain.userdirs import cache_folder

_TIMEOUT_S = 30.0  # to connect, and for each read
_TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubles with each
_CHUNK_BYTES = 2**20
_TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))
_LIMIT = "DISTTRAIN_SHARD_CACHE_GIB"

_T = TypeVar("_T")


def is_url(text: str) -> bool:
    """Tells whether the text is an http(s) address."""
    return text.startswith(("http://", "https://"))


def check_url(url: str) -> None:
    """Checks that an address is one of a web server.

    Raises:
        UnsafeError: it is a command.
        UsageError: it is of another kind, or broken.
    """
    scheme = url.partition(":")[0]
    if not is_url(url):
        if scheme in {"pipe", "file"} or not scheme.isalnum():
            raise UnsafeError(f"refused to open {url!r}; data lies in a folder or at an http(s) address")
        raise UsageError(f"{url}: {scheme}: is not supported; mount or download the data, or use http(s)")
    try:
        host = urllib.parse.urlsplit(url).hostname
    except ValueError:
        host = None
    if not host or any(c.isspace() or not c.isprintable() for c in url):
        raise UsageError(f"{url!r}: not an address; expected https://host/folder")


def fetch_text(url: str, limit_bytes: int) -> bytes:
    """Returns a small file from a server.

    Args:
        url: its address.
        limit_bytes: larger files are refused.

    Raises:
        DataError: it cannot be had.
        UnsafeError: the address is a command, or the server sends elsewhere than to http(s).
        UsageError: it is no http(s) address.
    """
    check_url(url)

    def fetch() -> bytes:
        with _open(url, {}) as response:
            content: bytes = response.read(limit_bytes + 1)
        return content

    content = _persist(url, fetch)
    if len(content) > limit_bytes:
        raise DataError(f"{_shown(url)}: more than {limit_bytes} bytes; is it the right file?")
    return content


def fetch_shard(url: str, *, size: int, sha256: str, say: Callable[[str], None] | None = None) -> Path:
    """Returns a local copy of a shard, downloading it if there is none.

    Any number of threads and processes may call this at once: one downloads, the others wait.

    Args:
        url: its address.
        size: in bytes, as the index says.
        sha256: as the index says.
        say: told of the download.

    Raises:
        DataError: it cannot be had, or is not what the index says.
        StorageError: there is no room for it.
        UnsafeError, UsageError: as for `fetch_text`.
    """
    check_url(url)
    target = cache_folder() / "shards" / f"{sha256}.tar"
    tell = say or (lambda text: None)
    try:
        with file_lock(target, lambda: tell(f"waiting for the download of {_shown(url)}")):
            if not (target.exists() and target.stat().st_size == size):
                tell(f"downloading {_shown(url)}, {mib(size, 1)}")
                _make_room(target, size)
                _download(url, target, size, sha256)
            target.with_suffix(".used").touch()
    except OSError as error:
        raise StorageError(
            f"{target.parent}: a shard cannot be kept: {reason(error)}; free some space or set "
            "DISTTRAIN_CACHE to another folder"
        ) from None
    return target


def _download(url: str, target: Path, size: int, sha256: str) -> None:
    """Downloads a shard, going on where a connection broke, and once again if its hash is wrong."""
    with appearing(target) as partial:
        for last in (False, True):
            _persist(url, lambda: _fetch_rest(url, partial, size))
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            if found == sha256:
                return
            partial.unlink()
            if last:
                raise DataError(f"{_shown(url)}: its SHA-256 is not that of the index; repair it there")


def _fetch_rest(url: str, partial: Path, size: int) -> None:
    """Appends what is missing; raises `http.client.IncompleteRead` if the connection ends early."""
    done = partial.stat().st_size if partial.exists() else 0
    with _open(url, {"Range": f"bytes={done}-"} if done else {}) as response:
        given = response.headers.get("Content-Range", "")
        resumed = response.status == 206 and given.startswith(f"bytes {done}-")
        if not resumed:
            done = 0
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > size:
                    raise DataError(f"{_shown(url)}: longer than the {size} bytes that the index says")
                file.write(chunk)
    if done < size:
        raise http.client.IncompleteRead(b"", size - done)


def _persist(url: str, fetch: Callable[[], _T]) -> _T:
    """Calls `fetch` until it succeeds, with growing pauses between tries that may help."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return fetch()
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"the server answered {error.code} {error.reason}"
            if error.code not in _TEMPORARY:
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = reason(cause) if isinstance(cause, Exception) else str(cause)
    raise DataError(
        f"{_shown(url)}: {problem}; check the address and the network, or use a local copy of the data set"
    )


class _SameKind(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web servers only."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("Location", ""))
        if not is_url(target):
            fp.close()
            raise UnsafeError(f"{_shown(req.full_url)}: refused to be sent to {target!r}")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, headers: dict[str, str]) -> Any:
    opener = urllib.request.build_opener(_SameKind)
    request = urllib.request.Request(url, headers={"User-Agent": "disttrain", **headers})
    return opener.open(request, timeout=_TIMEOUT_S)


def _shown(url: str) -> str:
    """Returns an address without user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _make_room(target: Path, size: int) -> None:
    """Removes the shards that were not used for longest, as far as the limit of the cache asks for it."""
    if text := os.environ.get(_LIMIT):
        room = _limit_bytes(text) - size
        for path in sorted(target.parent.glob("*.tar"), key=_used_at, reverse=True):
            room -= path.stat().st_size
            if room >= 0:
                continue
            path.unlink(missing_ok=True)  # who has it open can still read it
            path.with_suffix(".used").unlink(missing_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise StorageError(
            f"{target.parent}: {mib(size)} needed for a shard, {mib(free)} free; "
            f"free some space, set DISTTRAIN_CACHE to another folder, or {_LIMIT} to a limit"
        )


def _used_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.with_suffix(".used").stat().st_mtime
    return 0.0


def _limit_bytes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (limit := float(text)) < math.inf:
            return limit * 2**30
    raise UsageError(f"{_LIMIT}={text}: expected a positive number of GiB")
