"""Peer: the webdataset pipeline most people write, over the packed shards; one process unless told otherwise.

    python benchmarks/peers/webdataset_stock.py FOLDER [--workers 2] [--samples 10000] [--threads 1]

FOLDER holds the shards of CIFAR-10 as JPEG. One epoch from the first batch asked for to the last one:
reading, shuffling, decoding with PIL, torchvision's transforms, batches of 512.
"""

import webdataset as wds
from common import BATCH_SIZE, parser, report, set_threads, shards, timed, usual_transform


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--workers", type=int, default=0, help="WebLoader worker processes; 0 loads in the main process"
    )
    arguments = options.parse_args()
    urls = [str(path) for path in shards(arguments.data)]
    if arguments.workers > len(urls):
        options.error(f"--workers {arguments.workers}, but {len(urls)} shards: a worker would have none")
    set_threads(arguments.threads)
    dataset = (
        wds.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(usual_transform())
        .batched(BATCH_SIZE)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=arguments.workers)
    samples, seconds = timed(loader, arguments.samples)
    report(("webdataset",), samples, seconds, workers=arguments.workers)


if __name__ == "__main__":
    main()
