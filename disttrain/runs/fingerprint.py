"""What identifies an experiment, and what has changed since a checkpoint was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from disttrain.config import Config, Role, differences, role, shown
from disttrain.errors import CheckpointError, UsageError
from disttrain.runs.manifest import canonical
from disttrain.shards.index import Index


def fingerprint(config: Config, index: Index, skipped: Sequence[int] | None = ()) -> dict[str, Any]:
    """Returns the fingerprint of an experiment, which is saved with every checkpoint.

    Args:
        config: the resolved config.
        index: of its data set.
        skipped: ids of the train split that are skipped; None if not known yet.

    Returns:
        `config` and its `config_digest`; `data`: name, digest, samples of each split and skipped samples;
        `order`: the digest of what decides the order of the samples of an epoch, None if not known.
    """
    document = shown(config).model_dump(mode="json")
    data: dict[str, Any] = {
        "name": index.name,
        "digest": index.digest,
        **{name: split.samples for name, split in index.splits.items()},
    }
    order = None
    if skipped is not None:
        ids = [int(i) for i in skipped]
        data |= {"skipped": len(ids), "skipped_digest": _digest(ids) if ids else None}
        shards = [shard.samples for shard in index.splits["train"].shards]
        settings: list[Any] = [config.data.remainder, config.data.streams, config.data.shuffle_buffer]
        if config.data.sampling != "uniform":
            settings.append(config.data.sampling)
        order = _digest([config.seed, config.train.batch_size, *settings, shards, ids])
    return {"config": document, "config_digest": _digest(document), "data": data, "order": order}


def saved_fingerprint(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fingerprint in the state of a checkpoint.

    Raises:
        CheckpointError: a key of it is missing.
    """
    for key in ("step", "config", "config_digest", "data", "order"):
        if key not in state:
            raise CheckpointError(f"{checkpoint}: has no {key} in its state; use another checkpoint")
    return {key: state[key] for key in ("config", "config_digest", "data", "order")}


def changes_since(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line `key: old -> new` for each difference that prevents a resume.

    Args:
        saved: fingerprint of a checkpoint, or only its key `config`.
        now: fingerprint of this run; only its keys are compared.
    """
    try:  # keys that were added to the schema since have their defaults
        old = Config.model_validate_json(canonical(saved["config"])).model_dump(mode="json")
    except pydantic.ValidationError:  # of another version: its own keys are differences
        old = dict(saved["config"])
    new = dict(now["config"])
    for key in now["data"].keys() & saved.get("data", {}).keys():
        old["data"] = old["data"] | {key: saved["data"][key]}
        new["data"] = new["data"] | {key: now["data"][key]}
    return [line for line in differences(old, new) if not _may_change(line.partition(":")[0], old, new)]


def _may_change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Returns whether a run can resume although this key has changed."""
    if key == "train.epochs":  # finished epochs cannot be undone
        return bool(new["train"]["epochs"] > old.get("train", {}).get("epochs", 0))
    if key in {"data.skipped", "data.skipped_digest"}:  # skipping is allowed by the config
        return bool(new["data"]["on_error"] == "skip")
    return role(key) is not Role.EXPERIMENT


def refuse(what: str, changes: Sequence[str]) -> UsageError:
    """Returns the error to raise where changes need --force."""
    return UsageError(
        "\n  ".join([f"{what} another config or data set:", *changes])
        + "\nundo the change, choose another --run-dir, or continue anyway with --force"
    )


def _digest(document: Any) -> str:
    return hashlib.sha256(canonical(document)).hexdigest()
