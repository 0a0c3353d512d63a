"""The pages and text files that `disttrain serve` shows.

A page is what `disttrain report` writes for the same runs, into a folder of the server. A process of its own
makes it, without a GPU, so that the server answers meanwhile and takes no memory from the runs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.escape import xhtml_escape
from tornado.web import HTTPError

from disttrain.errors import DisttrainError
from disttrain.parallel import KilledError, in_processes
from disttrain.report.listing import Listing

_BUDGET_S = 10.0  # for evaluating a checkpoint that was not evaluated
_DRAWING = 2  # pages at once
_MOST_PAGES = 32  # kept
_TAIL_BYTES = 64 * 1024


class ProblemError(HTTPError):
    """What a page says instead of its content."""

    def __init__(self, status_code: int, text: str) -> None:
        super().__init__(status_code)
        self.text = text


@dataclass
class Page:
    """A page, and the version of the runs that it shows."""

    version: str
    file: Path
    drawn: asyncio.Future[Any]


class Pages:
    """The pages of runs and of comparisons, kept until the runs change.

    Attributes:
        listing: the runs.
    """

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._folder = tempfile.TemporaryDirectory(prefix="disttrain-serve-")
        self._threads = ThreadPoolExecutor(_DRAWING)
        self._pages: dict[tuple[str, ...], Page] = {}  # the one used last is last
        self._closed = False

    def doorway(self, url: str) -> Path:
        """Writes a page that leads to an address, for a browser: every user sees the command lines of others.

        Args:
            url: may have the token.
        """
        file = Path(self._folder.name) / "open.html"  # only this user can enter the folder
        file.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={xhtml_escape(url)}">')
        return file

    def close(self) -> None:
        """Ends the processes that draw and a search for runs, and removes the pages."""
        self._closed = self.listing.closed = True
        self._threads.shutdown(cancel_futures=True)
        self._folder.cleanup()

    async def page(self, paths: tuple[str, ...]) -> Page:
        """Returns the page of a run, or of a comparison of several.

        Raises:
            ProblemError: there is no such run, or it cannot be read.
            DisttrainError: the page cannot be made.
        """
        version = await self.version(paths)
        page = self._pages.pop(paths, None)
        if page is None or page.version != version:
            file = page.file if page else Path(tempfile.mkdtemp(dir=self._folder.name)) / "report.html"
            folders = [self.listing.folder / path for path in paths]
            loop = asyncio.get_running_loop()
            page = Page(version, file, loop.run_in_executor(self._threads, self._draw, folders, file))
        self._pages[paths] = page
        try:
            await asyncio.shield(page.drawn)
        except Exception:
            if self._pages.get(paths) is page:
                self._drop(paths)
            raise
        for old in [key for key, other in self._pages.items() if other.drawn.done()][:-_MOST_PAGES]:
            self._drop(old)
        return page

    async def version(self, paths: tuple[str, ...]) -> str:
        """Returns a text that changes whenever a page does.

        Raises:
            ProblemError: there is no such run, or it cannot be read.
        """
        versions = []
        for path in paths:
            row = await asyncio.to_thread(self.listing.find, path)
            if row is None:
                raise ProblemError(404, f"There is no run {path}")
            if not row.version:
                raise ProblemError(404, f"{path or row.name}: {row.note}")
            versions.append(row.version)
        return "-".join(versions)

    def _drop(self, paths: tuple[str, ...]) -> None:
        shutil.rmtree(self._pages.pop(paths).file.parent, ignore_errors=True)

    def _draw(self, folders: list[Path], file: Path) -> None:
        def watch() -> None:
            if self._closed:
                raise DisttrainError("the server was stopped")

        try:
            in_processes(_draw, [(folders, file)], 1, watch)
        except KilledError:
            raise DisttrainError("the process that draws the page was killed; is memory short?") from None


def _draw(work: tuple[list[Path], Path]) -> None:
    folders, file = work
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if len(folders) == 1:
        from disttrain.report.page import write_report

        write_report(folders[0], file, budget_s=_BUDGET_S)
    else:
        from disttrain.report.compare import compare, write_comparison

        write_comparison(compare(folders), file)


def open_inside(folder: Path, path: Path) -> int:
    """Opens a regular file to read, and returns its descriptor.

    Raises:
        OSError: it cannot be opened, is something else, or a link leads out of the folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    opened = Path(f"/proc/self/fd/{descriptor}").readlink()
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not opened.is_relative_to(folder):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return descriptor


def tail(folder: Path, path: Path) -> str:
    """Returns a text file inside the folder, only the last lines of a long one.

    Raises:
        OSError: it cannot be opened, or is outside.
    """
    with open(open_inside(folder, path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read(_TAIL_BYTES).decode(errors="replace")
    if size <= _TAIL_BYTES:
        return text
    return f"[the last lines of {size:,} bytes]\n{text.partition(chr(10))[2]}"
