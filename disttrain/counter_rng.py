"""Random numbers as a pure function of a key and a counter.

The order of an epoch and all random choices of augmentation are drawn here. They depend only on the position
of a sample in the run, not on the number of ranks, on earlier draws or on the version of a library.
The mixing function is SplitMix64 (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive(*parts: int) -> int:
    """Returns a 64-bit key that depends on every part and on their order."""
    key = 0
    for part in parts:
        key = _mix((key + _GOLDEN + part) & _MASK)
    return key


def bits(key: int, count: int) -> npt.NDArray[np.uint64]:
    """Returns the 64 random bits of the counters 0..count-1: uint64 [count]."""
    return bits_at(key, np.arange(count, dtype=np.uint64))


def bits_at(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns the 64 random bits of any counters: uint64, in the shape of the counters."""
    values = (counters + np.uint64(1)) * np.uint64(_GOLDEN)
    values += np.uint64(key)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def integers(key: int, count: int, below: int) -> npt.NDArray[np.int64]:
    """Returns integers in 0..below-1 (below < 2**31) for the counters 0..count-1: int64 [count]."""
    return integers_at(key, np.arange(count), below)


def integers_at(key: int, counters: npt.NDArray[np.int64], below: int) -> npt.NDArray[np.int64]:
    """Returns integers in 0..below-1 (below < 2**31) for any counters: int64, in their shape."""
    drawn = bits_at(key, counters.astype(np.uint64))
    return ((drawn >> np.uint64(33)) * np.uint64(below) >> np.uint64(31)).astype(np.int64)


def uniform(key: int, count: int) -> npt.NDArray[np.float64]:
    """Returns numbers in the open interval (0, 1) for the counters 0..count-1: float64 [count]."""
    return uniform_at(key, np.arange(count))


def uniform_at(key: int, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns numbers in (0, 1) for any counters: float64, in their shape."""
    return ((bits_at(key, counters.astype(np.uint64)) >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52


def symmetric_beta(key: int, alpha: float) -> float:
    """Returns a random number from the distribution Beta(alpha, alpha).

    Uses the method of Ulrich 1984 if alpha is above 1/2, else the rejection sampling of Joehnk 1964.
    """
    if alpha > 0.5:
        first, second = uniform(key, 2)
        spread = math.sqrt(1 - first ** (2 / (2 * alpha - 1)))
        return 0.5 + 0.5 * spread * math.cos(2 * math.pi * second)
    for attempt in itertools.count():
        # In logarithms, because the powers underflow to 0 for a small alpha.
        first, second = np.log(uniform(derive(key, attempt), 2)) / alpha
        if np.logaddexp(first, second) <= 0:
            return 1 / (1 + math.exp(min(second - first, 700)))
    raise AssertionError


def permutation(key: int, count: int) -> npt.NDArray[np.int64]:
    """Returns a permutation of 0..count-1: int64 [count]."""
    return np.argsort(bits(key, count), kind="stable")


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
