"""Random numbers as a pure function of a key and a counter.

The order of an epoch and every random choice of augmentation come from here, so that they depend on the
place of a sample in the run and on nothing else: not on the number of ranks, on what was drawn before, or
on the version of a library's generator. The mixing function is SplitMix64 (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

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
    return ((bits(key, count) >> np.uint64(33)) * np.uint64(below) >> np.uint64(31)).astype(np.int64)


def permutation(key: int, count: int) -> npt.NDArray[np.int64]:
    """Returns a permutation of 0..count-1: int64 [count]."""
    return np.argsort(bits(key, count), kind="stable")


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
