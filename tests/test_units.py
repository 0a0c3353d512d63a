"""Quantities as people read them."""

import math

import pytest

from disttrain.units import (
    accuracy_text,
    ago,
    duration,
    flops_text,
    gib,
    hms,
    mib,
    number,
    percent,
    time_text,
    utc,
)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (number(18_200.4, ",.0f", " images/s"), "18,200 images/s"),
        (number(0, ".1f"), "0.0"),
        (number(None, ".1f", " W"), "n/a"),
        (number(81_559, ".1f", " GiB", 1 / 1024), "79.6 GiB"),
        (percent(0.96127), "96.13 %"),
        (percent(0.5, 0), "50 %"),
        (percent(None), "n/a"),
        (accuracy_text(0.9805, 352, 359), "98.05 % (352 of 359)"),
        (accuracy_text(0.8, 8000, 10_000), "80.00 % (8,000 of 10,000)"),
        (accuracy_text(0.5, None, None), "50.00 %"),
        (mib(1234 * 2**20), "1,234 MiB"),
        (mib(2**19, 2), "0.50 MiB"),
        (gib(1.25 * 2**40), "1,280.0 GiB"),
        (gib(2**30, 0), "1 GiB"),
        (time_text(0), "0 ms"),
        (time_text(0.00641), "6.41 ms"),
        (time_text(0.99), "990 ms"),
        (time_text(0.9996), "1 s"),
        (time_text(14.23), "14.2 s"),
        (time_text(4321), "4,321 s"),
        (hms(-1), "00:00:00"),
        (hms(0.9), "00:00:00"),
        (hms(727), "00:12:07"),
        (hms(86_399), "23:59:59"),
        (hms(360_000), "4 d 04:00:00"),
        (duration(5.24), "5.2 s"),
        (duration(60), "00:01:00"),
        (duration(90_000), "1 d 01:00:00"),
        (duration(None), "n/a"),
        (duration(math.nan), "n/a"),
        (ago(None), "n/a"),
        (ago(0.4), "0 s"),
        (ago(59), "59 s"),
        (ago(61), "1 min"),
        (ago(3700), "1 h"),
        (ago(90_000), "1 d"),
        (flops_text(4.1e9), "4.1 GFLOP/s"),
        (flops_text(999.9e9), "999.9 GFLOP/s"),
        (flops_text(412.34e12), "412.3 TFLOP/s"),
        (utc(1_795_910_370.9), "2026-11-28 23:59:30 UTC"),
    ],
)
def test_a_quantity(found: str, text: str) -> None:
    assert found == text
