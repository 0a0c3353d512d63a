"""What all processes of a run must agree on: versions, config and data set."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version

from disttrain import __version__
from disttrain.config import Config, Role, role, settings
from disttrain.errors import UsageError
from disttrain.shards.index import Index


def shared_facts(config: Config, index: Index) -> dict[str, str]:
    """Returns what all processes of a run must agree on, by name."""
    # __version__, since a source tree that is not installed has no package metadata.
    versions = {"the version of disttrain": __version__}
    versions |= {f"the version of {name}": version(name) for name in ("torch", "accelerate")}
    python = ".".join(platform.python_version_tuple()[:2])
    shared = {key: value for key, value in settings(config).items() if role(key) is not Role.MACHINE}
    return {
        "the version of python": python,
        **versions,
        **{key: json.dumps(value) for key, value in shared.items()},
        f"the index of {index.name}": index.digest[:16],
    }


def compare_peers(peers: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that the facts are the same on all peers.

    Args:
        peers: the name of each peer and its facts.

    Raises:
        UsageError: two differ; the message has both values and the names of both peers.
    """
    (first, expected), *others = peers.items()
    lines = []
    for key in dict.fromkeys(key for found in peers.values() for key in found):
        value = expected.get(key, "missing")
        for name, found in others:
            if found.get(key, "missing") != value:
                lines.append(f"{key} is {value} on {first} and {found.get(key, 'missing')} on {name}")
                break
    if lines:
        raise UsageError("mismatch: " + "; ".join(lines) + "; make them match")
