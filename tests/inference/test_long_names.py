"""Long names of classes in the output of `disttrain predict`."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disttrain.inference.predict_command import predict_files
from disttrain.inference.prediction_grid import Cell, draw
from disttrain.terminal import width_of
from kit.marks import nightly

NAMES = [f"{digit}, Staffordshire terrier, American pit bull terrier, 斗牛梗" for digit in range(10)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def named(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes have long names, and an image."""
    run = tmp_path_factory.mktemp("named") / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    env = json.loads((run / "env.json").read_text())
    env["data"]["classes"] = NAMES
    (run / "env.json").write_text(json.dumps(env))
    Image.new("L", (8, 8), 90).save(run.parent / "image.png")
    return run


def printed(named: Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, top: int = 3) -> list[str]:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.chdir(named.parent)
    names = ["image.png", "image.png"]
    limits = {"top": top, "threshold": 0.5, "max_pixels": 100}
    shown = {"grid": None, "as_json": False, "on_progress": lambda *_: None}
    predict_files(named, names, "latest", **shown, **limits)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(("columns", "lines"), [(120, 3), (80, 7), (45, 7), *nightly((20, 9))])
def test_names_are_cut_and_folded_to_the_terminal(
    named: Path, monkeypatch: pytest.MonkeyPatch, columns: int, lines: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = printed(named, monkeypatch, Terminal())
    assert len(found) == lines
    assert found[0].split() == ["image", "class", "probability"]
    rows = [line for line in found if "%" in line]  # a file name may have a line of its own
    ends = {width_of(line.rstrip()) for line in rows}
    assert len(ends) == 1, "the probabilities are in one column"
    assert max(ends) <= columns
    begins = [number for number, line in enumerate(found) if line.startswith("image.png")]
    assert begins == [1, 1 + lines // 2]
    assert ("..." in rows[0]) == (columns != 80)


def test_a_pipe_gets_whole_names_and_a_line_for_each_image(
    named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = printed(named, monkeypatch, io.StringIO())
    assert len(found) == 3
    assert all(sum(name in line for name in NAMES) == 3 for line in found[1:])


def test_the_grid_has_room_for_long_names_if_there_are_any() -> None:
    pixels = np.zeros((8, 8, 1), np.uint8)
    short, long = "impala", "French bulldog, Norfolk terrier, common Irish wolfhound"
    heights = {
        (label, truth): draw([Cell(pixels, label, 1.0, truth)] * 3).height
        for label in (short, long)
        for truth in (None, short, long)
    }
    plain = heights[short, None]
    assert heights[short, short] == plain
    assert heights[long, None] == heights[long, short] == heights[short, long] == plain + 16
    assert heights[long, long] == plain + 32
    sheet = np.asarray(draw([Cell(pixels, long, 1.0, long), Cell(pixels, short, 1.0, short)]))
    assert (sheet[:, 122:126] == 255).all(), "between the two"
