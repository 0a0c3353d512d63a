"""Data sets on servers: fetches the index on demand, and shards into a cache on the local disk.

They are on an http(s) server, or at an s3://, gs:// or hf:// address (`stores.py`). A shard is downloaded
once per node. Its file is named after its hash, and appears when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import math
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from disttrain.errors import DataError, StorageError, UnsafeError, UsageError, reason
from disttrain.files import appearing, file_lock
from disttrain.shards import stores
from disttrain.shards.login import log_in, login_remedy, request_for
from disttrain.units import mib
from disttrain.urls import is_http, is_url, without_secrets
from disttrain.userdirs import cache_folder

_TIMEOUT_S = 30.0  # to connect, and for each read
_TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubles with each
_CHUNK_BYTES = 2**20
_TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))
_LIMIT = "DISTTRAIN_SHARD_CACHE_GIB"

_T = TypeVar("_T")


def check_url(url: str) -> None:
    """Checks that a URL is a valid http(s)://, s3://, gs:// or hf:// address.

    Raises:
        UnsafeError: it is a command or a file URL.
        UsageError: it has another scheme, or is malformed.
    """
    scheme = url.partition(":")[0]
    if not is_url(url):
        if scheme in {"pipe", "file"} or not scheme.isalnum():
            raise UnsafeError(f"refused to open {url!r}; use a folder or an http(s) URL")
        raise UsageError(
            f"{url}: {scheme}: is not supported; mount or download the data, or use http(s), s3, gs or hf"
        )
    if not is_http(url):
        stores.check_address(url)
        return
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port is None or parts.port else None
    except ValueError:
        host = None
    if not host or any(c.isspace() or not c.isprintable() for c in url):
        shown = re.sub(".*@", f"{scheme}://", url, flags=re.DOTALL)  # its login may have a / or a #
        raise UsageError(
            f"{without_secrets(shown)!r}: not a valid URL; expected https://host/folder, and %XX for special "
            "characters of a password"
        )


def fetch_text(url: str, limit_bytes: int) -> bytes:
    """Returns a small file from a server.

    Args:
        url: URL of the file.
        limit_bytes: larger files are refused.

    Raises:
        DataError: the download failed.
        UnsafeError: the URL is a command or a file, or the server redirects to something else than http(s).
        UsageError: it is not an address that can be read, or the package for its scheme is missing.
    """
    check_url(url)

    def fetch() -> bytes:
        content = bytearray()
        with _reading(url, 0, limit_bytes + 1, split=False) as (_, chunks):
            for chunk in chunks:
                content += chunk
                if len(content) > limit_bytes:
                    break
        return bytes(content)

    content = _persist(url, fetch)
    if len(content) > limit_bytes:
        raise DataError(
            f"{without_secrets(url)}: larger than {limit_bytes} bytes; check that it is the right file"
        )
    return content


def fetch_shard(url: str, *, size: int, sha256: str, say: Callable[[str], None] | None = None) -> Path:
    """Returns the path of a local copy of a shard, and downloads the shard if there is none.

    Any number of threads and processes may call this at once: one downloads, the others wait.

    Args:
        url: URL of the shard.
        size: size in the index, in bytes.
        sha256: hash in the index.
        say: called with a message about the download.

    Raises:
        DataError: the download failed, or does not match the index.
        StorageError: there is not enough space.
        UnsafeError, UsageError: see `fetch_text`.
    """
    check_url(url)
    target = cache_folder() / "shards" / f"{sha256}.tar"
    tell = say or (lambda text: None)
    try:
        with file_lock(target, lambda: tell(f"waiting for the download of {without_secrets(url)}")):
            if not (target.exists() and target.stat().st_size == size):
                tell(f"downloading {without_secrets(url)}, {mib(size, 1)}")
                _make_room(target, size)
                _download(url, target, size, sha256)
            target.with_suffix(".used").touch()
    except OSError as error:
        raise StorageError(
            f"{target.parent}: cannot store a shard: {reason(error)}; free some space or set "
            "DISTTRAIN_CACHE to another folder"
        ) from None
    return target


def _download(url: str, target: Path, size: int, sha256: str) -> None:
    """Downloads a shard; resumes after a broken connection, and starts again once if the hash is wrong."""
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
                raise DataError(
                    f"{without_secrets(url)}: its SHA-256 does not match the index; repair it on the server"
                )


def _fetch_rest(url: str, partial: Path, size: int) -> None:
    """Appends the missing bytes; raises `http.client.IncompleteRead` if the connection ends early."""
    there = partial.stat().st_size if partial.exists() else 0
    with (
        _reading(url, there, size + 1, split=True) as (done, chunks),
        partial.open("ab" if done else "wb") as file,
    ):
        for chunk in chunks:
            done += len(chunk)
            if done > size:
                raise DataError(f"{without_secrets(url)}: larger than the {size} bytes in the index")
            file.write(chunk)
    if done < size:
        raise http.client.IncompleteRead(b"", size - done)


@contextlib.contextmanager
def _reading(url: str, start: int, end: int, *, split: bool) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Opens the bytes [start, end) at an address. This is where its scheme decides who reads them.

    Yields:
        The first byte, which is 0 if the server sends no ranges; the bytes from there on in chunks, up to the
        end of the file or, from a web server, beyond `end`. `split` is that of `stores.read`.
    """
    if not is_http(url):
        with contextlib.closing(stores.read(url, start, end, _TIMEOUT_S, split=split)) as chunks:
            yield start, chunks
        return
    with _open(url, {"Range": f"bytes={start}-"} if start else {}) as response:
        given = response.headers.get("Content-Range", "")
        resumed = response.status == 206 and given.startswith(f"bytes {start}-")
        yield start if resumed else 0, _chunks(response)


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK_BYTES):
        yield chunk
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def _persist(url: str, fetch: Callable[[], _T]) -> _T:
    """Calls `fetch` until it succeeds, with growing pauses; permanent errors are not retried."""
    what_to_do = "check the URL and the network, or use a local copy of the data set"
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return fetch()
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"the server answered {error.code} {error.reason}"
            if error.code in (401, 403):
                what_to_do = login_remedy(url)
            if error.code not in _TEMPORARY:
                break
        except stores.StoreError as error:
            problem, what_to_do = str(error), error.remedy or what_to_do
            if not error.temporary:
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = reason(cause) if isinstance(cause, Exception) else str(cause)
    raise DataError(f"{without_secrets(url)}: {without_secrets(problem)}; {what_to_do}")


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follows only redirects to http(s) URLs."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("Location", ""))
        if not is_http(target):
            fp.close()
            raise UnsafeError(
                f"{without_secrets(req.full_url)}: refused the redirect to {without_secrets(target)!r}"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    def redirect_request(self, *arguments: Any) -> Any:
        """Returns the request for the new URL, with the login of its own server."""
        request = super().redirect_request(*arguments)
        return request and log_in(request)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, headers: dict[str, str]) -> Any:
    opener = urllib.request.build_opener(_HttpRedirects)
    return opener.open(request_for(url, headers), timeout=_TIMEOUT_S)


def _make_room(target: Path, size: int) -> None:
    """Removes the least recently used shards until a new one fits into the limit of the cache."""
    if text := os.environ.get(_LIMIT):
        room = _limit_bytes(text) - size
        for path in sorted(target.parent.glob("*.tar"), key=_used_at, reverse=True):
            room -= path.stat().st_size
            if room >= 0:
                continue
            path.unlink(missing_ok=True)  # processes that have it open can still read it
            path.with_suffix(".used").unlink(missing_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise StorageError(
            f"{target.parent}: a shard needs {mib(size)}, but only {mib(free)} are free; "
            f"free some space, set DISTTRAIN_CACHE to another folder, or limit the cache with {_LIMIT}"
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
