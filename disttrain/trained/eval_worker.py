"""What every rank of `disttrain eval` runs: its share of a split, counted, and added up over the ranks."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.launch.jobs import serve
from disttrain.trained.eval import open_data, usable_samples
from disttrain.trained.run import open_run
from disttrain.training.group import join

if TYPE_CHECKING:
    from torch import Tensor

    from disttrain.data.batches import Batch


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Evaluates as one rank of the group that the environment describes. Every rank calls this."""
    import torch
    import torch.distributed as dist

    from disttrain.data.stages import open_stream
    from disttrain.parallel import usable_cores
    from disttrain.shards.images import expect_images
    from disttrain.trained.classifier import load_model
    from disttrain.training.evaluation import (
        EvalSums,
        Subject,
        Tally,
        batch_size,
        score,
        summary,
    )

    _, config, facts, checkpoint = open_run(Path(request["run"]), request["checkpoint"])
    group = join(config, "cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size, device = group.process_index, group.num_processes, group.device
    classifier = load_model(request["run"], checkpoint, device=device)
    index = open_data(config, facts, request["data"], request["root"])
    ids = usable_samples(config, index)
    size = batch_size(config.train, world_size)
    workers = config.data.workers
    if workers is None:
        workers = max(1, min(8, usable_cores() // world_size))
    expect_images(len(ids) // world_size)
    # One pass: nothing is gained from a decoded copy.
    data = open_stream(
        index,
        "val",
        device,
        batch_size=size,
        workers=workers,
        pipeline=config.data.pipeline,
    )
    subject = Subject(
        classifier.network,
        device,
        classifier.normalise,
        data,
        ids,
        rank,
        world_size,
        size,
        classifier.as_evaluated,
    )
    positions = torch.tensor([facts.classes.index(name) for name in index.classes], device=device)
    tally = Tally(device, len(facts.classes))

    def take(batch: Batch, logits: Tensor, plain: Tensor) -> None:
        tally.add(batch._replace(labels=positions[batch.labels]), logits, plain)

    score(subject, request["tta"], take)
    assert tally.confusion is not None
    flat = torch.tensor(astuple(tally.sums()), dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(flat)
        dist.all_reduce(tally.confusion)
        dist.destroy_process_group()
    sums = EvalSums(*flat.tolist())
    sums.check(ids, "the evaluation saw")
    confusion = tally.confusion.view(len(facts.classes), -1).tolist()
    result = summary(sums, request["tta"])
    top5 = int(sums.top5_correct) if len(facts.classes) > 5 else None
    return result | {
        "kind": "eval",
        "top5_correct": top5,
        "top5_accuracy": None if top5 is None else top5 / result["total"],
        "skipped": index.splits["val"].samples - len(ids),
        "per_class": [_row(name, i, confusion[i]) for i, name in enumerate(facts.classes)],
        "classes": facts.classes,
        "confusion": confusion,
        "checkpoint": str(checkpoint),
        "step": classifier.step,
        "data": index.name,
        "split": "val",
        "processes": world_size,
        "device": device.type,
        "precision": classifier.precision,
    }


def _row(name: str, label: int, counts: list[int]) -> dict[str, Any]:
    total = sum(counts)
    accuracy = counts[label] / total if total else None
    return {"class": name, "correct": counts[label], "total": total, "accuracy": accuracy}


if __name__ == "__main__":
    serve(answer)
