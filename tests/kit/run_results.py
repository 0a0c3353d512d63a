"""What tests read of a run folder."""

import json
from pathlib import Path
from typing import Any

MEASURED = {  # differ from run to run
    "time", "images_per_s", "step_time_s", "data_wait_pct", "phases_ms", "ranks_ms", "device_flops_per_s",
    "mfu_pct", "gpus", "processes",
}  # fmt: skip


def status(run_dir: Path) -> dict[str, Any]:
    """Returns status.json."""
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl; none if there is no file yet."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ids_per_step(run_dir: Path) -> dict[tuple[int, int], list[int]]:
    """Returns (epoch, step) -> the ids of the global batch, rank after rank."""
    steps: dict[tuple[int, int], list[int]] = {}
    for path in sorted((run_dir / "trace").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault((record["epoch"], record["step"]), []).extend(record["ids"])
    return steps


def computed_records(run_dir: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without what is measured rather than computed."""
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in metrics(run_dir)]
