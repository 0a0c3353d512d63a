"""Where two runs with train.reproducible part."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.runs.weight_digests import compared, weight_digests
from kit.run_files import train_record, write_lines

ONE = {20: {"a": "00", "b": "11"}, 40: {"a": "22", "b": "33"}, 60: {"a": "44", "b": "55"}}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (ONE, "the same bits at 3 of 3 log points, up to step 60"),
        ({40: ONE[40]}, "the same bits at 1 of 1 log points, up to step 40"),
        (ONE | {40: {"a": "22", "b": "x"}}, "the same bits up to step 20; at step 40 b of 2 tensors differ"),
        (
            ONE | {20: {"a": "x", "c": "11"}},
            "other bits from the first log point; at step 20 a and 2 more of 3",
        ),
        ({30: {"a": "00"}}, None),
        ({}, None),
    ],
)
def test_two_runs_part_at_the_first_tensor_that_differs(
    other: dict[int, dict[str, str]], text: str | None
) -> None:
    found = compared(ONE, other)
    if text is None:
        assert found is None
    else:
        assert found
        assert found.text.startswith(text)
        assert found.same == ("differ" not in found.text)


def test_digests_are_those_of_the_log_points_that_have_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [train_record(20), train_record(40, weights=ONE[40])])
    assert weight_digests(path) == {40: ONE[40]}
