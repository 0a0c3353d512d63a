"""`disttrain serve`: the runs below a folder in a browser. It only reads."""

from __future__ import annotations

import asyncio
import errno
import getpass
import hmac
import ipaddress
import os
import re
import secrets
import socket
import webbrowser
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from tornado.escape import xhtml_escape
from tornado.httpserver import HTTPServer
from tornado.log import app_log
from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler

import disttrain
from disttrain.errors import BusyError, DisttrainError, UsageError, reason
from disttrain.lifetime import stop_signals
from disttrain.report.listing import Listing, to_json
from disttrain.report.pages import Page, Pages, ProblemError, tail
from disttrain.report.rendering import templates

Say = Callable[[str], object]

PORT = 8765
_PORTS = 20  # tried from the default one on
_ASSETS = Path(disttrain.__file__).parent / "assets/serve"
_MOST_RUNS = 50  # of a comparison
_LOG = r"(?:rank|launch)_\d{5,}\.log"


class _Checked(RequestHandler):
    """Answers only requests to a name of this machine, with the token if there is one."""

    def prepare(self) -> None:
        """Refuses what others sent."""
        token = self.settings["token"]
        if not is_expected(self.request.host, self.settings["names"]):
            raise ProblemError(403, "Open the address that disttrain serve printed")
        if not token:
            return
        cookie = f"disttrain-{self.settings['port']}"  # browsers send a cookie to all ports of a machine
        if _same(self.get_query_argument("token", ""), token):
            self.set_cookie(cookie, token, httponly=True, samesite="Lax")
            query = urlencode({"run": self.get_query_arguments("run")}, doseq=True)
            self.redirect("/" + self.request.path.lstrip("/") + f"?{query}" * bool(query))
        elif not _same(self.get_cookie(cookie) or "", token):
            raise ProblemError(403, "Open the address that disttrain serve printed: it has the token")

    def set_default_headers(self) -> None:
        """Lets a page use nothing but this server."""
        own = "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"
        self.set_header("Content-Security-Policy", own)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-cache")

    def write_error(self, status_code: int, **what: Any) -> None:
        """Shows an error as a page."""
        error = what.get("exc_info", (None, None))[1]
        text = {404: "There is no such page", 500: "This is a bug: see the terminal of disttrain serve"}
        said = getattr(error, "text", None) or (str(error) if isinstance(error, DisttrainError) else None)
        self.show("message.html", title=said or text.get(status_code, self._reason), links=[])

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        """Logs bugs, without the address: it may have the token."""
        if not isinstance(error, (HTTPError, DisttrainError)):
            app_log.error("disttrain serve:", exc_info=error)

    def show(self, template: str, **content: Any) -> None:
        """Sends a page."""
        self.finish(templates().get_template(template).render(content))

    @property
    def pages(self) -> Pages:
        """The pages of the server."""
        pages: Pages = self.settings["pages"]
        return pages


class _Missing(_Checked):
    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404)


class _Assets(_Checked, StaticFileHandler):
    pass


class _List(_Checked):
    def get(self) -> None:
        self.show("runs.html", folder=str(self.pages.listing.folder), most=_MOST_RUNS)


class _Rows(_Checked):
    async def get(self) -> None:
        self.write(to_json(await asyncio.to_thread(self.pages.listing.rows)))


class _Version(_Checked):
    async def get(self) -> None:
        self.write({"version": await self.pages.version(tuple(self.get_query_arguments("run", strip=False)))})


class _Drawn(_Checked):
    async def show_drawn(self, page: Page, paths: tuple[str, ...]) -> None:
        """Sends a page, with the script that watches for a newer one."""
        content = await asyncio.to_thread(page.file.read_text)
        check = xhtml_escape("/version?" + urlencode({"run": paths}, doseq=True))
        script = f'<script src="/assets/live.js" data-check="{check}" data-version="{page.version}"></script>'
        body, end, rest = content.rpartition("</body>")
        self.finish(body + script + end + rest)


class _Report(_Drawn):
    """The page of a run, or the file of its classes."""

    async def get(self, path: str | None, name: str) -> None:
        paths = (path or "",)
        page = await self.pages.page(paths)
        if name == "report.html":
            await self.show_drawn(page, paths)
            return
        try:
            content = await asyncio.to_thread(page.file.with_name(name).read_bytes)
        except FileNotFoundError:
            raise ProblemError(404, "The page of this run has no classes") from None
        self.set_header("Content-Type", "text/csv; charset=utf-8")
        self.finish(content)


class _Comparison(_Drawn):
    async def get(self) -> None:
        paths = tuple(dict.fromkeys(self.get_query_arguments("run", strip=False)))
        if not 2 <= len(paths) <= _MOST_RUNS:
            raise ProblemError(400, f"Tick 2 to {_MOST_RUNS} runs to compare")
        await self.show_drawn(await self.pages.page(paths), paths)


