"""Files that are either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

from disttrain.files import appearing, write_atomically


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "page")
        assert os.read(reader, 100) == b"page"
        with appearing(pipe) as partial:
            partial.write_bytes(b"weights")
        assert os.read(reader, 100) == b"weights"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_kept() -> None:
    before = Path("/dev/null").stat()
    write_atomically(Path("/dev/null"), "page")
    assert Path("/dev/null").stat().st_rdev == before.st_rdev
