"""Addresses of servers with a login or a signature, which no message, file or tracker may show.

User, password and query leave an address as soon as it is read. They are kept in the environment of this
process and of those that it starts, and come back only in the request to that server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from urllib.parse import unquote, urlsplit, urlunsplit

_SECRETS = "DISTTRAIN_SERVERS"
"""JSON: address without secrets -> its user and password, and its query."""

HIDDEN = "(hidden)"

_ON_END = re.compile(r"\A(monitor\.on_end=).*", re.DOTALL)
"""An override with a command, which may hold a token."""
_LOGIN = re.compile(r"(https?://)[^\s/?#]*@")
_KEYS = re.compile(r"((?:s3|gs)://)[^\s'\"]*@")  # a secret key may have a /
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*")


def is_http(text: str) -> bool:
    """Returns whether the text is an http(s) URL."""
    return text.startswith(("http://", "https://"))


def is_url(text: str) -> bool:
    """Returns whether the text is an address of data that can be read: http(s)://, s3://, gs:// or hf://."""
    return is_http(text) or text.startswith(("s3://", "gs://", "hf://"))


def without_secrets(text: str) -> str:
    """Returns a text whose http(s) URLs have no user, password, query or fragment.

    Other addresses lose what stands before an @; a login there is refused. An override of `monitor.on_end`
    loses its command.
    """
    text = _ON_END.sub(rf"\1{HIDDEN}", text)
    return _KEYS.sub(r"\1", _QUERY.sub(r"\1", _LOGIN.sub(r"\1", text)))


def shown_command() -> str:
    """Returns the command line of this process, as `without_secrets`."""
    return shlex.join(map(without_secrets, sys.orig_argv))


def public(url: str) -> str:
    """Remembers the secrets of a server's URL, and returns the URL without them and without a last slash.

    Anything else than an http(s) URL is returned unchanged.
    """
    if not is_http(url):
        return url
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # refused when it is used; its password may have a / or a #
        return url
    login, _, host = parts.netloc.rpartition("@")
    shown = urlunsplit((parts.scheme, host, parts.path, "", "")).rstrip("/")
    known = _known()
    if login or parts.query or shown not in known:
        os.environ[_SECRETS] = json.dumps(known | {shown: [unquote(login), parts.query]})
    return shown


def secrets(url: str) -> tuple[str, str] | None:
    """Returns `user:password` and the query for requests to a URL, or None unless a user named its server.

    They may be empty. The login is for all of the server, the query for what lies below the address that it
    came with.
    """
    known = _known()
    for shown in sorted(known, key=len, reverse=True):
        if url == shown or url.startswith(f"{shown}/"):
            login, query = known[shown]
            return login, query
    logins = {urlsplit(shown)[:2]: login for shown, (login, _) in known.items()}
    of_server = logins.get(urlsplit(url)[:2])
    return None if of_server is None else (of_server, "")


def _known() -> dict[str, list[str]]:
    known: dict[str, list[str]] = json.loads(os.environ.get(_SECRETS) or "{}")
    return known
