"""Peer: mosaicml-streaming over the same JPEG bytes, in its own environment and in one process.

    python benchmarks/peers/mosaic_streaming.py FOLDER CACHE [--predownload N] [--samples 10000] [--threads 1]

FOLDER holds the shards of CIFAR-10 as JPEG. The first run makes CACHE/venv (pip decides which torch comes;
gigabytes are fetched) and CACHE/mds, the same samples as MDS with the JPEG bytes as they are. Every run then
measures one epoch of a shuffled StreamingDataset with torchvision's transforms, in batches of 512. All shards
are on this machine, so the whole epoch is predownloaded: the library's default, eight batches, was slower,
likely since its two background threads then last all epoch and take turns with the decoding one.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from common import BATCH_SIZE, encoded_samples, parser, report, set_threads, timed, usual_transform


def environment_python(cache: Path) -> Path:
    """Returns the interpreter of the peer's environment, created if it is missing."""
    python, ready = cache / "venv/bin/python", cache / "venv/ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", cache / "venv"], check=True, stdout=sys.stderr)
        install = [python, "-m", "pip", "install", "--quiet", "mosaicml-streaming", "torch", "torchvision"]
        subprocess.run(install, check=True, stdout=sys.stderr)
        ready.touch()
    return python


def converted(data: Path, cache: Path) -> Path:
    """Returns the folder of the MDS shards, written if they are missing."""
    from streaming import MDSWriter

    folder = cache / "mds"
    if not folder.exists():
        scratch = cache / "mds.incomplete"
        shutil.rmtree(scratch, ignore_errors=True)
        with MDSWriter(out=str(scratch), columns={"image": "jpeg", "label": "int"}) as out:
            for jpeg, label in encoded_samples(data):
                out.write({"image": jpeg, "label": label})  # bytes of a jpeg column are stored as they are
        scratch.rename(folder)
    return folder


def measure(arguments: argparse.Namespace) -> None:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    class Cifar10(StreamingDataset):
        def __init__(self, transform, **options) -> None:
            super().__init__(**options)
            self.transform = transform

        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            return self.transform(sample["image"]), sample["label"]

    local = str(converted(arguments.data, arguments.cache))
    set_threads(arguments.threads)
    clean_stale_shared_memory()  # of a run that was killed
    dataset = Cifar10(
        usual_transform(),
        local=local,
        shuffle=True,
        batch_size=BATCH_SIZE,
        predownload=arguments.predownload,
    )
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0)
    try:
        samples, seconds = timed(loader, arguments.samples)
    finally:
        del loader, dataset
        clean_stale_shared_memory()
    report(("mosaicml-streaming",), samples, seconds, workers=0)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("cache", type=Path, help="folder for the environment and the MDS shards")
    options.add_argument(
        "--predownload", type=int, default=sys.maxsize, help="predownload of StreamingDataset, in samples"
    )
    arguments = options.parse_args()
    if Path(sys.prefix).resolve() == (arguments.cache / "venv").resolve():
        measure(arguments)
    else:
        python = environment_python(arguments.cache)
        raise SystemExit(subprocess.run([python, __file__, *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
