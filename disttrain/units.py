"""Numbers as text for people: the only module that formats quantities. An unknown value is n/a."""

from __future__ import annotations

import math
import time

MIB = 2**20
GIB = 2**30


def number(value: object, form: str, unit: str = "", scale: float = 1) -> str:
    """Returns a number in the given format with its unit: `18,200 images/s`."""
    return f"{value * scale:{form}}{unit}" if isinstance(value, (int, float)) else "n/a"


def percent(share: float | None, digits: int = 2) -> str:
    """Returns a fraction (0..1) in percent: `98.05 %`."""
    return number(share, f".{digits}f", " %", 100)


def accuracy_text(share: float | None, correct: int | None, total: int | None) -> str:
    """Returns an accuracy (0..1) with its counts: `98.05 % (352 of 359)`."""
    counted = "" if correct is None or total is None else f" ({correct:,} of {total:,})"
    return percent(share) + counted


def mib(size_bytes: float, digits: int = 0) -> str:
    """Returns a size: `1,234 MiB`."""
    return f"{size_bytes / MIB:,.{digits}f} MiB"


def gib(size_bytes: float, digits: int = 1) -> str:
    """Returns a size: `79.6 GiB`."""
    return f"{size_bytes / GIB:,.{digits}f} GiB"


def time_text(seconds: float) -> str:
    """Returns a measured time, in milliseconds if below one second: `6.41 ms`, `14.2 s`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def hms(seconds: float) -> str:
    """Returns an elapsed or remaining time: `00:12:07`, `1 d 03:46:40`."""
    days, rest = divmod(max(0, int(seconds)), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


def duration(seconds: float | None) -> str:
    """Returns a duration: `5.2 s`, `00:12:07`, `1 d 03:46:40`."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    return f"{seconds:.1f} s" if seconds < 60 else hms(seconds)


def ago(seconds: float | None) -> str:
    """Returns an age in its largest unit: `3 s`, `12 min`, `5 h`, `2 d`."""
    if seconds is None:
        return "n/a"
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def flops_text(per_s: float) -> str:
    """Returns floating-point operations per second: `4.1 GFLOP/s`, `412.3 TFLOP/s`."""
    scale, unit = (1e12, "TFLOP/s") if per_s >= 1e12 else (1e9, "GFLOP/s")
    return f"{per_s / scale:,.1f} {unit}"


def utc(time_s: float | None = None) -> str:
    """Returns a time in seconds since 1970, or the current time: `2026-11-28 23:59:30 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
