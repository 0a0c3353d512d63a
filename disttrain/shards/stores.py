"""Reads data sets at s3://, gs:// and hf:// addresses, and opens places to write to, through fsspec.

Each library finds the credentials itself, in the environment and in its own files. Nothing of them is kept or
shown here. What a data set on a store is checked for, and the cache, are those of `remote.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.errors import UsageError, reason
from disttrain.parallel import ordered_map
from disttrain.urls import without_secrets

_CHUNK_BYTES = 2**23  # of one request; up to four, and one that is written, are in memory
_DENIED = (401, 403)
_NO_LOGIN = re.compile("Credential|ProfileNotFound|RefreshError|TokenRetrieval|SSO|Unauthorized")
"""In the names of the exceptions by which a library says that it found no usable credentials."""


class StoreError(Exception):
    """A request failed; `temporary` if it may succeed later, and `remedy` if the usual one does not fit."""

    def __init__(self, problem: str, *, temporary: bool, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.temporary = temporary
        self.remedy = remedy


@dataclass(frozen=True)
class _Store:
    """A scheme; it is also the name of the extra that installs its package."""

    package: str
    place: str
    """Regular expression of what may stand after the scheme."""
    example: str
    credentials: str
    """Where its library looks for them, for messages."""
    download: str
    upload: str
    open: Callable[[float], Any]
    """Returns its file system, for a time limit in seconds."""
    reading: dict[str, Any]
    """Further arguments for reading a range."""
    threads: int
    """Requests at a time, because a single one gets only a part of what an object store can send. 0: one
    after another, in the calling thread."""
    persists: bool
    """Whether its library repeats what failed."""


def _open_s3(timeout_s: float) -> Any:
    from fsspec.config import conf  # the user's settings, in FSSPEC_S3 and ~/.config/fsspec
    from s3fs import S3FileSystem

    limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
    system = S3FileSystem(config_kwargs=limits | conf.get("s3", {}).get("config_kwargs", {}))
    system.retries = 1  # `remote.py` repeats requests
    return system


def _open_gs(timeout_s: float) -> Any:
    import aiohttp

    # Not gcsfs.GCSFileSystem: it asks over gRPC what kind of bucket it is, a minute long if nobody answers.
    from gcsfs.core import GCSFileSystem

    log = logging.getLogger("gcsfs")
    if not log.handlers:
        log.addHandler(logging.NullHandler())  # else it prints tracebacks of what is told in a line
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return GCSFileSystem(requests_timeout=limits)


def _open_hf(timeout_s: float) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()  # its limit is HF_HUB_DOWNLOAD_TIMEOUT


_BUCKET = r"[A-Za-z0-9][^@?#]*"

_STORES = {
    "s3": _Store(
        package="s3fs",
        place=_BUCKET,
        example="s3://BUCKET/FOLDER",
        credentials=(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws; for a public bucket "
            "set FSSPEC_S3_ANON=true"
        ),
        download="aws s3 sync {url} FOLDER",
        upload="aws s3 sync FOLDER/NAME s3://BUCKET/FOLDER/NAME",
        open=_open_s3,
        reading={},
        threads=4,
        persists=False,
    ),
    "gs": _Store(
        package="gcsfs",
        place=_BUCKET,
        example="gs://BUCKET/FOLDER",
        credentials=(
            "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
            "set FSSPEC_GS_TOKEN=anon"
        ),
        download="gcloud storage rsync -r {url} FOLDER",
        upload="gcloud storage rsync -r FOLDER/NAME gs://BUCKET/FOLDER/NAME",
        open=_open_gs,
        reading={},
        threads=4,
        persists=True,
    ),
    "hf": _Store(
        package="huggingface_hub",
        place=r"datasets/[^/@?#]+/[^/@?#]+(@[^@?#]+)?(/[^@?#]*)?",
        example="hf://datasets/USER/NAME",
        credentials="`hf auth login` or HF_TOKEN",
        download="hf download --repo-type dataset USER/NAME --local-dir FOLDER",
        upload="hf upload --repo-type dataset USER/NAME FOLDER/NAME NAME",
        open=_open_hf,
        reading={"cache_type": "none"},  # otherwise it reads ahead, and drops that
        threads=0,  # each thread would ask again what is in the folder
        persists=False,
    ),
}


def check_address(url: str) -> None:
    """Raises UsageError if an s3://, gs:// or hf:// address is malformed or has a login."""
    scheme, _, place = url.partition("://")
    store = _STORES[scheme]
    odd = any(c.isspace() or not c.isprintable() for c in place) or "::" in place
    if odd or not re.fullmatch(store.place, place):
        raise UsageError(
            f"{without_secrets(url)!r}: not a valid address; expected {store.example} without a login, which "
            f"comes from {store.credentials}"
        )


