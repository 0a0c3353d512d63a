"""Folders that data sets are packed from and to."""

import pytest


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, which is the default one."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DISTTRAIN_DATA", str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def said():
    return []
