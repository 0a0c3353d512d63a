"""A config file."""

import pytest

from kit.configs import BASE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE)
    return path
