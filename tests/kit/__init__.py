"""Test helpers: data sets, run folders, fake GPUs and hosts, programs to run."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests/golden"
PROGRAMS = Path(__file__).parent / "programs"
