"""What every rank of `disttrain eval` runs: each evaluates its part of a split, and they sum the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from disttrain.inference.eval import open_data, usable_samples
from disttrain.inference.run import open_run, saying_where_code_lies
from disttrain.launch.jobs import serve
from disttrain.runs.evaluation import ClassRow, class_rows
from disttrain.training.group import best_device, join


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Evaluates as one rank of the process group that the environment describes. Every rank calls this."""
    import torch

    from disttrain.data.stages import open_stream
    from disttrain.inference.classifier import load_model
    from disttrain.parallel import cores_of_a_rank
    from disttrain.training.collectives import Group
    from disttrain.training.evaluation import EvalTask, batch_size, measure
    from disttrain.training.state import Validation

    folder, config, facts, checkpoint = open_run(Path(request["run"]), request["checkpoint"])
    group = Group.of(join(config, best_device()))
    classifier = load_model(request["run"], checkpoint, device=group.device)
    index = open_data(config, facts, request["data"], request["root"])
    ids = usable_samples(config, index)
    size = batch_size(config.train, group.world_size)
    workers = min(8, cores_of_a_rank()) if config.data.workers is None else config.data.workers
    # Streamed: a decoded copy does not pay off for a single pass.
    pipeline = config.data.pipeline
    with saying_where_code_lies(folder):
        data = open_stream(index, "val", group.device, batch_size=size, workers=workers, pipeline=pipeline)
    skipped = index.splits["val"].samples - len(ids)
    split = Validation(data, ids, facts.classes, skipped, facts.multi_label)
    outputs = torch.tensor([facts.classes.index(name) for name in index.classes], device=group.device)
    task = EvalTask(
        classifier.network, classifier.normalize, split, group, size, classifier.as_evaluated, outputs
    )
    found = measure(task, request["tta"])
    assert found is not None
    top5 = found.top5_correct if found.record.top5_accuracy is not None else None
    multi_label = found.labels is not None
    result: dict[str, Any] = msgspec.to_builtins(found.record)
    del result["epoch"]
    return result | {
        "top5_correct": top5,
        "top5_accuracy": found.record.top5_accuracy,
        "per_class": [_row(row, multi_label) for row in class_rows(found)],
        "classes": facts.classes,
        "confusion": None if multi_label else found.confusion.tolist(),
        "checkpoint": str(checkpoint),
        "step": classifier.step,
        "data": index.name,
        "split": "val",
        "processes": group.world_size,
        "device": group.device.type,
        "precision": classifier.precision,
    }


def _row(row: ClassRow, multi_label: bool) -> dict[str, Any]:
    found = {
        "class": row.name,
        "correct": row.correct,
        "total": row.samples,
        "accuracy": row.accuracy,
        "precision": row.precision,
        "f1": row.f1,
    }
    return found | {"average_precision": row.average_precision} if multi_label else found


if __name__ == "__main__":
    serve(answer)
