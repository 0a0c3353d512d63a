"""Stub while the module is being written: index.py imports `is_url` and `fetch_text` from here (so this module must not import index.py; cache folders are in disttrain/userdirs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def is_url(text: str) -> bool:
    """Tells whether the text is an http(s) address."""
    return text.startswith(("http://", "https://"))


def fetch_text(url: str, limit_bytes: int) -> bytes:
    """Returns a small file."""
    raise NotImplementedError


def fetch_shard(url: str, *, bytes: int, sha256: str, say: Callable[[str], None] | None = None) -> Path:
    """Returns a local copy of a shard."""
    raise NotImplementedError
