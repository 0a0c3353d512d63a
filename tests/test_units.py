"""Quantities for people."""

import pytest

from disttrain.units import flops_text, time_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00641, "6.41 ms"),
        (0.99, "990 ms"),
        (0.9996, "1 s"),
        (14.23, "14.2 s"),
        (4321, "4,321 s"),
    ],
)
def test_a_time(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_operations_per_second() -> None:
    assert (flops_text(4.1e9), flops_text(999.9e9), flops_text(412.34e12)) == (
        "4.1 GFLOP/s",
        "999.9 GFLOP/s",
        "412.3 TFLOP/s",
    )
