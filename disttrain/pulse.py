"""Phases (replaced at the merge)."""

from enum import IntEnum


class Phase(IntEnum):
    """What a rank is doing, in the order of a step."""

    START = 0
    DATA = 1
    COMPUTE = 2
    OPTIMIZE = 3
    REPORT = 4
    EVALUATE = 5
    SAVE = 6
    END = 7
