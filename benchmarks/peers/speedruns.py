"""`configs/speedrun_cifar.yaml` and airbench94 in turns in one process, on one GPU: the training itself.

    python benchmarks/peers/speedruns.py CONFIG FOLDER [--rounds N] [KEY=VALUE ...]

FOLDER holds the packed CIFAR-10. After one round that does not count, each round trains one network of either
with another seed. Ours is the loop of a run, without its log points; its seconds are from the first step to
the last, with the whitening layer, as airbench counts its own. Neither counts its evaluations. The last line
printed is JSON: for each the seconds and the accuracies of every round, with its test-time augmentation. It
needs an environment with `airbench`.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from airbench94 import folder_of_airbench, result_of
from step_loops import Nothing

from disttrain.config import load_config
from disttrain.preflight import open_index
from disttrain.training.build import INIT_IMAGES, build
from disttrain.training.callbacks import Callbacks
from disttrain.training.evaluation import evaluate
from disttrain.training.group import join
from disttrain.training.rank import Rank
from disttrain.training.train import train_epoch


def ours(config_file: Path, overrides: list[str], seed: int) -> dict[str, float]:
    """Trains one network and returns its seconds and accuracy."""
    config = load_config(config_file, [*overrides, f"seed={seed}", "monitor.log_every_steps=1000000"])
    index = open_index(config, lambda text: None)
    parts, position, _ = build(config, Rank(0, None), join(config, "cuda"), index, None)
    nothing = Nothing()
    callbacks = Callbacks(nothing, nothing, nothing, lambda: False)
    parts.model.train()
    torch.cuda.synchronize()
    began = time.perf_counter()
    first = parts.train_data.batches(parts.plan.ids, [slice(0, INIT_IMAGES)])
    cast(Any, parts.bare_model).init_from_images(parts.augment.normalize(next(first).images))
    for epoch in range(config.train.epochs):
        train_epoch(parts, position, parts.plan.order(epoch), callbacks)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    found = evaluate(parts, config.eval.tta, position, callbacks)
    assert found is not None
    return {"seconds": seconds, "accuracy": found.record["accuracy"]}


def airbench94() -> dict[str, float]:
    """Trains one network of airbench and returns its seconds and accuracy."""
    import airbench

    with contextlib.redirect_stdout(io.StringIO()) as table:
        airbench.train94()
    return result_of(table.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_intermixed_args()
    config, data = options.config.resolve(), options.data.resolve()
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "airbench94": []}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder_of_airbench(data)
        for seed in range(options.rounds + 1):
            rounds["ours"].append(ours(config, options.overrides, seed))
            rounds["airbench94"].append(airbench94())
    found = {
        name: {key: [one[key] for one in results[1:]] for key in ("seconds", "accuracy")}
        for name, results in rounds.items()
    }
    print(json.dumps(found | {"airbench": version("airbench"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
