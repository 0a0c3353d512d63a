"""Logs in to the servers of data sets: by the address, a token or ~/.netrc, in this order."""

from __future__ import annotations

import base64
import netrc
import os
import urllib.parse
import urllib.request
from pathlib import Path

from disttrain.errors import reason
from disttrain.urls import secrets

_TOKEN = "DISTTRAIN_HTTP_TOKEN"


def request_for(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """Returns the request for a URL, with the signature and the login that its server wants."""
    known = secrets(url)
    if known and known[1]:
        url += ("&" if urllib.parse.urlsplit(url).query else "?") + known[1]
    return log_in(urllib.request.Request(url, headers={"User-Agent": "disttrain", **headers}))


def log_in(request: urllib.request.Request) -> urllib.request.Request:
    """Adds the login for its server to a request, and returns it; a redirect does not hand it on."""
    parts = urllib.parse.urlsplit(request.full_url)
    known = secrets(urllib.parse.urlunsplit((*parts[:3], "", "")))
    login, token = known[0] if known else "", os.environ.get(_TOKEN)
    if not login and token and known:  # an index may name shards on servers that the user does not know
        request.add_unredirected_header("Authorization", f"Bearer {token}")
        return request
    login = login or _from_netrc(parts.hostname or "")[0]
    if login:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def login_remedy(url: str) -> str:
    """Returns what to do if a server refuses a request."""
    host = urllib.parse.urlsplit(url).hostname or ""
    problem = _from_netrc(host)[1]
    return (
        f"check the login or the signature; a login may be in the URL, in a line `machine {host} login USER "
        f"password PASSWORD` of ~/.netrc, or a token in {_TOKEN}{problem}"
    )


def _from_netrc(host: str) -> tuple[str, str]:
    """Returns `user:password` for a server from $NETRC or ~/.netrc or an empty string, and what is wrong."""
    path = os.environ.get("NETRC")
    try:
        found = netrc.netrc(path and str(Path(path).expanduser())).authenticators(host)
    except FileNotFoundError:
        return "", ""
    except (OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError) as error:
        problem = error.msg if isinstance(error, netrc.NetrcParseError) else reason(error)
        return "", f" ({path or '~/.netrc'} cannot be used: {problem})"
    return (f"{found[0]}:{found[2]}", "") if found and found[2] else ("", "")
