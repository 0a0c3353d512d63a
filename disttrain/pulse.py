"""Phases (replaced at the merge)."""

from enum import IntEnum


class Phase(IntEnum):
    """What a rank is doing, in the order of a step."""

    START = 0
    DATA = 1
    COMPUTE = 2
    REPORT = 3
    EVALUATE = 4
    SAVE = 5
    END = 6
