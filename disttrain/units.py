"""Quantities in the unit that suits them, for people."""


def time_text(seconds: float) -> str:
    """Returns a time in seconds, or in milliseconds below one: `6.41 ms`, `14.2 s`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def flops_text(per_s: float) -> str:
    """Returns floating-point operations per second: `4.1 GFLOP/s`, `412.3 TFLOP/s`."""
    scale, unit = (1e12, "TFLOP/s") if per_s >= 1e12 else (1e9, "GFLOP/s")
    return f"{per_s / scale:,.1f} {unit}"
