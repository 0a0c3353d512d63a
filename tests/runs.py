"""What the tests read of a finished run."""

import json
from pathlib import Path


def ids_per_step(run_dir: Path) -> dict[tuple[int, int], list[int]]:
    """Returns (epoch, step) -> the ids of the global batch, rank after rank."""
    steps: dict[tuple[int, int], list[int]] = {}
    for path in sorted((run_dir / "trace").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault((record["epoch"], record["step"]), []).extend(record["ids"])
    return steps
