"""Checkpoints of a tiny network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.runs.checkpoint import snapshot, write

PARTS = {"model": {"weight": torch.arange(12.0).view(3, 4)}, "optimizer": {"state": {0: {"step": 3}}}}


def save(
    folder: Path, step: int, parts: dict[str, Any], state: dict[str, Any], *, keep: int, best: bool
) -> Path:
    return write(folder, snapshot(step, parts, state), keep=keep, best=best)


def save_step(folder: Path, step: int, *, keep: int = 2, best: bool = False, value: float = 0.0) -> Path:
    parts = PARTS | {"ema": {"weight": torch.full((5,), value)}}
    return save(folder, step, parts, {"step": step}, keep=keep, best=best)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.device.type == "cpu"
        assert torch.equal(found, expected.detach())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    else:
        assert type(found) is type(expected)
        assert found == expected
