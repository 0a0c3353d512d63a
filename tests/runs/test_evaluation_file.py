"""Tests of the results of an evaluation beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from disttrain.runs.evaluation import FILE, Evaluation, evaluation_of
from disttrain.runs.manifest import entry, write_manifest
from disttrain.runs.records import EvalRecord

RECORD = EvalRecord(loss=1.0, accuracy=0.5, correct=1, total=2, step=7, epoch=1)


def stored(folder: Path, content: object) -> Evaluation:
    """Writes an evaluation as the only part of a checkpoint, and reads it."""
    data = msgspec.json.encode(content)
    folder.mkdir()
    (folder / FILE).write_bytes(data)
    write_manifest(folder, {FILE: entry(FILE, data)})
    found = evaluation_of(folder)
    assert found is not None
    return found


def test_only_counts_that_are_not_zero_are_stored(tmp_path: Path) -> None:
    names = tuple(f"{place} of a thousand classes with a long name" for place in range(1000))
    cells = [(place, (7 * place + n) % 1000, n + 1) for place in range(1000) for n in range(12)]
    found = stored(tmp_path / "new", Evaluation(RECORD, 2, names, cells, []))
    assert (tmp_path / "new" / FILE).stat().st_size < 250_000
    assert (found.classes, found.cells, found.record) == (names, cells, RECORD)
    assert found.confusion.shape == (1000, 1000)
    assert found.confusion[3, 21:34].tolist() == [*range(1, 13), 0]
    assert found.confusion.sum() == 1000 * 78


def test_a_file_with_the_whole_matrix_is_read(tmp_path: Path) -> None:
    matrix = [[3, 0, 1], [0, 0, 0], [0, 2, 0]]
    old = msgspec.to_builtins(Evaluation(RECORD, 2, ("a", "b", "c"), [], []))
    del old["cells"]
    found = stored(tmp_path / "old", old | {"confusion": matrix})
    assert found.confusion.tolist() == matrix
    assert found.confusion.dtype == np.int64