class _Text(_Checked):
    """The config or a log of a run, as text; the list of its logs."""

    async def get(self, path: str | None, name: str) -> None:
        await self.pages.version((path or "",))  # it is a run
        root = self.pages.listing.folder
        folder = root / (path or "")
        if name == "logs/":
            logs = await asyncio.to_thread(_logs, folder / "logs")
            self.show("message.html", title="Logs of " + (path or folder.name), links=logs)
            return
        try:
            text = await asyncio.to_thread(tail, root, folder / name)
        except OSError as error:
            raise ProblemError(404, f"{name}: {reason(error)}") from None
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(text)


def _logs(folder: Path) -> list[str]:
    files = [] if folder.is_symlink() else folder.glob("*.log")
    return sorted(file.name for file in files if re.fullmatch(_LOG, file.name))


def application(pages: Pages, **settings: Any) -> Application:
    """Returns the web application.

    Args:
        pages: of the runs.
        settings: `port`; the `names` that the machine may be called; the `token`, or "" for none.
    """
    run = r"/run/(?:(.+)/)?"
    return Application(
        [
            (r"/", _List),
            (r"/runs\.json", _Rows),
            (r"/version", _Version),
            (r"/compare", _Comparison),
            (r"/assets/(\w+\.js)", _Assets, {"path": str(_ASSETS)}),
            (run + r"(report\.html|report_classes\.csv)", _Report),
            (run + rf"(config\.yaml|logs/(?:{_LOG})?)", _Text),
        ],
        default_handler_class=_Missing,
        compress_response=True,
        log_function=lambda handler: None,  # addresses may have the token
        pages=pages,
        **settings,
    )


def is_expected(host: str, names: Collection[str]) -> bool:
    """Returns whether a Host header names this machine.

    A web page can have its own name lead to an address of this machine, and then read what the server
    answers (DNS rebinding). It cannot do so with an address in numbers.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def serve(folder: Path, *, host: str, port: int | None, token: bool, browser: bool, say: Say) -> None:
    """Serves the runs below a folder until Ctrl-C or SIGTERM.

    Args:
        folder: of the runs.
        host: name or address to listen on; beyond this machine, a token is required.
        port: 0 takes a free one; None takes 8765, or the next one that is free.
        token: require a token on this machine too.
        browser: open the page in a browser.
        say: called with each line to print.

    Raises:
        UsageError: there is no such folder or host.
        BusyError: the port is taken.
    """
    listing = Listing(folder)
    listener, note = _listen(host, port)
    asyncio.run(_serve(Pages(listing), listener, host, token, browser, lambda url: say(url + note)))


async def _serve(
    pages: Pages, listener: socket.socket, host: str, token: bool, browser: bool, say: Say
) -> None:
    number, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(number)
    secret = secrets.token_urlsafe(24) if token or not address.is_loopback else ""
    name = socket.gethostname() if address.is_unspecified else host
    url = f"http://{_bracketed(name)}:{port}/" + f"?token={secret}" * bool(secret)
    names = {"localhost", host.lower(), name.lower(), *([socket.getfqdn().lower()] if secret else [])}
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for signal in stop_signals():
        loop.add_signal_handler(signal, stopped.set)
    server = HTTPServer(application(pages, port=port, names=names, token=secret))
    server.add_socket(listener)
    say(url)
    loop.run_in_executor(None, pages.listing.rows)  # ready when the browser asks
    if browser:
        loop.run_in_executor(None, webbrowser.open, pages.doorway(url).as_uri() if secret else url)
    await stopped.wait()
    server.stop()
    await asyncio.to_thread(pages.close)
    await server.close_all_connections()


def _listen(host: str, port: int | None) -> tuple[socket.socket, str]:
    """Returns a listening socket, and what to say with its address.

    Raises:
        UsageError: there is no such host.
        BusyError: the port is taken, or cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, None)[0][0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {reason(error)}") from None
    for number in range(PORT, PORT + _PORTS) if port is None else [port]:
        try:
            listener = socket.create_server((host, number), family=family)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(f"--host {host}: is not an address of this machine") from None
            why = os.strerror(error.errno or 0)
            if error.errno == errno.EADDRINUSE:
                continue
            break
        listener.setblocking(False)
        number = listener.getsockname()[1]
        note = "" if number == PORT or port is not None else f" (port {PORT} is taken)"
        if ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            note += _tunnel(host, number)
        return listener, note
    raise BusyError(f"port {number} of {host}: {why}; give another --port, or 0 for a free one")


def _tunnel(host: str, port: int) -> str:
    """Returns how to reach the server from the computer at the other end of an SSH connection."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) != 4:
        return ""
    there = f"{getpass.getuser()}@{connection[2]}"
    return f"\non your computer: ssh -N -L {port}:{_bracketed(host)}:{port} {there}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
