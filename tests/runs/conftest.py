"""A checkpoint."""

from pathlib import Path

import pytest

from kit.checkpoints import save_step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_step(tmp_path / "checkpoints", 1)