def open_place(address: str, timeout_s: float) -> tuple[Any, str]:
    """Returns the fsspec file system of an s3:// or gs:// address or a folder, and the path in it.

    Raises:
        UsageError: it is another address, is malformed, or its package is not installed.
    """
    scheme, separator, path = address.partition("://")
    if not separator:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=True), str(Path(address).absolute())
    if scheme not in {"s3", "gs"}:
        raise UsageError(f"{without_secrets(address)}: cannot be written; use s3://, gs:// or a folder")
    check_address(address)
    return _open(address, timeout_s), path.rstrip("/")


def failure(address: str, error: Exception) -> StoreError:
    """Returns why an operation at an s3:// or gs:// address or in a folder failed."""
    store = _STORES.get(address.partition("://")[0]) if "://" in address else None
    return StoreError(reason(error), temporary=True) if store is None else _failure(store, error)


def _open(url: str, timeout_s: float) -> Any:
    scheme = url.partition("://")[0]
    store = _STORES[scheme]
    try:
        return store.open(timeout_s)
    except ImportError:
        raise UsageError(
            f'{url}: needs the package {store.package}; run pip install "disttrain[{scheme}]"'
        ) from None
    except Exception as error:  # each library has errors of its own
        raise _failure(store, error) from None


def how_to_copy(url: str) -> tuple[str, str, str]:
    """Returns the commands that copy a folder from and to the store of an address, and a root of it."""
    store = _STORES[url.partition("://")[0]]
    return store.download.format(url=url), store.upload, store.example


def read(url: str, start: int, end: int, timeout_s: float, *, split: bool) -> Generator[bytes, None, None]:
    """Yields the bytes [start, end) of an object in order, or up to its end if it is shorter.

    Args:
        url: a checked address.
        start: first byte.
        end: one past the last byte.
        timeout_s: to connect, and for each read.
        split: whether to use several requests. They fail if the object is much shorter.

    Raises:
        StoreError: a request failed.
        UsageError: the package for this scheme is not installed.
    """
    store = _STORES[url.partition("://")[0]]
    # There is no request for the last byte alone, which may be one too many.
    begins = range(start, max(end - 1, start + 1), _CHUNK_BYTES if split else end)
    ranges = list(itertools.pairwise((*begins, end)))
    threads = store.threads if len(ranges) > 1 else 0
    chunks = ordered_map(lambda part: _read_range(url, *part, timeout_s), ranges, threads, ahead=threads - 1)
    with contextlib.closing(chunks):
        for (first, stop), content in zip(ranges, chunks, strict=True):
            yield content
            if len(content) < stop - first:
                return


def _read_range(url: str, start: int, stop: int, timeout_s: float) -> bytes:
    scheme, _, path = url.partition("://")
    store, system = _STORES[scheme], _open(url, timeout_s)
    try:
        content: bytes = system.cat_file(path, start=start, end=stop, **store.reading)
    except Exception as error:  # each library has errors of its own
        raise _failure(store, error) from None
    return content


def _failure(store: _Store, error: Exception) -> StoreError:
    problem = reason(error).rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    if (
        isinstance(error, PermissionError)
        or status in _DENIED
        or problem.startswith("Forbidden")
        or _NO_LOGIN.search(type(error).__name__)
    ):
        remedy = f"check the address and the credentials: {store.credentials}"
        return StoreError(f"access denied: {problem}", temporary=False, remedy=remedy)
    if isinstance(error, FileNotFoundError):
        remedy = f"check the address; if it is not public, also the credentials: {store.credentials}"
        return StoreError(f"not found: {problem}", temporary=False, remedy=remedy)
    return StoreError(problem, temporary=not (store.persists or isinstance(error, ValueError)))
