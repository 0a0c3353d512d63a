"""What tests are made of: data sets, run folders, GPUs and hosts that do not exist, programs to run."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests/golden"
PROGRAMS = Path(__file__).parent / "programs"
