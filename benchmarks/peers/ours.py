"""disttrain's side of the comparison: what the peers do, through its own parts.

    python benchmarks/peers/ours.py streamed|cached|decode_once|resume FOLDER [--threads 2] [--samples 10000]

streamed reads, decodes, crops, flips and normalizes every sample of an epoch, after checking the shards;
cached does the same from the decoded copy, for ten epochs; decode_once makes that copy; resume is the time to
the first batch of the second half of an epoch, with the shards checked before, as in a run that goes on.
"""

import os
import sys
import tempfile
import time

import numpy as np
import torch
from common import BATCH_SIZE, MEAN, STD, parser, report, set_threads

from disttrain.config import AugmentConfig
from disttrain.data.cached import Cached
from disttrain.data.decoded_copy import open_split
from disttrain.data.epoch_plan import Plan
from disttrain.data.streamed import Streamed
from disttrain.shards.index import Index, load_index
from disttrain.training.augment import Augment
from disttrain.training.normalize import Normalize

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)
CACHED_EPOCHS = 10


def quiet(text: str) -> None:
    pass


def epoch_of(loader: Cached | Streamed, plan: Plan, epoch: int, begin: int, limit: int | None) -> int:
    """Serves and augments an epoch from step `begin` on; returns the samples served."""
    normalize = Normalize(MEAN, STD, 32, channels_last=True)
    augment = Augment(AugmentConfig(crop_padding=4, flip=True), seed=0, normalize=normalize)
    augment.start_epoch(epoch, plan.order(epoch), 32, 32)
    windows = [slice(p.start, p.stop) for p in map(plan.batch, range(begin, plan.steps_per_epoch))]
    seen = 0
    for window, batch in zip(windows, loader.batches(plan.order(epoch), windows), strict=True):
        augment.train(batch.images, window)
        seen += len(batch.ids)
        if limit is not None and seen >= limit:
            break
    return seen


def streamed(index: Index, threads: int) -> Streamed:
    return Streamed(index, "train", CPU, batch_size=BATCH_SIZE, workers=threads, say=quiet)


def main() -> None:
    what = sys.argv.pop(1)
    arguments = parser(__doc__).parse_args()
    set_threads(arguments.threads)
    threads = arguments.threads or torch.get_num_threads()
    index = load_index(arguments.data.name, str(arguments.data.parent))
    plan = Plan(0, tuple(shard.samples for shard in index.splits["train"].shards), BATCH_SIZE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DISTTRAIN_CACHE"] = cache
        if what == "decode_once":
            began = time.perf_counter()
            open_split(index, "train", NONE, quiet)
            samples = plan.samples
        elif what == "cached":
            loader = Cached(open_split(index, "train", NONE, quiet), CPU, "host")
            epoch_of(loader, plan, 0, 0, None)
            began = time.perf_counter()
            samples = sum(epoch_of(loader, plan, epoch, 0, None) for epoch in range(1, 1 + CACHED_EPOCHS))
        elif what == "streamed":
            loader = streamed(index, threads)
            began = time.perf_counter()
            samples = epoch_of(loader, plan, 0, 0, arguments.samples)
        elif what == "resume":
            epoch_of(streamed(index, threads), plan, 0, 0, None)
            began = time.perf_counter()
            samples = epoch_of(streamed(index, threads), plan, 1, plan.steps_per_epoch // 2, 1)
        else:
            raise SystemExit(f"{what}: expected streamed, cached, decode_once or resume")
        seconds = time.perf_counter() - began
    report(("disttrain",), samples, seconds, decoding_threads=threads)


if __name__ == "__main__":
    main()
